"""Who is let in: requests between the door and their first token, bounded in number, and only with a promise that can
be kept. Pure; time and forecasts are passed in.

Beyond the bound, or where the first token would come later than promised, a request is refused at once with 429 and a
Retry-After, not left to rot. Who was let in is served, even where the forecast turns out wrong. The Retry-After is
about when the same request would be let in: at the bound, the time the queue needs to drain at the rate at which first
tokens have been coming; else when the forecast fits the promise again, times the tries that takes, because whoever
comes back competes with newcomers: where one in three is let in, it takes three. What no idle cluster could do either
is refused without one.

A forecast knows the workers' pace, not the machine's: by how much first tokens came later than forecast, of late, is
added to the next ones.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import TypeVar

from .errors import Overloaded, PromiseUnattainable
from .forecast import Forecast
from .slo_classes import Promise

T = TypeVar("T")
RATE_WINDOW = 64
DECISIONS_S = 15.0
"""How far back decisions, and the lateness of first tokens, count."""
MAX_TRIES = 10.0
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0
WAIT_MARGIN = 1.1
"""Forecast waits count for so much: at the edge every second forecast is too short."""
PROMISED_SHARE, UNPROMISED_SHARE = 0.875, 0.5
"""Of the places: requests with a TTFT promise, and those without, take at most so much, so that a flood of the one kind
leaves places for the other."""
LATENESS_SAMPLES = 8
"""First tokens after which their lateness is more than chance."""


@dataclass(frozen=True, slots=True)
class _Waiter:
    promised: bool
    """It has a TTFT promise."""
    forecast_s: float | None
    """When its first token was to come."""


class Admission:
    """Counts who waits: `enter` when a request comes, `first_token` when one of its choices has one, `leave` at its
    end.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: dict[str, _Waiter] = {}
        self._promised = 0
        self._first_tokens_s: deque[float] = deque(maxlen=RATE_WINDOW)
        self._decisions: deque[tuple[float, bool]] = deque(maxlen=4 * RATE_WINDOW)
        """When, and whether the request was let in."""
        self._lateness_s: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW)
        """When a first token came, and how much later than forecast."""

    @property
    def waiting(self) -> int:
        """Requests admitted that have no first token yet."""
        return len(self._waiting)

    def enter(
        self,
        key: str,
        now_s: float,
        *,
        promise: Promise,
        forecast: Forecast | None,
        elapsed_s: float = 0.0,
        idle_tpot_s: float = 0.0,
    ) -> None:
        """Takes a place. `Overloaded` when there is none; `PromiseUnattainable` when the forecast (None: nobody knows)
        for a request that came `elapsed_s` ago breaks its promise, or when it names a TPOT below `idle_tpot_s` (0:
        nobody knows), the best that an idle worker could do.
        """
        assert key not in self._waiting, f"{key} enters twice"
        promised = promise.ttft_s is not None
        try:
            self._check_places(promised, now_s)
            _check_tpot(promise, idle_tpot_s)
            if forecast is not None:
                _check_ttft(promise, forecast, elapsed_s + self._lag_s(now_s))
        except Overloaded as refusal:
            self._decisions.append((now_s, False))
            if isinstance(refusal, PromiseUnattainable) and refusal.retry_after_s is not None:
                refusal.retry_after_s = _bounded(refusal.retry_after_s * self._tries(now_s))
            raise
        self._decisions.append((now_s, True))
        self._waiting[key] = _Waiter(promised, None if forecast is None else now_s + forecast.ttft_s)
        self._promised += promised

    def first_token(self, key: str, now_s: float) -> None:
        """The request got its first token: its place is free, and the rate is known better."""
        waiter = self._waiting.get(key)
        if waiter is None:
            return
        self.leave(key)
        self._first_tokens_s.append(now_s)
        if waiter.forecast_s is not None:
            self._lateness_s.append((now_s, now_s - waiter.forecast_s))

    def leave(self, key: str) -> None:
        """The request ended, first token or not; idempotent."""
        waiter = self._waiting.pop(key, None)
        self._promised -= waiter is not None and waiter.promised

    def retry_after_s(self, now_s: float) -> float:
        """Seconds until about the whole queue has been served; between 1 and 60."""
        if len(self._first_tokens_s) < 2:
            return MIN_RETRY_AFTER_S
        span_s = max(now_s - self._first_tokens_s[0], 1e-3)
        rate = len(self._first_tokens_s) / span_s
        return _bounded(len(self._waiting) / rate)

    def _tries(self, now_s: float) -> float:
        """How often somebody who comes now and again must ask until it is let in."""
        _forget(self._decisions, now_s)
        let_in = sum(decision for _, decision in self._decisions)
        return min(MAX_TRIES, len(self._decisions) / max(let_in, 1))

    def _lag_s(self, now_s: float) -> float:
        """How much later than forecast first tokens have been coming; never less than nothing. Nothing, too, where
        nobody waits for one: what made them late is over, and only who is let in can show that.
        """
        _forget(self._lateness_s, now_s)
        if not self._waiting or len(self._lateness_s) < LATENESS_SAMPLES:
            return 0.0
        return max(0.0, statistics.median([late_s for _, late_s in self._lateness_s]))

    def _check_places(self, promised: bool, now_s: float) -> None:
        mine = self._promised if promised else len(self._waiting) - self._promised
        limit = math.ceil(self._max_waiting * (PROMISED_SHARE if promised else UNPROMISED_SHARE))
        if len(self._waiting) < self._max_waiting and mine < limit:
            return
        if len(self._waiting) >= self._max_waiting:
            message = f"{len(self._waiting)} requests already wait for their first token; the limit is "
            message += str(self._max_waiting)
        else:
            kind = "with" if promised else "without"
            message = f"{mine} requests {kind} a promise already wait for their first token; of those the limit is "
            message += f"{limit} of {self._max_waiting}"
        raise Overloaded(message, retry_after_s=self.retry_after_s(now_s))


def _forget(seen: deque[tuple[float, T]], now_s: float) -> None:
    """Drops what was seen more than `DECISIONS_S` ago."""
    while seen and seen[0][0] < now_s - DECISIONS_S:
        seen.popleft()


def _check_tpot(promise: Promise, idle_tpot_s: float) -> None:
    if promise.own_tpot and promise.tpot_s is not None and idle_tpot_s > promise.tpot_s:
        raise PromiseUnattainable(
            f"the request's own promise is {promise.tpot_s:.3g} s per output token; even an idle worker would need "
            f"about {idle_tpot_s:.3g} s"
        )


def _check_ttft(promise: Promise, forecast: Forecast, elapsed_s: float) -> None:
    promised_s = promise.effective_ttft_s(forecast.idle_s)
    ttft_s = elapsed_s + WAIT_MARGIN * forecast.wait_s + forecast.own_s
    if ttft_s <= promised_s:
        return
    whose = "the request's own promise" if promise.own_ttft else f"the promise of class {promise.slo_class!r}"
    message = f"the first token would come after about {ttft_s:.3g} s, {whose} is {promised_s:.3g} s"
    if promise.own_ttft and forecast.idle_s > promised_s:
        message += f"; even an idle cluster would need about {forecast.idle_s:.3g} s for this prompt"
        raise PromiseUnattainable(message)
    raise PromiseUnattainable(message, retry_after_s=_bounded(ttft_s - promised_s))


def _bounded(seconds: float) -> float:
    return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, seconds))
