"""The report against numbers worked out by hand."""

import json
import math
from dataclasses import replace

import pytest
from tandem.cluster.bench.show import table
from tandem.cluster.workload.report import (
    RequestRecord,
    Summary,
    attains,
    distortion,
    parse_goodput,
    result_json,
    summarize,
)

# Sent at 10.0 (due 9.9), tokens at 10.2, 10.3, 10.5: TTFT 200 ms, E2E 500 ms, TPOT (500-200)/2 = 150 ms.
FIRST = RequestRecord(
    due_s=9.9,
    sent_s=10.0,
    first_token_s=10.2,
    last_token_s=10.5,
    chunk_times_s=(10.2, 10.3, 10.5),
    prompt_tokens=5,
    output_tokens=3,
    text="abc",
)
# One token: no TPOT. TTFT = E2E = 100 ms.
SINGLE = RequestRecord(
    due_s=11.0,
    sent_s=11.0,
    first_token_s=11.1,
    last_token_s=11.1,
    chunk_times_s=(11.1,),
    prompt_tokens=7,
    output_tokens=1,
    text="x",
)
# TTFT 400 ms, E2E 1,000 ms, five tokens in two pieces: TPOT 600/4 = 150 ms, one gap of 600 ms.
SLOW = RequestRecord(
    due_s=11.0,
    sent_s=11.0,
    first_token_s=11.4,
    last_token_s=12.0,
    chunk_times_s=(11.4, 12.0),
    prompt_tokens=8,
    output_tokens=5,
)
FAILED = RequestRecord(due_s=11.5, sent_s=11.7, error="HTTP 429: full")
ALL = (FIRST, SINGLE, SLOW, FAILED)


def test_one_request() -> None:
    assert FIRST.ttft_s == pytest.approx(0.2)
    assert FIRST.e2e_s == pytest.approx(0.5)
    assert FIRST.tpot_s == pytest.approx(0.15)
    assert FIRST.itls_s == pytest.approx((0.1, 0.2))
    assert FIRST.lateness_s == pytest.approx(0.1)
    assert SINGLE.tpot_s is None
    assert SINGLE.itls_s == ()
    assert FAILED.ttft_s is None
    assert not FAILED.ok


def test_summary() -> None:
    summary = summarize(ALL, {"ttft": 250.0, "tpot": 160.0}, (50.0, 99.0))
    assert (summary.completed, summary.failed) == (3, 1)
    assert summary.duration_s == pytest.approx(2.0)  # 10.0 to 12.0
    assert summary.total_input_tokens == 20
    assert summary.total_output_tokens == 9
    assert summary.request_throughput == pytest.approx(1.5)
    assert summary.output_throughput == pytest.approx(4.5)
    assert summary.total_token_throughput == pytest.approx(14.5)
    ttft = summary.metrics_ms["ttft"]
    assert ttft["mean"] == pytest.approx((200 + 100 + 400) / 3)
    assert ttft["median"] == ttft["p50"] == pytest.approx(200)
    assert ttft["max"] == pytest.approx(400)
    assert ttft["p99"] == pytest.approx(200 + 0.98 * 200)  # linear between the 2nd and 3rd of three
    assert ttft["std"] == pytest.approx(
        math.sqrt(((200 - 700 / 3) ** 2 + (100 - 700 / 3) ** 2 + (400 - 700 / 3) ** 2) / 3)
    )
    assert summary.metrics_ms["tpot"]["mean"] == pytest.approx(150)
    assert summary.metrics_ms["itl"]["mean"] == pytest.approx((100 + 200 + 600) / 3)
    assert summary.metrics_ms["e2el"]["max"] == pytest.approx(1000)
    assert summary.metrics_ms["lateness"]["mean"] == pytest.approx((100 + 0 + 0 + 200) / 4)  # the failed one too


def test_attainment_is_joint_and_counts_failures() -> None:
    summary = summarize(ALL, {"ttft": 250.0, "tpot": 160.0})
    assert summary.attained == 2  # FIRST and SINGLE; SLOW misses TTFT, FAILED everything
    assert summary.attainment == pytest.approx(0.5)
    assert summary.request_goodput == pytest.approx(1.0)
    assert summarize(ALL, {"ttft": 250.0, "tpot": 140.0}).attained == 1  # FIRST misses TPOT though its TTFT is kept
    assert summarize(ALL, {"e2el": 500.5}).attained == 2
    nothing_promised = summarize(ALL, {})
    assert nothing_promised.attained is None
    assert nothing_promised.attainment is None
    assert nothing_promised.request_goodput is None


def test_the_limit_itself_is_kept() -> None:
    record = RequestRecord(due_s=0, sent_s=0, first_token_s=0.5, last_token_s=0.5, output_tokens=1)
    assert attains(record, {"ttft": 500.0})
    assert not attains(record, {"ttft": 499.9})


def test_nothing_completed() -> None:
    summary = summarize((FAILED,), {"ttft": 1.0})
    assert summary.completed == 0
    assert summary.attainment == 0
    assert math.isnan(summary.metrics_ms["ttft"]["mean"])
    assert "-" in table(summary)


def test_result_has_vllms_names_and_is_json() -> None:
    summary = summarize(ALL, {"ttft": 250.0})
    result = json.loads(json.dumps(result_json(summary, ALL, {"model_id": "m"}), allow_nan=False))
    assert {"duration", "completed", "total_input_tokens", "request_throughput", "request_goodput"} <= result.keys()
    assert {"output_throughput", "total_token_throughput", "model_id", "generated_texts", "errors"} <= result.keys()
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p99")} <= result.keys()
    assert result["ttfts"] == pytest.approx([0.2, 0.1, 0.4, None])
    assert result["itls"][0] == pytest.approx([0.1, 0.2])
    assert result["input_lens"] == [5, 7, 8, 0]
    assert result["errors"][3] == "HTTP 429: full"
    empty = json.dumps(result_json(summarize((FAILED,), {}), (FAILED,), {}), allow_nan=False)
    assert json.loads(empty)["mean_ttft_ms"] is None


def test_goodput_flags() -> None:
    assert parse_goodput(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}
    assert parse_goodput([]) == {}


@pytest.mark.parametrize("pair", ["itl:3", "ttft", "ttft:", "ttft:0", "tpot:-1", "e2el:inf", "ttft:nan", "TTFT:3"])
def test_bad_goodput_flags(pair: str) -> None:
    with pytest.raises(ValueError, match=r"^goodput: .*allowed: "):
        parse_goodput([pair])


def test_goodput_given_twice() -> None:
    with pytest.raises(ValueError, match="given twice"):
        parse_goodput(["ttft:1", "ttft:2"])


def test_table_reads() -> None:
    text = table(summarize(ALL, {"ttft": 250.0, "tpot": 160.0}))
    assert "3 completed, 1 failed in 2.0 s" in text
    assert "50.0% of requests kept TTFT <= 250 ms and TPOT <= 160 ms" in text
    assert "goodput     1.00 requests/s kept them, over all 2.0 s" in text


def test_the_exposed_wait_is_a_share_of_the_ttft_of_what_was_handed_over() -> None:
    """Medians: 10 of 300 ms; what was served without a handoff does not count."""
    split = {"path": "split", "exposed_transfer_s": 0.01}
    served = (
        replace(FIRST, timings=split),
        replace(SINGLE, timings={"path": "mixed", "exposed_transfer_s": 9.0}),
        replace(SLOW, timings=split),
        replace(FAILED, timings=split),
    )
    summary = summarize(served, {})
    assert summary.exposed_wait is not None
    assert summary.exposed_wait.requests == 2
    assert summary.exposed_wait.exposed_ms_p50 == pytest.approx(10.0)
    assert summary.exposed_wait.share_of_ttft == pytest.approx(10 / 300)
    assert "KV came 10.0 ms after the end of prefill (p50), 3.3% of TTFT p50" in table(summary)
    result = result_json(summary, served, {})
    assert (result["handoffs"], result["exposed_transfer_share_of_ttft"]) == (2, pytest.approx(10 / 300))
    hidden = summarize((replace(FIRST, timings={"path": "split"}),), {}).exposed_wait
    assert hidden is not None
    assert hidden.share_of_ttft == 0.0
    assert summarize(ALL, {}).exposed_wait is None
    assert "handoff" not in table(summarize(ALL, {}))


def test_peaks() -> None:
    summary = summarize(ALL, {})
    assert summary.max_concurrent_requests == 2  # SINGLE and SLOW, from 11.0 on
    # 10.2 to 11.2: three tokens of FIRST and the one of SINGLE; 11.2 to 12.2: the five of SLOW
    assert summary.max_output_tokens_per_s == 5.0


def late(lateness_s: float = 0.0, stall_s: float = 0.0, ttft_s: float = 0.1) -> Summary:
    record = RequestRecord(
        due_s=0.0, sent_s=lateness_s, first_token_s=lateness_s + ttft_s, last_token_s=lateness_s + ttft_s
    )
    return summarize([record], {}, (99.0,), [stall_s])


def test_a_late_client_says_so_loudly() -> None:
    assert distortion(late(0.02, 0.02)) == ""
    assert "sent requests late (p99 30.0 ms), against a median TTFT of 100.0 ms" in distortion(late(0.03))
    assert "read answers late (p99 30.0 ms)" in distortion(late(0.0, 0.03))
    assert "WARNING" in table(late(0.03))
    assert "WARNING" not in table(late(0.02))


def test_a_timers_millisecond_is_no_lateness_and_a_closed_loop_holds_back_on_purpose() -> None:
    assert distortion(late(0.0015, 0.0015, ttft_s=0.003)) == ""
    assert distortion(late(0.5), closed_loop=True) == ""
    assert distortion(late(0.5, 0.5), closed_loop=True) != ""
    assert distortion(summarize([FAILED], {})) == ""


def test_the_saved_result_has_the_metrics_and_the_detail_that_were_asked_for() -> None:
    short = result_json(summarize(ALL, {}), ALL, {}, metrics=("ttft",), detailed=False)
    assert "mean_ttft_ms" in short
    assert "mean_tpot_ms" not in short
    assert not any(isinstance(value, list) for value in short.values())
    full = result_json(summarize(ALL, {}), ALL, {})
    assert full["latencies"] == pytest.approx([0.5, 0.1, 1.0, None], nan_ok=True)
    assert full["start_times"] == pytest.approx([0.1, 1.1, 1.1, 1.8])
    assert full["queue_times"] == pytest.approx([0.1, 0.0, 0.0, 0.2])


def test_the_table_has_the_rows_and_columns_that_were_asked_for() -> None:
    text = table(summarize(ALL, {}, (50.0, 90.0)), (50.0, 90.0), ("ttft",))
    assert text.splitlines()[0].split() == ["ms", "mean", "median", "p50", "p90", "max"]
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["TTFT", "sent", "read"]


def test_a_failure_that_was_waited_for_counts_as_time() -> None:
    waited = RequestRecord(due_s=11.0, sent_s=11.0, error="no end within 9 s", ended_s=20.0)
    summary = summarize((*ALL, waited), {"ttft": 250.0})
    assert summary.duration_s == pytest.approx(10.0)  # 10.0 to 20.0
    assert summary.request_throughput == pytest.approx(0.3)
    assert summarize((waited,), {}).duration_s == pytest.approx(9.0)
