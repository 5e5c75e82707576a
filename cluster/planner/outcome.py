"""What a search says of what it looked at: in which order, whether a side is decided, and why nothing serves. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..types import Role
from .outlook import Hopeless
from .phases import Phases
from .result import Affinity, Evaluation, Fate
from .setting import LASTING_REQUESTS, UNSEEN

_ORDER = (Fate.SIMULATED, Fate.SCREENED, Fate.ESTIMATED, Fate.BOUNDED, Fate.HOPELESS, Fate.REFUSED)
NOTED = 1.1
"""Above so many times what is meant to stay unseen, a reader is told."""


def in_order(explored: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """Those of which most is known first, and of alike ones the better."""

    def place(one: Evaluation) -> tuple[float, ...]:
        return (_ORDER.index(one.fate), -one.goodput_per_gpu, -one.estimate / one.candidate.gpus)

    return tuple(sorted(explored, key=place))


def decided(
    explored: Iterable[Evaluation], *, disaggregated: bool, best: Evaluation | None, in_time: bool, gpus: int
) -> bool:
    """Whether more time would not have told more of that side, of which `best` is the best."""
    if in_time or best is not None:
        return best is None or best.fate is Fate.SIMULATED
    own = [one for one in explored if one.candidate.disaggregated is disaggregated]
    ruled_out = all(one.fate in (Fate.REFUSED, Fate.HOPELESS) for one in own)
    return ruled_out and (bool(own) or gpus == 1)


def why_infeasible(explored: Collection[Evaluation], phases: Phases) -> str:
    """The promise that stands in the way, or the memory that is missing."""
    if phases.hopeless:
        return _nearest_miss(phases).text
    refused = [one.why for one in explored if one.fate is Fate.REFUSED] or phases.refused
    if refused and all(one.fate is Fate.REFUSED for one in explored):
        return f"no split fits: {refused[-1]}"
    return "no rate that was tried keeps the promises of enough requests with any placement"


def _nearest_miss(phases: Phases) -> Hopeless:
    """What stands in the way of the kind of plan that comes nearest: of a phase, its best split; of both phases, the
    one that misses by more.
    """
    least: dict[Role, Hopeless] = {}
    for one in sorted(phases.hopeless, key=lambda one: one.excess):
        least.setdefault(one.role, one)
    able = {one.role for one in phases.results.values() if one.fate not in (Fate.REFUSED, Fate.HOPELESS)}
    missed = [one for role, one in least.items() if role not in (Role.MIXED, *able)]
    kinds = [max(missed, key=lambda one: one.excess)] if missed else []
    kinds += [least[Role.MIXED]] if Role.MIXED in least else []
    return min(kinds or phases.hopeless, key=lambda one: one.excess)


def notes(explored: Iterable[Evaluation], gpus: int, unseen: float) -> tuple[str, ...]:
    """What a reader should know beside the figures. `unseen`: `Setting.unseen` at the best plan's goodput."""
    found = []
    if gpus == 1:
        found.append("one GPU holds no two workers: only colocated is possible")
    if any(one.candidate.affinity is Affinity.LOW and one.candidate.cells > 1 for one in explored):
        found.append("cells hand off inside themselves only: each has its own router, and an even share of the load")
    if unseen > NOTED * UNSEEN:
        found.append(
            f"Promises this loose show an overload only from {unseen:.0%} on in runs of {LASTING_REQUESTS} requests: "
            "goodput may be as much too high."
        )
    return tuple(found)
