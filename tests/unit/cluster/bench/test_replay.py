"""`tandem bench replay` on a made-up device: whoever measured what virtual time says is not far."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster.bench import replay_colocated
from tandem.cluster.bench.replay import (
    JITTER_S,
    REQUESTS,
    ablations,
    cluster_of,
    jittered,
    read_runs,
    replay,
    show,
    show_ablations,
)
from tandem.cluster.bench.replay_colocated import Apart, Contender, contenders, goodput, show_goodput
from tandem.cluster.bench.replay_costs import compare_costs, show_costs
from tandem.cluster.bench.replay_left_out import factors, leave_one_out, scaled, show_left_out
from tandem.cluster.cli import app
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.sim.systems import DISTSERVE, SYSTEMS, TANDEM, VLLM
from tandem.cluster.types import SLO, Role
from typer.testing import CliRunner

SPLIT = {
    "decoding_large_small_bs_threshold": 95,
    "prefill": [100.0, 0.0, 0.0],
    "decoding_smallbs": [40.0, 0.0, 0.0],
    "decoding_largebs": [40.0, 0.0, 0.0],
}
HEADER = "run,backend,config,num_requests,nominal_rate_rps,arrival_s,input_tokens,output_tokens,ttft_ms,tpot_ms\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as DistServe's data are kept; a prompt takes 0.1 s there, a step 40 ms."""
    for kind in ("distserve", "vllm"):
        (tmp_path / f"profiler-a100-80g.{kind}.json").write_text(json.dumps({"facebook/opt-13b": {"1": SPLIT}}))
    held = ["model,tp,pp,max_num_tokens", "facebook/opt-13b,1,1,66144", "facebook/opt-13b,1,2,163008"]
    (tmp_path / "max_num_tokens.csv").write_text("\n".join(held) + "\n")
    rows = "split,distserve,c11d11,2,1,{at},16,{out},{ttft},{tpot}\n"
    text = HEADER + rows.format(at=5, out=1, ttft=110, tpot="") + rows.format(at=0, out=11, ttft=110, tpot=43)
    with gzip.open(tmp_path / REQUESTS, "wt") as file:
        file.write(text)
    return tmp_path


def test_a_run_is_read_in_order_of_arrival_and_replayed(data: Path) -> None:
    [run] = read_runs(data / REQUESTS)
    assert [request.arrival_s for request in run.asked] == [0.0, 5.0]
    assert (run.system, run.config, run.rate) == ("distserve", "c11d11", 1.0)
    row = replay(run, data)
    assert row.measured.attainment == row.simulated.attainment == 1.0
    assert row.points == 0.0
    assert max(map(abs, row.errors().values())) < 0.1
    low, high = row.interval
    assert 0.3 < low < 0.4  # two of two say little
    assert high == pytest.approx(1.0)
    assert "| split | 2 | 100.0 → 100.0 | +0.0 | 34.2 to 100.0 | 110 → 10" in show([row])


def test_replays_differ_by_milliseconds_and_come_in_order(data: Path) -> None:
    [run] = read_runs(data / REQUESTS)
    once, again = jittered(run.asked, 1), jittered(run.asked, 2)
    assert once == jittered(run.asked, 1) != again
    for moved in (once, again):
        later_s = [one.arrival_s - before.arrival_s for one, before in zip(moved, run.asked, strict=True)]
        assert all(0.0 <= one <= JITTER_S for one in later_s)
    crowd = jittered([replace(run.asked[0], request_id=str(place)) for place in range(20)], 1)
    assert [one.arrival_s for one in crowd] == sorted(one.arrival_s for one in crowd)


def test_a_run_is_foretold_by_the_other_runs_of_its_system(data: Path) -> None:
    path = data / "two.csv"
    rows = "{run},distserve,c11d11,1,1,0,16,11,110,{tpot}\n"
    path.write_text(HEADER + rows.format(run="slow", tpot=43) + rows.format(run="quick", tpot=41))
    slow, quick = leave_one_out(read_runs(path), data, SYSTEMS)
    assert (slow.factor, quick.factor) == (0.0, 2.0), "each by what the other says of a token: 0 or 60 us"
    assert quick.replayed.simulated.tpot_p50_s > slow.replayed.simulated.tpot_p50_s
    assert "| slow | 0 | 100.0 → 100.0 | +0.0 |" in show_left_out([slow, quick])
    assert leave_one_out(read_runs(data / REQUESTS), data, SYSTEMS) == []
    for system, scale in ((DISTSERVE, 2.0), (VLLM, 1.12)):
        assert scale in factors(system)
        assert scaled(system, scale) != system == scaled(system, 1.0)


def test_a_mixed_step_can_be_paid_as_two() -> None:
    terms = DecodeTerms(step_s=0.02, row_s=0.001, context_token_s=0.0)
    costs = StepProfile(prefill_step_s=0.01, prefill_token_s=1e-4, decode=terms, large_decode=terms, large_batch_rows=1)
    apart = Apart(costs)
    assert apart.step_time_s(100, 100, 5, 50) == pytest.approx(0.01 + 0.01 + 0.02 + 0.005)
    assert apart.step_time_s(100, 100, 5, 50) == pytest.approx(costs.step_time_s(100, 100, 5, 50) + 0.01)
    assert apart.stage_time_s(100, 100, 0, 0) == costs.stage_time_s(100, 100, 0, 0)
    assert apart.step_time_s(0, 0, 5, 50) == costs.step_time_s(0, 0, 5, 50)
    assert list(apart.decode_steps(5, 50, 3)) == list(costs.decode_steps(5, 50, 3))


def test_goodput_is_by_gpu_and_promise(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = data / "lengths.csv"
    lengths.write_text("arrival_s,input_tokens,output_tokens\n" + ",16,5\n" * 4)
    monkeypatch.setattr(replay_colocated, "REQUESTS", 30)
    monkeypatch.setattr(replay_colocated, "RATES", (0.5, 4.0))
    loose, none = SLO(ttft_s=10.0, tpot_s=1.0), SLO(ttft_s=0.01, tpot_s=1.0)
    found = {}
    for apart in (False, True):
        one = Contender(name="one", system=TANDEM, workers=((TANDEM.replica(Role.MIXED), 1),), apart=apart)
        found[apart] = goodput(one, data, lengths, (loose, none))
        assert found[apart] == [replay_colocated.RATES[-1], 0.0]
    assert [contender.gpus for contender in contenders()] == [3, 1, 3, 4, 4, 4, 4, 4]
    text = show_goodput([(contenders()[0], [1.5, 0.25])])
    assert "| 200 / 100 ms | 200 / 30 ms |" in text
    assert "| 3 | 1.50 | 0.25 |" in text


def test_what_is_left_out_is_named_and_changes_the_system(data: Path) -> None:
    [run] = read_runs(data / REQUESTS)
    for system in (DISTSERVE, VLLM):
        parts = ablations(system)
        assert parts.pop("as it is") is system
        assert len(parts) >= 3
        assert system not in parts.values()
    rows = {name: [replay(run, data, part)] for name, part in ablations(DISTSERVE).items()}
    text = show_ablations(rows)
    assert text.count("\n") == 2 + len(rows)
    assert "| KV moves in no time | 100.0 %, TPOT" in text


@pytest.mark.parametrize(
    ("backend", "config", "message"),
    [
        ("orca", "tp1", "backend: 'orca' is not known; known: distserve, vllm, tandem"),
        ("vllm", "c2", "config: 'c2' is not like c21d11 or tp1"),
        ("vllm", "c11d11", "vllm has no prefill workers"),
        ("distserve", "c41d11", "TP 4 PP 1: nothing is known of its memory; known: TP 1 PP 1, TP 1 PP 2"),
    ],
)
def test_what_nothing_is_known_of_is_refused(data: Path, backend: str, config: str, message: str) -> None:
    path = data / "other.csv"
    path.write_text(f"{HEADER}odd,{backend},{config},1,1,0,5,2,20,30\n")
    [run] = read_runs(path)
    with pytest.raises(ValueError, match=message):
        cluster_of(run, data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no run in it"),
        (HEADER, "there is no run in it"),
        (
            f"{HEADER}odd,vllm,tp1,1,1,soon,5,2,20,30\n",
            "odd: arrival_s: 'soon' is not allowed; allowed: a number from 0",
        ),
        (f"{HEADER}odd,vllm,tp1,1,1,0,0,2,20,30\n", "odd: input_tokens: '0' is not allowed; allowed: a number from 1"),
        (f"{HEADER}odd,vllm,tp1,1,1,0,5,2,,30\n", "odd: ttft_ms: '' is not allowed"),
        (f"{HEADER}odd,vllm,tp1,1,1,0,5,2,20\n", "odd: tpot_ms: None is not allowed"),
        (HEADER.replace("tpot_ms", "tpot") + "odd,vllm,tp1,1,1,0,5,2,20,30\n", "there is no column 'tpot_ms'"),
    ],
)
def test_what_is_wrong_with_a_file_of_runs_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(path)


def test_other_rates_and_pipelines_of_decode_need_a_file_and_nothing_else(data: Path) -> None:
    """As runs that are kept back would: two stages of decode, and vLLM on two devices one behind the other."""
    path = data / "others.csv"
    row = "{run},{run},{config},1,{rate},0,16,11,110,43\n"
    path.write_text(
        HEADER
        + row.format(run="distserve", config="c11d12", rate=7.5)
        + row.format(run="vllm", config="tp1pp2", rate=1.5)
    )
    split, mixed = [cluster_of(run, data) for run in read_runs(path)]
    assert [worker.costs.pipeline_stages for worker in split.workers] == [1, 2]
    assert [worker.costs.pipeline_stages for worker in mixed.workers] == [2]
    assert split.workers[1].num_blocks == 163008 // split.workers[1].block_size
    result = CliRunner().invoke(app, ["bench", "replay", "--data", str(data), "--requests", str(path)])
    assert "| distserve | 1 | " in result.output
    assert "| vllm | 1 | " in result.output


def test_the_command_says_who_is_far(data: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["bench", "replay", "--data", str(data), *words])
        return result.exit_code, result.output

    code, output = run("--ablate", "--costs")
    assert code == 0
    assert "| as it is |" in output
    assert "| opt-13b | 1 | prefill | 6 |" in output
    path = data / "slow.csv"
    path.write_text(f"{HEADER}slow,distserve,c11d12,1,1,0,5,9,900,30\n")
    code, output = run("--requests", str(path))
    assert code == 1
    assert "more than 5 points off: slow" in output


def test_the_roofline_is_compared_at_every_split(data: Path) -> None:
    rows = compare_costs(data)
    assert [(row.tensor_parallel, row.phase, len(row.errors)) for row in rows] == [(1, "prefill", 6), (1, "decode", 21)]
    assert show_costs(rows).count("\n") == 3
