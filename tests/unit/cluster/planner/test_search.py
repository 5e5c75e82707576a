"""The whole search on small problems: what it answers at the edges, and that better means never worse."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_cases import evaluated, mixed, opt, split
from tandem.cluster.planner import setting as setting_module
from tandem.cluster.planner.crew import Crew
from tandem.cluster.planner.evidence import Evidence
from tandem.cluster.planner.finals import Finals
from tandem.cluster.planner.goodput import interval
from tandem.cluster.planner.result import Candidate, Fate, Interval, PlanResult
from tandem.cluster.planner.search import plan
from tandem.cluster.planner.setting import setting_of
from tandem.cluster.planner.verdict import Answer, answer_of, verdict
from tandem.cluster.types import Role

NOISE = 0.2
"""Of the goodput of runs as short as these, of which one seed says twice what another does: of all cases below the
worst falls by 0.1.
"""

PLANNED: dict[str, PlanResult] = {}
"""By problem: several tests ask the same."""


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting_module, "MIN_REQUESTS", 30)
    monkeypatch.setattr(setting_module, "MAX_REQUESTS", 50)
    monkeypatch.setattr(setting_module, "LASTING_REQUESTS", 50)


def planned(
    ttft_s: float = 0.25, tpot_s: float = 0.05, prompt: int = 256, answer: int = 16, **changes: Any
) -> PlanResult:
    small = {
        "search__seeds": 2,
        "search__processes": 1,
        "search__max_pipeline_stages": 1,
        "search__max_tensor_parallel": 2,
        "gpus_per_node": 2,
        "workload__input_tokens": prompt,
        "workload__output_tokens": answer,
        "workload__range_ratio": 0.3,
        "workload__slo_classes": {"chat": {"ttft_s": ttft_s, "tpot_s": tpot_s}},
    }
    problem = opt(**small | changes)
    key = repr(problem)
    if key not in PLANNED:
        PLANNED[key] = plan(problem)
    return PLANNED[key]


def best_of(result: PlanResult) -> float:
    return result.best.goodput_per_gpu if result.best is not None else 0.0


def test_both_sides_are_answered_under_all_seeds() -> None:
    said: list[tuple[str, float]] = []
    small = opt(
        gpus_per_node=2,
        search__seeds=2,
        search__processes=1,
        search__max_pipeline_stages=1,
        workload__input_tokens=256,
        workload__output_tokens=16,
    )
    result = plan(small, lambda what, share: said.append((what, share)))
    assert result.disaggregated is not None
    assert result.colocated is not None
    assert result.difference is not None
    for side in (result.disaggregated, result.colocated):
        assert side.fate is Fate.SIMULATED
        assert len(side.seeds) == 2
        assert side.goodput.low <= side.goodput.mean <= min(side.goodput.high, side.bound)
        assert {point.seed for point in side.points} == {0, 1}
    assert result.colocated.candidate.gpus <= result.disaggregated.candidate.gpus
    assert {one.role for one in result.marginal} <= set(Role)
    assert result.marginal
    assert said[-1] == ("done", 1.0)
    assert [share for _, share in said] == sorted(share for _, share in said)


def test_the_same_problem_has_the_same_answer() -> None:
    one = planned()
    PLANNED.clear()
    other = planned()
    assert one.explored == tuple(
        type(two)(**{name: getattr(two, name) for name in two.__slots__} | {"simulated_s": mine.simulated_s})
        for mine, two in zip(one.explored, other.explored, strict=True)
    )


def test_one_gpu_is_colocated() -> None:
    result = planned(gpus_per_node=1)
    assert result.disaggregated is None
    assert result.colocated is not None
    assert any("only colocated is possible" in note for note in result.notes)


def test_a_promise_that_nobody_can_keep_is_infeasible_and_says_why() -> None:
    result = planned(ttft_s=0.01)
    assert result.best is None
    assert result.infeasible.startswith("even one unloaded request takes ")
    assert {one.fate for one in result.explored} == {Fate.HOPELESS}


def test_of_two_promises_that_nobody_keeps_the_one_in_the_way_is_told() -> None:
    result = planned(workload__slo_classes={"chat": {"ttft_s": 0.001, "tpot_s": 0.0095}})
    assert "to its first token" in result.infeasible, "a TPOT that is missed by little is not what stands in the way"


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    result = planned(model="opt-175b")
    assert result.best is None
    assert "no split fits: opt-175b" in result.infeasible
    assert "GiB" in result.infeasible


APART: dict[str, Any] = {"nodes": 2, "gpus_per_node": 1, "search__max_tensor_parallel": 1}
"""Two devices with a network between them."""
TIGHT: dict[str, Any] = {**APART, "prompt": 512, "answer": 32, "ttft_s": 0.4, "tpot_s": 0.025}
"""Where a prompt beside decode rows costs their promise."""
NO_BANDWIDTH = {"bandwidth_gb_s": 1e-6}


def test_with_infinite_bandwidth_phases_apart_win_where_they_disturb_each_other() -> None:
    result = planned(**TIGHT, inter_node="instant")
    assert result.disaggregated is not None
    assert result.colocated is not None
    assert result.disaggregated.goodput.mean > 1.5 * result.colocated.goodput.mean


@pytest.mark.parametrize("link", ["1Gbps", NO_BANDWIDTH], ids=["hardly any", "none"])
def test_without_bandwidth_colocated_wins(link: Any) -> None:
    result = planned(**TIGHT, inter_node=link)
    assert answer_of(result) is Answer.COLOCATE
    assert best_of(result) > 0.0
    assert "as the KV of a prompt takes " in verdict(result)


def test_prompts_with_one_token_need_neither_decode_nor_bandwidth() -> None:
    """A worker of a pool of its own for decode idles: two mixed ones serve twice as much."""
    one_token: dict[str, Any] = {**APART, "prompt": 1024, "answer": 1, "ttft_s": 0.5, "workload__range_ratio": 0.0}
    result = planned(**one_token, inter_node=NO_BANDWIDTH)
    apart, together = result.disaggregated, result.colocated
    assert apart is not None
    assert together is not None
    assert apart.binding is not None
    assert apart.binding.promise == "ttft"
    assert answer_of(result) is Answer.COLOCATE
    assert together.goodput.mean == pytest.approx(2.0 * apart.goodput.mean, rel=0.3)
    linked = planned(**one_token, inter_node="instant").disaggregated
    assert linked is not None
    assert linked.goodput == apart.goodput, "nothing is handed over"


def test_long_answers_are_bound_by_their_tokens() -> None:
    """Of three devices two decode; and rows as many as keep their promise on TPOT is what they compute at most."""
    result = planned(prompt=16, answer=200, tpot_s=0.03, gpus_per_node=3, search__max_tensor_parallel=1)
    apart = result.disaggregated
    assert apart is not None
    decode = apart.candidate.pool(Role.DECODE)
    assert decode is not None
    assert decode.gpus == 2
    assert apart.at_bound or (apart.binding is not None and apart.binding.promise == "tpot")
    assert answer_of(result) is Answer.COLOCATE, "a device for 16 tokens of prompt is a device for nothing"


def test_a_rate_that_is_wanted_is_kept_with_as_few_gpus_as_do() -> None:
    free = planned()
    assert free.best is not None
    result = planned(rate=0.3 * free.best.goodput.mean)
    assert result.best is not None
    assert result.best.keeps_target_rate
    assert result.best.candidate.gpus <= 2


def test_one_mixed_worker_is_enough_for_a_trickle() -> None:
    """The colocated side is not held to the two devices that splitting takes at least."""
    result = planned(rate=0.01)
    assert result.disaggregated is not None
    assert result.colocated is not None
    assert (result.disaggregated.candidate.gpus, result.colocated.candidate.gpus) == (2, 1)
    assert answer_of(result) is Answer.COLOCATE


def test_what_there_is_no_time_for_is_undecided() -> None:
    result = planned(search__time_limit_s=1e-6)
    assert not result.complete
    assert not result.interrupted
    assert not result.disaggregated_decided
    assert not result.colocated_decided
    assert result.infeasible == ""
    assert result.best is None
    assert result.simulated_requests == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_it_with_the_best_so_far(number: signal.Signals, processes: int) -> None:
    before = signal.getsignal(number)
    small = opt(gpus_per_node=2, search__processes=processes, search__max_pipeline_stages=1)
    sent: list[str] = []

    def on_progress(what: str, share: float) -> None:
        if what == "all seeds" and not sent:
            sent.append(what)
            os.kill(os.getpid(), number)

    result = plan(small, on_progress)
    assert sent
    assert result.interrupted
    assert not result.complete
    assert not result.decided
    assert result.best is not None
    assert result.best.fate is Fate.SCREENED
    assert multiprocessing.active_children() == []
    assert signal.getsignal(number) is before


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    promise=st.fixed_dictionaries(
        {"ttft_s": st.sampled_from([0.1, 0.2, 0.4]), "tpot_s": st.sampled_from([0.025, 0.05])}
    ),
    prompt=st.sampled_from([128, 512]),
    better=st.sampled_from([{"ttft_s": 0.8}, {"tpot_s": 0.2}, {"inter_node": "400Gbps"}, {"nodes": 3}]),
)
def test_a_looser_promise_faster_links_or_more_gpus_never_lower_goodput(
    promise: dict[str, float], prompt: int, better: dict[str, Any]
) -> None:
    before: dict[str, Any] = {**APART, "inter_node": "10Gbps", "answer": 32, "prompt": prompt, **promise}
    assert best_of(planned(**before | better)) >= (1.0 - NOISE) * best_of(planned(**before))


def test_who_was_clearly_better_under_the_first_seed_is_simulated_under_all() -> None:
    """Estimates chose who is; the runner-up of a plan must not stand above it for want of a look."""
    setting = setting_of(opt())
    evidence = Evidence(setting, Crew(setting, 1, math.inf), lambda what, share: None)
    finals, explored = Finals(evidence), evidence.explored
    best = evaluated(mixed(), 6.0)

    def seen(chunk: int, first: float) -> Candidate:
        one = replace(best, candidate=mixed(chunk=chunk), fate=Fate.SCREENED, seeds=(first,))
        explored[one.candidate] = replace(one, goodput=interval(one.seeds))
        return one.candidate

    assert finals._challenger(best) is None
    seen(1024, 6.2)
    assert finals._challenger(best) is None, "within what one seed says"
    better, explored[split()] = seen(2048, 6.6), replace(evaluated(split(), 9.0), fate=Fate.SCREENED)
    assert finals._challenger(best) == better, "of the same kind"
    lucky = replace(best, seeds=(6.5, 5.8, 5.7))
    assert finals._challenger(lucky) is None, "the first seed was kind to both"


def test_a_rate_that_only_the_first_seed_kept_is_looked_for_with_more_devices() -> None:
    setting = setting_of(opt(rate=6.0))
    evidence = Evidence(setting, Crew(setting, 1, math.inf), lambda what, share: None)
    finals, explored = Finals(evidence), evidence.explored
    best = replace(evaluated(mixed(2), 5.7), estimate=6.1, keeps_target_rate=False)
    explored[best.candidate] = best

    def estimated(count: int, rate: float, fate: Fate) -> Candidate:
        none = Interval(mean=0.0, low=0.0, high=0.0)
        one = replace(best, candidate=mixed(count), fate=fate, estimate=rate, goodput=none, seeds=())
        explored[one.candidate] = one
        return one.candidate

    estimated(1, 9.0, Fate.ESTIMATED)
    assert finals._challenger(best) is None, "fewer devices were worth a look before"
    estimated(3, 6.2, Fate.ESTIMATED)
    assert finals._challenger(best) is None, "where 6.1 came to 5.7, 6.2 is not enough"
    larger = estimated(4, 9.0, Fate.BOUNDED)
    assert finals._challenger(best) == larger
    explored[larger] = replace(explored[larger], fate=Fate.SIMULATED)
    assert finals._challenger(best) is None, "it was tried"
