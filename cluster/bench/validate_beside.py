"""Workers that compute on one machine take of each other: they share its memory, and the router and the client run on
processors that engines want. What a second computing engine adds to the first one's time is measured once, as a share
(`validate_calibrate`); here it is added to what the simulator said, whose workers know nothing of each other.

Each request's wait for its first token, and its decoding, grow by that share of the time in which a worker other than
its own computes. What that in turn does to queues, and more than two engines at once, is left out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..sim.request import Outcome

Stretch = tuple[float, float]


def slowed(outcomes: Sequence[Outcome], share: float) -> list[Outcome]:
    """The outcomes where an engine takes `share` longer while another one computes. Pure."""
    if share <= 0.0:
        return list(outcomes)
    computing: dict[str, list[Stretch]] = {}
    for outcome in outcomes:
        for worker, stretch in _computing(outcome):
            computing.setdefault(worker, []).append(stretch)
    others = {
        worker: _Busy(stretch for other, own in computing.items() if other != worker for stretch in own)
        for worker in computing
    }
    return [_slowed(outcome, others, share) for outcome in outcomes]


def _computing(outcome: Outcome) -> list[tuple[str, Stretch]]:
    """(worker, from and to), seconds, of its prefill and its decode, as far as they came."""
    if outcome.first_token_s is None:
        return []
    found = [(outcome.prefill_worker, (outcome.first_token_s - outcome.prefill_s, outcome.first_token_s))]
    if outcome.last_token_s is not None and outcome.last_token_s > outcome.first_token_s:
        found.append((outcome.decode_worker, (outcome.first_token_s, outcome.last_token_s)))
    return found


def _slowed(outcome: Outcome, others: dict[str, _Busy], share: float) -> Outcome:
    first_s, last_s = outcome.first_token_s, outcome.last_token_s
    if first_s is None:
        return outcome
    # Who waits in the queue waits for prompts that are slowed as well.
    since_s = outcome.asked.arrival_s if outcome.dispatched_s is None else outcome.dispatched_s
    later_s = share * others[outcome.prefill_worker].overlap_s(since_s, first_s)
    if last_s is not None and last_s > first_s:
        last_s += later_s + share * others[outcome.decode_worker].overlap_s(first_s, last_s)
    elif last_s is not None:
        last_s += later_s
    return replace(outcome, first_token_s=first_s + later_s, last_token_s=last_s)


class _Busy:
    """Stretches of time, merged."""

    def __init__(self, stretches: Iterable[Stretch]) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        for begin_s, end_s in sorted(stretches):
            if self._ends and begin_s <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end_s)
            else:
                self._begins.append(begin_s)
                self._ends.append(end_s)

    def overlap_s(self, begin_s: float, end_s: float) -> float:
        """Seconds of begin…end that lie in any of them."""
        first, last = bisect_right(self._ends, begin_s), bisect_left(self._begins, end_s)
        pairs = zip(self._begins[first:last], self._ends[first:last], strict=True)
        return sum(min(end_s, end) - max(begin_s, begin) for begin, end in pairs)
