"""An overload must show in what a plan reports, and a loose promise hides it longest."""

from __future__ import annotations

import pytest
from plan_cases import opt
from tandem.cluster.planner import setting as setting_module
from tandem.cluster.planner.search import plan
from tandem.cluster.planner.setting import LASTING_REQUESTS, UNSEEN, Setting, setting_of
from tandem.cluster.planner.trial import Trial, piles_up
from tandem.cluster.sim.request import Asked, Outcome


def promised(ttft_s: float | None, tpot_s: float | None) -> Setting:
    return setting_of(opt(workload__slo_classes={"chat": {"ttft_s": ttft_s, "tpot_s": tpot_s}}))


def left_over_s(setting: Setting, rate: float) -> float:
    """How long the last request waits where the share UNSEEN of the load is left over in a run that is reported."""
    return UNSEEN * setting.lasting_requests(rate) / rate


def test_tight_promises_need_no_longer_runs_than_a_comparison() -> None:
    setting = promised(0.25, 0.1)
    assert setting.lasting_requests(12.0) == setting.run_requests(12.0)
    assert left_over_s(setting, 12.0) > 0.25


@pytest.mark.parametrize("ttft_s", [2.0, 5.0, 20.0])
def test_a_run_that_is_reported_lasts_until_a_small_overload_breaks_a_loose_promise(ttft_s: float) -> None:
    setting = promised(ttft_s, 0.1)
    assert setting.lasting_requests(6.0) > setting.run_requests(6.0)
    assert left_over_s(setting, 6.0) > ttft_s
    assert setting.unseen(6.0) == pytest.approx(UNSEEN, rel=0.01)


def test_slow_answers_are_waited_for_even_where_first_tokens_are_promised_soon() -> None:
    setting = promised(0.5, 1.0)
    assert setting.lasting_requests(12.0) / 12.0 > 64  # seconds: of an answer of 64 tokens


def test_a_run_has_an_end_and_what_it_cannot_show_is_known() -> None:
    setting = promised(60.0, 1.0)
    assert setting.lasting_requests(20.0) == LASTING_REQUESTS
    assert setting.unseen(20.0) > 10 * UNSEEN
    assert promised(None, 0.1).unseen(20.0) == 0.0


def test_what_is_reported_was_simulated_for_long_and_says_what_that_cannot_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"MIN_REQUESTS": 20, "MAX_REQUESTS": 30, "LASTING_REQUESTS": 120}.items():
        monkeypatch.setattr(setting_module, name, value)
    loose = opt(
        gpus_per_node=2,
        search__seeds=2,
        search__processes=1,
        search__max_pipeline_stages=1,
        search__max_tensor_parallel=1,
        workload__input_tokens=256,
        workload__output_tokens=16,
        workload__slo_classes={"chat": {"ttft_s": 5.0, "tpot_s": 0.5}},
    )
    result = plan(loose)
    for best in (result.disaggregated, result.colocated):
        assert best is not None
        assert max(point.requests for point in best.points if not point.decided_early) == 120
    assert max(point.requests for one in result.explored for point in one.points) == 120
    assert any("show an overload only from" in note for note in result.notes)


def served(rate: float, capacity: float, count: int, takes_s: float) -> list[Outcome]:
    """Evenly arriving requests at a server that ends one every 1 / capacity seconds."""
    outcomes, free_s = [], 0.0
    for number in range(count):
        at_s = number / rate
        free_s = max(free_s, at_s) + 1 / capacity
        asked = Asked(request_id=str(number), arrival_s=at_s, prompt_token_ids=(1,), output_tokens=2)
        ended_s = free_s + takes_s
        outcomes.append(Outcome(asked=asked, first_token_s=free_s, last_token_s=ended_s, output_tokens=2))
    return outcomes


@pytest.mark.parametrize("takes_s", [0.0, 5.0])
def test_more_and_more_under_way_is_seen_before_a_promise_tells(takes_s: float) -> None:
    assert piles_up(served(11.0, 10.0, 2000, takes_s))
    assert not piles_up(served(9.0, 10.0, 2000, takes_s))


def test_few_more_are_chance() -> None:
    assert not piles_up(served(10.2, 10.0, 1000, 10.0))


def test_a_rate_at_which_load_piles_up_is_not_kept() -> None:
    kept = Trial(rate=1.0, seed=0, requests=9, attainment=1.0, late_attainment=1.0)
    piling = Trial(rate=1.0, seed=0, requests=9, attainment=1.0, late_attainment=1.0, piles_up=True)
    assert kept.score == 1.0
    assert not kept.one_sided
    assert piling.score == 0.0
    assert piling.one_sided
