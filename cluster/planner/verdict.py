"""What a search's result comes to in sentences: disaggregate or not, by how much, what binds, what more devices bring.

Pure text of numbers that stand in the `PlanResult`. The same words go to the terminal, the report and the plan's file.
"""

from __future__ import annotations

import math
from enum import StrEnum

from .result import Evaluation, Fate, Interval, Marginal, PlanResult, RatePoint
from .words import gpus, number, signed

MIN_PAIRS = 2
"""Seeds under which both were simulated, for an interval."""
NOISE = 0.02
"""Of attainment: what no reason is given for."""
NEAR = 0.02
"""How far from goodput a rate is, as a share of it, and still taken for it."""
MOST_DIGITS = 3
_UNITS = "requests/s per GPU"


class Answer(StrEnum):
    """Whether to disaggregate."""

    DISAGGREGATE = "disaggregate"
    COLOCATE = "do not disaggregate"
    NOT_CLEAR = "not clear"
    INFEASIBLE = "infeasible"
    UNDECIDED = "undecided"


def answer_of(result: PlanResult) -> Answer:
    """Not clear where the interval of the difference holds 0, or one seed makes none; undecided where the search ended
    before both kinds were looked at as it would.
    """
    if result.infeasible:
        return Answer.INFEASIBLE
    if not result.decided:
        return Answer.UNDECIDED
    if result.best is None:
        return Answer.INFEASIBLE
    if not _serves(result.disaggregated):
        return Answer.COLOCATE
    if not _serves(result.colocated):
        return Answer.DISAGGREGATE
    if cheaper := _cheaper(result):
        return Answer.DISAGGREGATE if cheaper.candidate.disaggregated else Answer.COLOCATE
    if _pairs(result) < MIN_PAIRS or result.difference is None:
        return Answer.NOT_CLEAR
    if result.difference.low <= 0.0 <= result.difference.high:
        return Answer.NOT_CLEAR
    return Answer.DISAGGREGATE if result.difference.low > 0.0 else Answer.COLOCATE


def verdict(result: PlanResult) -> str:
    """One plain sentence."""
    answer = answer_of(result)
    if answer is Answer.INFEASIBLE:
        why = result.infeasible or "no placement that was looked at keeps the promises at any rate"
        return why if why.startswith("infeasible") else f"infeasible: {why}"
    split, mixed = result.disaggregated, result.colocated
    if answer is Answer.UNDECIDED:
        kinds = "; ".join(so_far(result, disaggregated) for disaggregated in (True, False))
        return f"Undecided: {_ended(result)} before it was known whether to disaggregate. So far: {kinds}."
    if not _serves(split):
        return f"Do not disaggregate: {_why_not(split, 'disaggregated', result)}."
    if not _serves(mixed):
        return f"Disaggregate: {_why_not(mixed, 'colocated', result)}."
    assert split is not None  # _serves
    assert mixed is not None
    if cheaper := _cheaper(result):
        head = "Disaggregate" if cheaper is split else "Do not disaggregate"
        return f"{head}: {for_rate(result)}"
    sides = f"{number(split.goodput_per_gpu)} against {number(mixed.goodput_per_gpu)} {_UNITS}"
    difference = result.difference
    if difference is None or _pairs(result) < MIN_PAIRS:
        return f"Not clear whether to disaggregate: {sides}, both under one seed only, so without an interval."
    span = f"difference {signed(difference.mean)}, 95 % interval {signed(difference.low)} to {signed(difference.high)}"
    if answer is Answer.NOT_CLEAR:
        return f"Not clear whether to disaggregate: {sides}; {span}, which holds 0."
    base = mixed.goodput_per_gpu
    by = f"{abs(difference.mean) / base * 100:.0f} % {'more' if difference.mean > 0 else 'less'} goodput per GPU"
    shares = sorted(abs(edge) / base * 100 for edge in (difference.low, difference.high))
    head = "Disaggregate" if answer is Answer.DISAGGREGATE else "Do not disaggregate"
    span = f"95 % interval {_range(*shares)} %"
    if split.at_bound and mixed.at_bound:
        span = "both are what these compute at most, so without an interval"
    return f"{head}: disaggregated has {by} than colocated ({span}): {sides}."


def without_interval(result: PlanResult) -> str:
    """Which goodput has no interval, and what that makes of the difference's; empty: all have."""
    held = [one for one in (result.disaggregated, result.colocated) if one is not None and one.at_bound]
    if not held:
        return ""
    names = " and ".join(one.candidate.kind for one in held)
    text = f"Goodput of {names} is what it computes at most, under every seed: it has no interval"
    if result.difference is None:
        return f"{text}."
    return f"{text}, and the difference {'none either' if len(held) > 1 else 'that of the other kind alone'}."


def why_above(one: Evaluation, target: float) -> str:
    """Why more than the target keep their promises near goodput, which is the highest rate at which so many do; empty:
    no more do, but for noise, or it is told elsewhere.
    """
    seen, goodput = one.prediction, one.goodput.mean
    if seen is None or one.at_bound or min(seen.by_class.values(), default=0.0) <= target + NOISE:
        return ""
    near = [point for point in one.points if abs(point.rate / goodput - 1.0) <= NEAR and not point.decided_early]
    above = [point for point in one.points if point.rate > goodput and min(_halves(point)) < target]
    if seen.rate < (1.0 - NEAR) * goodput:
        why = f"they are seen at {number(seen.rate)} requests/s"
    elif one.piles_up:
        why = "above, more and more is left over, and no promise tells yet"
    elif held := _held(one):
        why = f"it computes no more under {held} of {len(one.seeds)} seeds"
    elif near and sum(late - whole for whole, late in map(_halves, near)) < -NOISE * len(near):
        why = "in the second half of a run fewer do, and goodput is what lasts"
    elif above:
        point = min(above, key=lambda one: one.rate)
        most = "at most " if point.decided_early else ""
        why = f"the next rate that was tried, {number(point.rate)}, is kept by {most}{min(_halves(point)) * 100:.1f} %"
    else:
        return ""
    name = one.candidate.kind
    return f"More than {target * 100:g} % keep the promises near the goodput of {name}: {why}."


def _halves(point: RatePoint) -> tuple[float, float]:
    """Attainment of the whole run and of its second half."""
    return point.attainment, point.late_attainment


def _held(one: Evaluation) -> int:
    """Under how many seeds what it computes at most holds it down."""
    return sum(goodput >= one.bound > 0.0 for goodput in one.seeds)


def _range(low: float, high: float) -> str:
    """`19 to 37`, with as many digits as tell them apart."""
    digits = next((digits for digits in range(MOST_DIGITS) if f"{low:.{digits}f}" != f"{high:.{digits}f}"), MOST_DIGITS)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def for_rate(result: PlanResult) -> str:
    """What the rate that was asked for takes; empty where none was."""
    if result.target_rate is None or result.best is None:
        return ""
    kept: list[str] = []
    missed: list[str] = []
    for name, one in (("disaggregated", result.disaggregated), ("colocated", result.colocated)):
        if one is not None and _serves(one):
            side = kept if one.keeps_target_rate else missed
            side.append(f"{gpus(one.candidate.gpus)} {name} (goodput {interval(one.goodput)})")
    parts = [f"take {', '.join(kept)}"] if kept else []
    parts += [f"are not kept by {', '.join(missed)}"] if missed else []
    return f"{number(result.target_rate)} requests/s {', '.join(parts)}."


def _cheaper(result: PlanResult) -> Evaluation | None:
    """Whichever kind keeps the rate that was asked for where the other does not, or with fewer devices; None: neither,
    and goodput tells.
    """
    split, mixed = result.disaggregated, result.colocated
    if result.target_rate is None or split is None or mixed is None:
        return None
    costs = {
        one.candidate.disaggregated: one.candidate.gpus if one.keeps_target_rate else math.inf for one in (split, mixed)
    }
    if costs[True] == costs[False]:
        return None
    return split if costs[True] < costs[False] else mixed


def binding_of(one: Evaluation) -> str:
    """`TTFT of chat, in 83 % of what misses`, or that it computes no more (at most, or as seen); empty: unknown."""
    if one.at_bound:
        return "what it computes at most, under every seed"
    if one.piles_up:
        return "what it computes: above, more and more is left over"
    if one.binding is None:
        held = _held(one)
        seeds = f"{held} of {len(one.seeds)} seeds" if len(one.seeds) > 1 else "the one seed that was run"
        return f"what it computes at most, under {seeds}" if held else ""
    return (
        f"{one.binding.promise.upper()} of {one.binding.slo_class}, in {one.binding.share * 100:.0f} % of what misses"
    )


def marginal_of(one: Marginal) -> str:
    """What one more worker of a role brings."""
    more = f"1 more {one.role.value} worker ({gpus(one.gpus)})"
    if abs(one.gain) < 0.005 * max(one.goodput, 1e-9):
        return f"{more} brings nothing that shows"
    return (
        f"{more} brings {signed(one.gain)} requests/s, {signed(one.gain_per_gpu)} per added GPU "
        f"(to {number(one.goodput)} in all)"
    )


def cost_of(one: Evaluation, result: PlanResult, price_per_gpu_hour: float) -> float:
    """Of a million tokens, prompt and answer counted alike, at the rate that was asked for if it is kept, else at
    goodput; inf where nothing is served.
    """
    rate = result.target_rate if result.target_rate is not None and one.keeps_target_rate else 0.0
    tokens = result.input_tokens + result.output_tokens
    return one.cost_per_million_tokens(price_per_gpu_hour, tokens, rate)


def interval(found: Interval, scale: float = 1.0) -> str:
    """`1.60 (1.52 to 1.68)`; of one seed, and where it is narrower than the digits, the mean alone."""
    if number(found.low * scale) == number(found.high * scale):
        return number(found.mean * scale)
    return f"{number(found.mean * scale)} ({number(found.low * scale)} to {number(found.high * scale)})"


def so_far(result: PlanResult, disaggregated: bool) -> str:
    """What is known of one kind: what was simulated, else what was estimated."""
    name = "disaggregated" if disaggregated else "colocated"
    one = result.disaggregated if disaggregated else result.colocated
    decided = result.disaggregated_decided if disaggregated else result.colocated_decided
    if one is not None and _serves(one):
        least = "" if one.decided else "at least "
        seeds = "" if decided else f" (under {len(one.seeds)} of {len(result.seeds)} seeds)"
        return f"{name} {least}{number(one.goodput_per_gpu)} {_UNITS}{seeds}"
    if decided:
        return f"no {name} plan keeps the promises"
    likely = result.likely(disaggregated)
    if likely is None:
        return f"nothing is known of {name} plans"
    guess = number(likely.estimate / likely.candidate.gpus)
    return f"{name} about {guess} {_UNITS} by an estimate alone ({likely.candidate.label})"


def _ended(result: PlanResult) -> str:
    return "the search was interrupted" if result.interrupted else "the time limit ended the search"


def _pairs(result: PlanResult) -> int:
    """Seeds under which both best plans were simulated."""
    both = result.disaggregated, result.colocated
    return min(len(one.seeds) if one is not None else 0 for one in both)


def _serves(one: Evaluation | None) -> bool:
    return one is not None and one.goodput.mean > 0.0


def _why_not(one: Evaluation | None, name: str, result: PlanResult) -> str:
    """Why there is only the other kind, and what that reaches."""
    other = result.colocated if name == "disaggregated" else result.disaggregated
    reached = "" if other is None else f", and the other kind reaches {number(other.goodput_per_gpu)} {_UNITS}"
    if one is not None:
        reason = one.why or "it keeps the promises at no rate"
        return f"the best {name} plan serves nothing ({reason}){reached}"
    wanted = [look for look in result.explored if look.candidate.disaggregated == (name == "disaggregated")]
    reason = f" ({wanted[0].why})" if wanted and wanted[0].why else ""
    able = "keeps the promises" if wanted and wanted[0].fate is Fate.ESTIMATED else "is possible here"
    return f"no {name} plan {able}{reason}{reached}"
