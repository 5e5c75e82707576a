"""The answer in sentences."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from plan_cases import evaluated, mixed, opt, refused, result, split
from rich.console import Console
from tandem.cluster.planner.result import Evaluation, Fate, Interval, Marginal, PlanResult, RatePoint
from tandem.cluster.planner.setting import setting_of
from tandem.cluster.planner.show import show
from tandem.cluster.planner.verdict import (
    Answer,
    answer_of,
    binding_of,
    cost_of,
    for_rate,
    interval,
    marginal_of,
    verdict,
    why_above,
    without_interval,
)
from tandem.cluster.planner.words import loss_text, number, promises_text, signed, workload_text
from tandem.cluster.types import Role

NOTHING: dict[str, Any] = {"difference": None, "marginal": ()}


def between(low: float, high: float) -> PlanResult:
    return result(difference=Interval(mean=(low + high) / 2, low=low, high=high))


@pytest.mark.parametrize(
    ("found", "answer", "words"),
    [
        (between(0.41, 0.59), Answer.DISAGGREGATE, "Disaggregate: disaggregated has 33 % more goodput per GPU"),
        (between(0.41, 0.59), Answer.DISAGGREGATE, "(95 % interval 27 to 39 %): 2.00 against 1.50 requests/s per GPU."),
        (between(-0.4, -0.2), Answer.COLOCATE, "Do not disaggregate: disaggregated has 20 % less goodput per GPU"),
        (between(-0.4, -0.2), Answer.COLOCATE, "(95 % interval 13 to 27 %)"),
        (between(-0.1, 0.3), Answer.NOT_CLEAR, "Not clear whether to disaggregate: 2.00 against 1.50"),
        (between(-0.1, 0.3), Answer.NOT_CLEAR, "difference +0.100, 95 % interval -0.100 to +0.300, which holds 0."),
        (between(0.0, 0.3), Answer.NOT_CLEAR, "which holds 0"),
        (
            result(disaggregated=None, explored=(refused(split()),), **NOTHING),
            Answer.COLOCATE,
            "Do not disaggregate: no disaggregated plan is possible here (opt-13b does not fit: 80.00 GiB",
        ),
        (
            result(colocated=None, explored=(refused(mixed(), "weights do not fit"),), **NOTHING),
            Answer.DISAGGREGATE,
            "Disaggregate: no colocated plan is possible here (weights do not fit), and the other kind reaches 2.00",
        ),
        (
            result(colocated=replace(evaluated(mixed(), 1.0), goodput=Interval(mean=0, low=0, high=0), why="too slow")),
            Answer.DISAGGREGATE,
            "Disaggregate: the best colocated plan serves nothing (too slow)",
        ),
        (
            result(infeasible="even one unloaded request takes 300 ms", disaggregated=None, colocated=None, **NOTHING),
            Answer.INFEASIBLE,
            "infeasible: even one unloaded request takes 300 ms",
        ),
        (
            result(infeasible="infeasible: even one", disaggregated=None, colocated=None, **NOTHING),
            Answer.INFEASIBLE,
            "infeasible: even one",
        ),
        (
            result(disaggregated=None, colocated=None, explored=(), **NOTHING),
            Answer.INFEASIBLE,
            "infeasible: no placement",
        ),
    ],
)
def test_the_verdict(found: PlanResult, answer: Answer, words: str) -> None:
    assert answer_of(found) is answer
    assert words in verdict(found)
    assert "\n" not in verdict(found)
    assert verdict(found).count("infeasible") <= 1


CUT: dict[str, Any] = {"difference": None, "complete": False}


def cut_short(seeds: int) -> Evaluation:
    whole = evaluated(split(), 6.0)
    return replace(whole, decided=False, seeds=whole.seeds[:seeds])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            result(colocated=None, colocated_decided=False, explored=(), **CUT),
            "disaggregated 2.00 requests/s per GPU; nothing is known of colocated plans.",
        ),
        (
            result(
                colocated=None,
                colocated_decided=False,
                explored=(Evaluation(candidate=mixed(), fate=Fate.ESTIMATED, estimate=4.5),),
                **CUT,
            ),
            "colocated about 1.50 requests/s per GPU by an estimate alone (3 x mixed TP 1, chunks of 512).",
        ),
        (
            result(disaggregated=cut_short(2), disaggregated_decided=False, **CUT),
            "disaggregated at least 2.00 requests/s per GPU (under 2 of 3 seeds); colocated 1.50 requests/s per GPU.",
        ),
        (
            result(disaggregated=None, colocated=None, colocated_decided=False, explored=(), **CUT),
            "no disaggregated plan keeps the promises; nothing is known of colocated plans.",
        ),
        (
            result(disaggregated=replace(cut_short(1), decided=True), disaggregated_decided=False, **CUT),
            "disaggregated 2.00 requests/s per GPU (under 1 of 3 seeds); colocated 1.50 requests/s per GPU.",
        ),
    ],
)
def test_what_there_was_no_time_for_is_not_impossible(found: PlanResult, words: str) -> None:
    assert answer_of(found) is Answer.UNDECIDED
    head = "Undecided: the time limit ended the search before it was known whether to disaggregate. So far: "
    assert verdict(found).startswith(head)
    assert verdict(found).endswith(words)
    assert verdict(replace(found, interrupted=True)).startswith("Undecided: the search was interrupted before")


def test_one_seed_makes_no_interval() -> None:
    one = replace(evaluated(split(), 6.0), seeds=(6.0,), goodput=Interval(mean=6.0, low=6.0, high=6.0))
    found = result(disaggregated=one, difference=Interval(mean=0.5, low=0.5, high=0.5))
    assert answer_of(found) is Answer.NOT_CLEAR
    assert verdict(found) == (
        "Not clear whether to disaggregate: 2.00 against 1.50 requests/s per GPU, both under one seed only, "
        "so without an interval."
    )
    assert interval(one.goodput) == "6.00"


def test_a_rate_that_was_asked_for() -> None:
    kept = replace(evaluated(split(), 6.0), keeps_target_rate=True)
    lost = replace(evaluated(mixed(), 4.5), keeps_target_rate=False)
    found = result(disaggregated=kept, colocated=lost, target_rate=5.0)
    assert for_rate(found) == (
        "5.00 requests/s take 3 GPUs disaggregated (goodput 6.00 (5.70 to 6.30)), "
        "are not kept by 3 GPUs colocated (goodput 4.50 (4.27 to 4.73))."
    )
    assert for_rate(result()) == ""


def test_with_a_rate_to_keep_the_fewer_devices_are_the_answer() -> None:
    wide = replace(evaluated(split(2, 1), 9.0), keeps_target_rate=True)
    narrow = replace(evaluated(mixed(3), 5.5), keeps_target_rate=True)
    found = result(disaggregated=wide, colocated=narrow, target_rate=5.0, difference=Interval(mean=0, low=-1, high=1))
    assert answer_of(found) is Answer.COLOCATE
    assert verdict(found).startswith("Do not disaggregate: 5.00 requests/s take 5 GPUs disaggregated (goodput 9.00")
    lost = replace(found, colocated=replace(narrow, keeps_target_rate=False))
    assert answer_of(lost) is Answer.DISAGGREGATE
    assert "not kept by 3 GPUs colocated" in verdict(lost)
    alike = replace(found, disaggregated=replace(wide, candidate=split(1, 1)))
    assert answer_of(alike) is Answer.NOT_CLEAR, "as many devices: goodput tells"


def test_what_more_workers_bring() -> None:
    more = Marginal(role=Role.PREFILL, gpus=2, goodput=8.2, gain=2.2)
    assert marginal_of(more) == (
        "1 more prefill worker (2 GPUs) brings +2.20 requests/s, +1.10 per added GPU (to 8.20 in all)"
    )
    assert marginal_of(replace(more, gpus=1, gain=0.001)).endswith("(1 GPU) brings nothing that shows")
    assert "-0.500 requests/s" in marginal_of(replace(more, gain=-0.5))


def test_what_binds_and_what_it_costs() -> None:
    one = evaluated(split(), 6.0)
    assert binding_of(one) == "TTFT of chat, in 83 % of what misses"
    assert binding_of(replace(one, binding=None)) == ""
    held = replace(one, bound=6.0, seeds=(6.0, 6.0))
    assert binding_of(held) == "what it computes at most, under every seed"
    assert binding_of(replace(held, seeds=(6.0, 5.9))) == binding_of(one)
    assert binding_of(replace(held, seeds=(6.0,))) == binding_of(one)
    hourly = 3 * 2.0  # GPUs times price
    tokens_per_hour = 6.0 * (512 + 64) * 3600
    assert cost_of(one, result(), 2.0) == pytest.approx(hourly / tokens_per_hour * 1e6)
    kept = replace(one, keeps_target_rate=True)
    assert cost_of(kept, result(target_rate=3.0), 2.0) == pytest.approx(2 * cost_of(one, result(), 2.0))
    assert cost_of(replace(kept, keeps_target_rate=False), result(target_rate=9.0), 2.0) == cost_of(one, result(), 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.5, "1.50"),
        (0.01234, "0.0123"),
        (123.4, "123"),
        (54321.0, "54321"),
        (2e7, "2e+07"),
        (1e-6, "1e-06"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
    assert signed(-value) == (f"-{text}" if value else "+0")
    assert number(float("inf")) == "-"


def test_a_workload_in_words() -> None:
    assert workload_text(opt()) == "512 tokens in, 64 out; arrivals poisson"
    varied = opt(workload__range_ratio=0.3, workload__arrivals="gamma", workload__burstiness=0.5)
    assert workload_text(varied) == "512 tokens in, 64 out +-30 %; arrivals gamma with burstiness 0.5"
    classes = {"chat": {"share": 0.75, "ttft_s": 0.25, "tpot_s": 0.1}, "batch": {"share": 0.25}}
    assert promises_text(opt(workload__slo_classes=classes)) == (
        "chat (75 %): TTFT 250 ms and TPOT 100 ms; batch (25 %): nothing promised; 90 % of each class"
    )


def test_what_a_file_lost_to_the_context_is_said(tmp_path: Path) -> None:
    (tmp_path / "pool.csv").write_text("arrival_s,input_tokens,output_tokens\n,100,20\n,9000,5\n,700,3\n")
    file = str(tmp_path / "pool.csv")
    problem = opt(workload__lengths=file, workload__input_tokens=None, workload__output_tokens=None)
    assert loss_text(setting_of(problem)) == "; 1 of 3 requests are left out: over the caps or the context of 2,048"
    capped = replace(problem, workload=replace(problem.workload, max_input_tokens=500))
    assert loss_text(setting_of(capped)) == "; 2 are shortened to the caps"
    assert loss_text(setting_of(opt())) == ""


def test_more_than_must_keep_their_promises_at_goodput_for_a_reason() -> None:
    """Goodput is the highest rate at the target: whoever sees more of them kept is told why."""
    plain = evaluated(split(), 6.0)
    assert plain.prediction is not None
    assert why_above(plain, 0.9) == "", "91.2 % are 90"
    many = replace(plain, prediction=replace(plain.prediction, attainment=0.978, by_class={"chat": 0.978}))
    head = "More than 90 % keep the promises near the goodput of disaggregated: "
    steep = RatePoint(rate=6.4, seed=0, attainment=0.5, late_attainment=0.4, requests=500)
    kept = RatePoint(rate=6.0, seed=0, attainment=0.978, late_attainment=0.97, requests=500)
    assert why_above(replace(many, points=(kept, steep)), 0.9) == (
        f"{head}the next rate that was tried, 6.40, is kept by 40.0 %."
    )
    cut = replace(steep, decided_early=True)
    assert why_above(replace(many, points=(kept, cut)), 0.9).endswith("6.40, is kept by at most 40.0 %.")
    late = replace(kept, late_attainment=0.9)
    assert why_above(replace(many, points=(late, steep)), 0.9).endswith(
        "in the second half of a run fewer do, and goodput is what lasts."
    )
    held = replace(many, bound=6.0)
    assert why_above(held, 0.9) == f"{head}it computes no more under 2 of 3 seeds."
    assert binding_of(replace(held, binding=None)) == "what it computes at most, under 2 of 3 seeds"
    assert binding_of(replace(held, binding=None, seeds=(6.0,))).endswith("under the one seed that was run")
    assert why_above(replace(many, bound=5.0), 0.9) == "", "told as a goodput without an interval"
    assert why_above(replace(held, piles_up=True), 0.9).endswith("is left over, and no promise tells yet.")
    slower = replace(many, prediction=replace(many.prediction, rate=5.8))
    assert why_above(slower, 0.9) == f"{head}they are seen at 5.80 requests/s."


def test_an_interval_never_looks_like_a_point() -> None:
    near = Interval(mean=0.5, low=0.4995, high=0.5005)
    assert "95 % interval 33.3 to 33.4 %" in verdict(result(difference=near))
    assert interval(Interval(mean=1.6, low=1.5999, high=1.6001)) == "1.60"


def test_a_goodput_that_capacity_holds_down_has_no_interval_and_says_so() -> None:
    colocated = evaluated(mixed(), 4.5, spread=0.0, bound=4.5)
    one = result(colocated=colocated)
    assert without_interval(result()) == ""
    assert without_interval(one) == (
        "Goodput of colocated is what it computes at most, under every seed: it has no interval, and the difference "
        "that of the other kind alone."
    )
    assert "(95 % interval 27 to 39 %)" in verdict(one)
    both = result(
        disaggregated=evaluated(split(), 6.0, spread=0.0, bound=6.0),
        colocated=colocated,
        difference=Interval(mean=0.5, low=0.5, high=0.5),
    )
    assert "33 % more goodput per GPU than colocated (both are what these compute at most, so without an interval)" in (
        verdict(both)
    )
    assert without_interval(both).startswith("Goodput of disaggregated and colocated is what it computes at most")
    console = Console(record=True, width=160, file=StringIO())
    show(console, opt(), setting_of(opt()), one)
    text = console.export_text()
    assert "4.50, its capacity" in text
    assert "it has no interval" in text
