"""The search for the highest rate: against an imagined server, whose knee is known."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.bench.show import sweep_row, sweep_verdict
from tandem.cluster.workload.report import RequestRecord, summarize
from tandem.cluster.workload.sweep import RateSearch, SweepPoint, SweepResult, SweepRun, Watch, sweep_run

PROMISES = {"ttft": 100.0, "tpot": 10.0}


def record(due_s: float, ttft_s: float) -> RequestRecord:
    first_s = due_s + ttft_s
    return RequestRecord(
        due_s=due_s, sent_s=due_s, first_token_s=first_s, last_token_s=first_s + 0.009, output_tokens=2
    )


def run(attained: int, *, requests: int = 10, late: int | None = None, early: bool = False) -> SweepRun:
    late_attained = attained - requests // 2 if late is None else late
    return SweepRun(
        seed=0,
        requests=requests,
        attained=attained,
        late_requests=requests // 2,
        late_attained=late_attained,
        duration_s=2.0,
        ended_early=early,
    )


def search(knee: float, start: float, resolution: float = 0.05, max_points: int = 40) -> list[float]:
    seeking = RateSearch(start=start, resolution=resolution, max_points=max_points)
    tried = []
    while (rate := seeking.next_rate()) is not None:
        tried.append(rate)
        seeking.add(rate, rate <= knee)
    return tried


def test_rates_double_until_one_fails_then_close_in() -> None:
    tried = search(knee=5.0, start=1.0)
    assert tried[:4] == [1.0, 2.0, 4.0, 8.0]
    assert tried[4] == pytest.approx(math.sqrt(32))
    assert max(rate for rate in tried if rate <= 5.0) >= 5.0 / 1.05


@given(st.floats(0.02, 500), st.floats(0.5, 20), st.sampled_from([0.02, 0.05, 0.2]))
def test_the_knee_is_found_within_the_resolution(knee: float, start: float, resolution: float) -> None:
    tried = search(knee, start, resolution)
    kept = [rate for rate in tried if rate <= knee]
    if kept:
        assert min(rate for rate in tried if rate > knee) / max(kept) <= 1 + resolution
    else:
        assert min(tried) <= start / 64
    assert len(tried) <= 30


def test_points_are_bounded_and_an_unfinished_search_says_so() -> None:
    seeking = RateSearch(start=1.0, resolution=0.05, max_points=3)
    for _ in range(3):
        rate = seeking.next_rate()
        assert rate is not None
        seeking.add(rate, True)
    assert seeking.next_rate() is None
    assert not seeking.settled


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [("start", 0.0, "request_rate"), ("start", math.inf, "request_rate"), ("resolution", 0.0, "sweep_resolution")],
)
def test_what_cannot_be_searched_is_refused(name: str, value: float, option: str) -> None:
    options = {"start": 1.0, "resolution": 0.05, "max_points": 3} | {name: value}
    with pytest.raises(ValueError, match=option):
        RateSearch(**options)


def test_a_point_is_judged_over_all_its_seeds() -> None:
    point = SweepPoint(rate=2.0, runs=(run(10), run(9), run(8)))
    assert point.attainment == pytest.approx(0.9)
    assert not point.keeps(0.9)  # of the second halves, 12 of 15
    assert point.keeps(0.8)
    assert point.goodput == pytest.approx(4.5)


def test_a_queue_that_grows_is_not_sustained_though_the_whole_looks_well() -> None:
    assert SweepPoint(rate=2.0, runs=(run(95, requests=100, late=50),)).keeps(0.9)
    assert not SweepPoint(rate=2.0, runs=(run(94, requests=100, late=44),)).keeps(0.9)


def test_a_run_that_was_ended_early_never_keeps() -> None:
    assert not SweepPoint(rate=2.0, runs=(run(10, early=True),)).keeps(0.5)


def test_the_best_rate_lies_below_the_lowest_failure() -> None:
    points = tuple(SweepPoint(rate=rate, runs=(run(kept),)) for rate, kept in ((4.0, 10), (1.0, 10), (2.0, 5)))
    result = SweepResult(label="a", target=0.9, promises_ms=PROMISES, points=points)
    assert result.best is not None
    assert result.best.rate == 1.0
    assert SweepResult(label="a", target=0.9, promises_ms=PROMISES, points=points[2:]).best is None


def test_a_saved_sweep_comes_back() -> None:
    point = SweepPoint(rate=2.0, runs=(run(10), run(9, early=True)))
    result = SweepResult(label="split", target=0.9, promises_ms=PROMISES, points=(point,), complete=False)
    saved = json.loads(json.dumps(result.as_json(), allow_nan=False))
    back = SweepResult.from_json(saved)
    assert back.as_json() == result.as_json()
    assert math.isnan(back.points[0].runs[0].p99_ttft_ms)
    with pytest.raises(ValueError, match="no saved sweep"):
        SweepResult.from_json({"duration": 1})


def test_a_run_is_judged_with_its_second_half() -> None:
    records = [record(float(second), 0.05 if second < 7 else 0.5) for second in range(10)]
    summary = summarize(records, PROMISES)
    judged = sweep_run(
        records, PROMISES, summary.metrics_ms, seed=3, duration_s=10.0, ended_early=False, client_late=False
    )
    assert (judged.requests, judged.attained, judged.late_requests, judged.late_attained) == (10, 7, 5, 2)
    assert judged.median_ttft_ms == pytest.approx(50)
    assert judged.goodput == pytest.approx(0.7)


def test_a_run_is_lost_once_more_failed_than_is_forgiven() -> None:
    watch = Watch(PROMISES, forgiven=2)
    for _ in range(2):
        watch.done(record(0.0, 1.0))
        watch.done(record(0.0, 0.01))
    assert not watch.is_lost(0)
    assert watch.is_lost(1)


@pytest.mark.parametrize(
    ("promises", "age_s", "overdue"),
    [
        ({"ttft": 100.0, "tpot": 10.0}, 0.19, False),  # 100 + 9 x 10
        ({"ttft": 100.0, "tpot": 10.0}, 0.191, True),
        ({"e2el": 150.0, "ttft": 100.0}, 0.151, True),
        ({"ttft": 100.0}, 100.0, False),  # the first token may have come in time
        ({"tpot": 10.0}, 100.0, False),
    ],
)
def test_a_request_is_overdue_when_all_its_promises_together_are_spent(
    promises: dict[str, float], age_s: float, overdue: bool
) -> None:
    assert Watch(promises, 0).is_overdue(age_s, max_tokens=10) is overdue


def test_a_sweeps_verdict_says_what_to_make_of_it() -> None:
    def verdict(*points: tuple[float, int], complete: bool = True) -> list[str]:
        found = tuple(SweepPoint(rate=rate, runs=(run(kept),)) for rate, kept in points)
        result = SweepResult(label="a", target=0.9, promises_ms={"ttft": 100.0}, points=found, complete=complete)
        return sweep_verdict(result).splitlines()

    promise = "90% of requests keep TTFT <= 100 ms"
    assert verdict((1.0, 10), (2.0, 5)) == [f"highest rate at which {promise}: 1 requests/s"]
    assert verdict((1.0, 5)) == [f"even the lowest rate that was tried is too high for this: {promise}"]
    assert "4 requests/s kept it though a lower rate did not" in verdict((1.0, 10), (2.0, 5), (4.0, 10))[1]
    assert "before the knee was closed in on" in verdict((1.0, 10), complete=False)[1]


def test_a_row_says_why_a_point_is_not_kept() -> None:
    late = SweepRun(
        seed=0,
        requests=10,
        attained=2,
        late_requests=5,
        late_attained=0,
        duration_s=1.0,
        ended_early=True,
        client_late=True,
        median_ttft_ms=12.34,
    )
    row = sweep_row(SweepPoint(rate=2.0, runs=(late,)), 0.9)
    assert row.split()[:5] == ["2", "20.0%", "0.0%", "2.00", "12.3"]
    assert row.endswith("20%  not kept, ended early  CLIENT LATE")
