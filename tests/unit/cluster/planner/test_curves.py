"""What the best plans are simulated for beside the search: latencies at their rate, attainment over all rates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import evaluated, opt, result, split
from tandem.cluster.planner import curves
from tandem.cluster.planner.curves import Load, point_at, with_curves
from tandem.cluster.planner.predict import Saw, predict, prediction_of, rate_of, settled
from tandem.cluster.planner.result import PlanResult
from tandem.cluster.planner.setting import Setting, setting_of


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of(opt(workload__output_tokens=8))


def alone() -> PlanResult:
    """One disaggregated plan that keeps its promises at 6 requests/s and not at 60."""
    one = replace(evaluated(split(), 6.0), prediction=None)
    return result(disaggregated=one, colocated=None, difference=None, explored=(one,))


def test_a_prediction_is_of_one_rate(setting: Setting) -> None:
    prediction, slow = predict(setting, split(), 6.0), predict(setting, split(), 60.0)
    assert prediction.rate == 6.0
    assert prediction.attainment == prediction.by_class["chat"] > 0.9
    assert 0.0 < prediction.ttft.p50 < prediction.ttft.p90 < prediction.ttft.p99
    assert prediction.tpot is not None
    assert prediction.tpot.p50 < 0.1
    assert slow.attainment < 0.5
    assert slow.ttft.p50 > prediction.ttft.p99


def test_workers_that_fill_up_are_not_what_clients_see_later() -> None:
    run = [Saw("chat", True, 0.1, None)] * 3 + [Saw("chat", False, 0.3, None)] * 4
    assert list(settled(run)) == [Saw("chat", False, 0.3, None)] * 4
    assert settled(run[:1]) == run[:1]


def test_the_rate_that_was_asked_for_counts_where_it_is_kept() -> None:
    one = evaluated(split(), 6.0)
    assert rate_of(one, None) == 6.0
    assert rate_of(replace(one, keeps_target_rate=True), 5.0) == 5.0
    assert rate_of(replace(one, keeps_target_rate=False), 9.0) == 6.0


def test_classes_without_a_promise_count_for_nothing() -> None:
    classes = {"chat": {"share": 0.5, "ttft_s": 0.25}, "batch": {"share": 0.5}}
    setting = setting_of(opt(workload__slo_classes=classes))
    saw = [Saw("chat", True, 0.1, None), Saw("chat", False, 0.3, None), Saw("batch", True, 9.0, None)]
    found = prediction_of(setting, saw, 2.0)
    assert (found.attainment, found.by_class, found.tpot) == (0.5, {"chat": 0.5}, None)
    assert found.ttft.p50 == 0.3, "latencies are everybody's"


def test_a_curve_goes_from_light_load_to_overload(setting: Setting) -> None:
    light, heavy = (point_at(setting, Load(split(), rate, 0)) for rate in (2.0, 60.0))
    assert light.attainment == light.late_attainment == 1.0
    assert heavy.late_attainment < heavy.attainment < 0.7, "a queue that grows shows in the second half"
    assert not heavy.decided_early
    assert point_at(setting, Load(split(), 2.0, 0)) == light


def test_curves_replace_the_points_of_the_search(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "SHARES", (0.5, 1.0))
    found = with_curves(setting, alone(), processes=1, time_limit_s=60.0)
    assert found.disaggregated is not None
    points = found.disaggregated.points
    assert [(point.seed, point.rate) for point in points] == [(0, 3.0), (0, 6.0), (1, 3.0), (1, 6.0)]
    assert found.explored[0].points == points


def test_without_time_a_curve_is_what_the_search_saw(setting: Setting) -> None:
    told = []
    found = with_curves(
        setting, result(), processes=1, time_limit_s=-1.0, progress=lambda what, share: told.append(share)
    )
    assert found == result()
    assert told == []
