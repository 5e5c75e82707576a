"""What share of its requests a router keeps its promises to, of late, and whether its plan predicted that. Pure: time
is passed in.

Attainment means what it means to the benchmark client (`cluster.workload.report.attains`) and to the simulator
(`Outcome.attains`): of all requests that came under a promise, the share that kept TTFT and TPOT, jointly; one that was
refused or failed kept neither, and an answer of one token has no TPOT to break. A request of several choices is kept
where each of them is. A client that went away is not counted, unless its first token was overdue by then; neither is a
request without any promise, nor one that was malformed.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..cluster.config import PlanConfig
from ..cluster.events import RequestOutcome
from .slo_classes import Promise

WINDOW_S = 300.0
SLICES = 30
"""The window moves on by one of them at a time."""
ALL = ""
"""Stands for all classes together."""
MIN_REQUESTS = 100
"""Fewer say nothing."""
MARGIN = 0.03
"""By how much more than chance explains (95 %) the two must differ to have parted."""
FULL_LOAD, STILL_FULL = 0.9, 0.75
"""Of the planned rate: from where on better than planned is news, and below which it is none any more."""
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests that have ended."""

    offered: int = 0
    """Whatever became of them, and whether anything was promised."""
    requests: int = 0
    """That are judged."""
    attained: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.offered + other.offered, self.requests + other.requests, self.attained + other.attained)

    @property
    def attainment(self) -> float:
        """Share of the judged; NaN where there are none."""
        return self.attained / self.requests if self.requests else math.nan


@dataclass(frozen=True, slots=True)
class Seen:
    """What one or several router processes have seen of late."""

    by_class: Mapping[str, Tally] = field(default_factory=dict)
    window_s: float = 0.0
    """How long they have looked, WINDOW_S at most."""

    @property
    def whole(self) -> Tally:
        """All classes together."""
        return sum(self.by_class.values(), Tally())

    @property
    def rate(self) -> float:
        """Requests/s that came and have ended."""
        return self.whole.offered / self.window_s if self.window_s > 0 else 0.0


def together(several: Iterable[Seen]) -> Seen:
    """Processes of one cluster, added up."""
    by_class: dict[str, Tally] = {}
    window_s = 0.0
    for seen in several:
        window_s = max(window_s, seen.window_s)
        for name, tally in seen.by_class.items():
            by_class[name] = by_class.get(name, Tally()) + tally
    return Seen(by_class, window_s)


@dataclass(slots=True)
class _Inside:
    """A request between the door and its end."""

    promise: Promise
    arrival_s: float
    begun: bool = False
    """It has had a token."""
    kept: bool = True
    """By the choices that have ended."""


class Attainment:
    """Follows requests from the door to their end. Holds the requests inside and SLICES counts of each class."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._inside: dict[str, _Inside] = {}
        self._slices: deque[tuple[int, dict[str, Tally]]] = deque()
        """By number, the oldest first."""

    def arrive(self, key: str, promise: Promise, arrival_s: float) -> None:
        """A request came to the door, under a key of its own."""
        self._inside[key] = _Inside(promise, arrival_s)

    def first_token(self, key: str) -> None:
        """One of its choices has a token; idempotent, and nothing where the request is over."""
        if (request := self._inside.get(key)) is not None:
            request.begun = True

    def choice_ended(self, key: str, kept: bool) -> None:
        """A choice came to its end, and kept all that was promised or not; nothing where the request is over."""
        if (request := self._inside.get(key)) is not None:
            request.kept &= kept

    def end(self, key: str, outcome: RequestOutcome, now_s: float) -> None:
        """The request is over."""
        request = self._inside.pop(key)
        promise, judged = request.promise, True
        attained = outcome is RequestOutcome.ANSWERED and request.kept
        if outcome is RequestOutcome.CANCELED:
            overdue = promise.ttft_s is not None and now_s - request.arrival_s > promise.ttft_s
            judged, attained = overdue and not request.begun, False
        if promise.ttft_s is None and promise.tpot_s is None:
            judged = attained = False
        counts = self._slice(now_s)
        counts[promise.slo_class] = counts.get(promise.slo_class, Tally()) + Tally(1, int(judged), int(attained))

    def seen(self, now_s: float) -> Seen:
        """Of the last WINDOW_S."""
        self._slice(now_s)
        whole = together(Seen(counts) for _, counts in self._slices)
        return Seen(whole.by_class, min(now_s - self._since_s, WINDOW_S))

    def _slice(self, now_s: float) -> dict[str, Tally]:
        """The counts of now; forgets what is older than the window."""
        number = math.floor(now_s * SLICES / WINDOW_S)
        while self._slices and self._slices[0][0] <= number - SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, {}))
        return self._slices[-1][1]


class PlanState(enum.StrEnum):
    """How what is seen stands to what was predicted."""

    AS_PLANNED = "as planned"
    BELOW = "below plan"
    ABOVE = "above plan"


@dataclass(frozen=True, slots=True)
class Change:
    """That what is seen and what was predicted have parted, or come together again."""

    slo_class: str
    """ALL: of all together."""
    state: PlanState
    seen: Tally
    predicted: float
    rate: float
    planned_rate: float | None

    def __str__(self) -> str:
        low, high = interval(self.seen)
        of = f" of class {self.slo_class}" if self.slo_class else ""
        planned = "" if self.planned_rate is None else f" at {self.planned_rate:.3g} requests/s"
        more = self.planned_rate is not None and self.rate > self.planned_rate
        load = f"; {self.rate:.3g} requests/s came" + (", more than was planned for" if more else "")
        return (
            f"attainment is {self.state}: {100 * self.seen.attainment:.1f} % of the last {self.seen.requests} requests"
            f"{of} kept their promises (95 %: {100 * low:.1f} to {100 * high:.1f}), predicted were "
            f"{100 * self.predicted:.1f} %{planned}{load}"
        )


class PlanJudge:
    """Says, once a change, when a plan's prediction and what is seen have parted, and when they are together again.

    They part where the 95 % interval of what is seen lies more than MARGIN beyond the prediction, and meet where it
    holds the prediction again. Better than predicted is news only near the planned rate.
    """

    def __init__(self, plan: PlanConfig) -> None:
        self._rate = plan.rate
        self._predicted = dict(plan.predicted_by_class)
        if plan.predicted_attainment is not None:
            self._predicted[ALL] = plan.predicted_attainment
        self.states: dict[str, PlanState] = {}
        """By class, of those that have been judged."""

    @property
    def judges(self) -> bool:
        """Whether anything was predicted."""
        return bool(self._predicted)

    def look(self, seen: Seen) -> list[Change]:
        """What has changed."""
        changes = []
        for name, predicted in self._predicted.items():
            tally = seen.whole if name == ALL else seen.by_class.get(name, Tally())
            if tally.requests < MIN_REQUESTS:
                continue
            before = self.states.get(name, PlanState.AS_PLANNED)
            self.states[name] = now = self._state(before, tally, predicted, seen.rate)
            if now is not before:
                changes.append(Change(name, now, tally, predicted, seen.rate, self._rate))
        return changes

    def _state(self, before: PlanState, tally: Tally, predicted: float, rate: float) -> PlanState:
        low, high = interval(tally)
        if high < predicted - (0.0 if before is PlanState.BELOW else MARGIN):
            return PlanState.BELOW
        if low > predicted + (0.0 if before is PlanState.ABOVE else MARGIN):
            full = STILL_FULL if before is PlanState.ABOVE else FULL_LOAD
            if self._rate is None or rate >= full * self._rate:
                return PlanState.ABOVE
        return PlanState.AS_PLANNED


def interval(tally: Tally) -> tuple[float, float]:
    """The 95 % interval (Wilson's) of the share that attained; from 0 to 1 where nothing was seen."""
    count = tally.requests
    if not count:
        return 0.0, 1.0
    share = tally.attained / count
    middle = share + _Z**2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return (middle - half) / scale, (middle + half) / scale
