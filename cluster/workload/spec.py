"""A workload as it is written down, and requests drawn from it. Pure but for reading the file that is named.

    spec = parse(WorkloadSpec, {"lengths": "azure2023_conv.csv.gz", "arrivals": "gamma", "burstiness": 0.5})
    rows = load(spec).draw(rate=4.0, seconds=600.0, num_requests=None, seed=0)

Common random numbers: a seed gives the same requests in the same order and the same arrivals but for their pace,
whatever the rate and however many are drawn, so that two rates or two clusters differ by nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from ..config_schema import ConfigError, Text, Within, check, plain
from .arrivals import arrival_times
from .traces import (
    MAX_REQUESTS,
    MAX_TOKENS,
    TraceFile,
    TraceRequest,
    arrival_times_of,
    block_tokens_of,
    fit_trace,
    read_trace_file,
)

DEFAULT_CLASS = "interactive"
DEFAULT_INPUT_TOKENS, DEFAULT_OUTPUT_TOKENS = 512, 128
_LENGTHS, _CLASSES, _START, _OUTPUTS = 1, 2, 3, 4
"""Streams of random numbers beside that of the arrivals, which is the seed's own."""
_SHARES_OFF = 1e-3
_ROUND = 2**64
"""Above any block id: what a trace that is gone through again shares nothing with."""

MIN_GAPS = 30
"""Between arrivals, from which on their variation means something."""
MAX_PROMISE_S = 86_400.0
OptionalSeconds = Annotated[float | None, Within(0.0, MAX_PROMISE_S, above=True)]


class Arrivals(StrEnum):
    """How requests come."""

    POISSON = "poisson"
    GAMMA = "gamma"
    """Gaps of shape `burstiness`."""
    CONSTANT = "constant"
    """As a clock ticks."""
    TRACE = "trace"
    """As recorded, faster or slower."""


class Order(StrEnum):
    """In which order the requests of a file are taken."""

    SHUFFLED = "shuffled"
    """All once, then all again."""
    RECORDED = "recorded"
    """From the first one on where the seed is 0, else from one that the seed draws; round and round."""


class OverLength(StrEnum):
    """What becomes of a request over the caps."""

    CLIP = "clip"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadClass:
    """Requests under one promise."""

    share: Annotated[float, Within(0.0, 1.0, above=True)] = 1.0
    """Of the requests; the shares of all classes add up to 1."""
    ttft_s: OptionalSeconds = None
    """None: nothing is promised."""
    tpot_s: OptionalSeconds = None
    queue_share: Annotated[float | None, Within(0.001, 1000.0)] = None
    """Weight in the router's queue, where classes compete. None: the router's default for its name."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """What comes. ConfigError names a field that is out of range."""

    lengths: Annotated[str | None, Text()] = None
    """A pool of lengths or a trace (`workload.traces` says in which formats); None: `input_tokens`, `output_tokens`."""
    input_tokens: Annotated[int | None, Within(1, MAX_TOKENS)] = None
    """Of every prompt, where no file is named. None: DEFAULT_INPUT_TOKENS."""
    output_tokens: Annotated[int | None, Within(1, MAX_TOKENS)] = None
    range_ratio: Annotated[float, Within(0.0, 0.999)] = 0.0
    """`input_tokens` and `output_tokens` vary evenly by this share of them."""
    max_input_tokens: Annotated[int | None, Within(1, MAX_TOKENS)] = None
    max_output_tokens: Annotated[int | None, Within(1, MAX_TOKENS)] = None
    over_length: OverLength = OverLength.CLIP
    order: Order | None = None
    """None: recorded for a replay and for a file that says which prompts share a prefix, else shuffled."""
    arrivals: Arrivals = Arrivals.POISSON
    burstiness: Annotated[float, Within(0.0, 1e6, above=True)] = 1.0
    """Of gamma arrivals: below 1 burstier than Poisson, above 1 more even."""
    slo_classes: dict[str, WorkloadClass] = field(default_factory=dict)
    """By name; none: one without a promise."""

    def __post_init__(self) -> None:
        check(self)
        if self.lengths is None and self.arrivals is Arrivals.TRACE:
            raise ConfigError("lengths", None, "the file of a trace, where arrivals are trace")
        with_file, without_file = ("max_input_tokens", "max_output_tokens", "order"), ("input_tokens", "output_tokens")
        for name in with_file if self.lengths is None else without_file:
            if getattr(self, name) is not None:
                condition = "without" if self.lengths is None else "beside"
                raise ConfigError(name, plain(getattr(self, name)), f"nothing {condition} a file of lengths")
        if self.lengths is not None and self.range_ratio:
            raise ConfigError("range_ratio", self.range_ratio, "0 beside a file of lengths")
        if self.arrivals is Arrivals.TRACE and self.order is Order.SHUFFLED:
            raise ConfigError("order", self.order.value, "recorded, where arrivals are the trace's")
        if self.burstiness != 1.0 and self.arrivals is not Arrivals.GAMMA:
            raise ConfigError("burstiness", self.burstiness, "1, or any where arrivals are gamma")
        total = sum(kind.share for kind in self.slo_classes.values())
        if self.slo_classes and abs(total - 1.0) > _SHARES_OFF:
            raise ConfigError("slo_classes", f"shares that add up to {total:g}", "shares that add up to 1")

    @property
    def lengths_without_file(self) -> tuple[int, int]:
        """Tokens of prompt and answer before `range_ratio`."""
        return self.input_tokens or DEFAULT_INPUT_TOKENS, self.output_tokens or DEFAULT_OUTPUT_TOKENS

    @property
    def classes(self) -> dict[str, WorkloadClass]:
        """At least one."""
        return dict(self.slo_classes) or {DEFAULT_CLASS: WorkloadClass()}


@dataclass(frozen=True, slots=True)
class Row:
    """One request to come."""

    arrival_s: float
    """From the beginning of the run, where the first one comes."""
    input_tokens: int
    output_tokens: int
    slo_class: str
    hash_ids: tuple[int, ...] = ()
    """Equal leading ids: a shared prefix, of `hash_tokens` tokens each."""
    hash_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A spec and what its file holds."""

    spec: WorkloadSpec
    pool: tuple[TraceRequest, ...] = ()
    """Empty: there is no file."""
    clipped: int = 0
    """Requests of the file that were shortened to the caps."""
    dropped: int = 0
    """Requests of the file that were over the caps or the longest context."""
    hash_tokens: int = 0
    disordered: int = 0
    """Requests of the file that came before the one above them; all are taken by arrival."""

    @property
    def dropped_share(self) -> float:
        """Of the file's requests, those that were left out."""
        return self.dropped / max(1, self.dropped + len(self.pool))

    @property
    def recorded_cv(self) -> float | None:
        """Coefficient of variation of the recorded gaps between two arrivals, 1 of a Poisson process; None: no times,
        all at once, or fewer than MIN_GAPS.
        """
        times = arrival_times_of(self.pool)
        if times is None or len(times) <= MIN_GAPS or not times[-1]:
            return None
        gaps = np.diff(times)
        return float(gaps.std() / gaps.mean())

    @property
    def recorded_rate(self) -> float | None:
        """Requests per second of the trace as it was recorded; None: no times, or all at once."""
        times = arrival_times_of(self.pool)
        return None if times is None or not times[-1] else (len(times) - 1) / times[-1]

    def draw(self, *, rate: float | None, seconds: float | None, num_requests: int | None, seed: int) -> list[Row]:
        """Requests by arrival: `num_requests` of them, those that come before `seconds`, or whichever is fewer; without
        either all of a replay, once. `rate`: requests per second; None: as recorded. ConfigError names what is wrong.
        """
        _check_draw(self.spec, rate, seconds, num_requests, seed)
        times = self._times(rate, seconds, num_requests, seed)
        requests = self._requests(len(times), seed)
        names = list(self.spec.classes)
        shares = np.cumsum([kind.share for kind in self.spec.classes.values()])
        drawn = np.random.default_rng((seed, _CLASSES)).random(len(times)) * shares[-1]
        chosen = np.minimum(np.searchsorted(shares, drawn, side="right"), len(names) - 1)
        return [
            Row(at_s, item.input_tokens, item.output_tokens, names[place], item.block_ids, self.hash_tokens)
            for at_s, item, place in zip(times, requests, chosen.tolist(), strict=True)
        ]

    def _times(self, rate: float | None, seconds: float | None, count: int | None, seed: int) -> list[float]:
        limit_s = math.inf if seconds is None else seconds
        if self.spec.arrivals is Arrivals.TRACE:
            times = self._recorded(rate, limit_s, count, seed)
        else:
            assert rate is not None  # _check_draw
            times = _even(self.spec, limit_s * rate, count, seed) / rate
        kept: list[float] = times[times < limit_s].tolist()
        return kept

    def _recorded(self, rate: float | None, limit_s: float, count: int | None, seed: int) -> NDArray[np.float64]:
        recorded = arrival_times_of(self.pool)
        own_rate = self.recorded_rate
        if recorded is None:
            raise ConfigError("arrivals", "trace", f"poisson, gamma or constant: {self.spec.lengths} has lengths only")
        if own_rate is None and rate is not None:
            raise ConfigError("rate", rate, f"none: all requests of {self.spec.lengths} come at once")
        times, size = np.asarray(recorded), len(recorded)
        period_s = 0.0 if own_rate is None else size / own_rate
        pace = 1.0 if rate is None or own_rate is None else rate / own_rate
        start = self._start(seed)
        most = size if count is None else count
        if math.isfinite(limit_s) and period_s:
            # Of the first round only what lies behind the start comes.
            most = min(MAX_REQUESTS, (math.ceil(limit_s * pace / period_s) + 1) * size)
            most = most if count is None else min(most, count)
        places = start + np.arange(most)
        found = times[places % size] + period_s * (places // size)
        found = (found - found[0]) / pace
        if most == MAX_REQUESTS and count is None and found[-1] < limit_s:
            raise ConfigError("seconds", limit_s, f"at most {MAX_REQUESTS} requests in a run")
        return np.asarray(found)

    def _start(self, seed: int) -> int:
        return int(np.random.default_rng((seed, _START)).integers(len(self.pool))) if seed else 0

    def _requests(self, count: int, seed: int) -> list[TraceRequest]:
        spec, size = self.spec, len(self.pool)
        if not size:
            prompt_tokens, answer_tokens = spec.lengths_without_file
            inputs = _varied(prompt_tokens, spec.range_ratio, count, (seed, _LENGTHS))
            outputs = _varied(answer_tokens, spec.range_ratio, count, (seed, _OUTPUTS))
            made = zip(inputs, outputs, strict=True)
            return [TraceRequest(arrival_s=None, input_tokens=prompt, output_tokens=answer) for prompt, answer in made]
        rounds = -(-count // size)
        if self._order is Order.RECORDED:
            places = (self._start(seed) + np.arange(count)) % size
        else:
            draw = np.random.default_rng((seed, _LENGTHS))
            places = np.concatenate([draw.permutation(size) for _ in range(rounds)])[:count]
        return [_again(self.pool[place], number // size) for number, place in enumerate(places.tolist())]

    @property
    def _order(self) -> Order:
        told = self.spec.arrivals is Arrivals.TRACE or any(row.block_ids for row in self.pool)
        return self.spec.order or (Order.RECORDED if told else Order.SHUFFLED)


def load(spec: WorkloadSpec, *, max_model_len: int = MAX_TOKENS) -> Workload:
    """The spec with its file read, and every request held to the caps and to `max_model_len` tokens of prompt and
    answer. ValueError naming file, line and field, or a cap that leaves nothing.
    """
    if spec.lengths is None:
        longest = sum(_most(tokens, spec.range_ratio) for tokens in spec.lengths_without_file)
        if longest > max_model_len:
            raise ConfigError("input_tokens", f"{longest} tokens of prompt and answer", f"at most {max_model_len}")
        return Workload(spec=spec)
    file = Path(spec.lengths).expanduser()
    found = _read(str(file), *_stamp(file))
    trace = found.rows
    fitted = fit_trace(
        trace,
        max_model_len=max_model_len,
        max_input_tokens=spec.max_input_tokens,
        max_output_tokens=spec.max_output_tokens,
        clip=spec.over_length is OverLength.CLIP,
    )
    if not fitted.rows:
        raise ConfigError("lengths", spec.lengths, f"a file with a request within the caps and {max_model_len} tokens")
    return Workload(
        spec=spec,
        pool=fitted.rows,
        clipped=fitted.clipped,
        dropped=fitted.dropped,
        hash_tokens=block_tokens_of(trace),
        disordered=found.disordered,
    )


def draw(
    spec: WorkloadSpec, *, rate: float | None, seconds: float | None, num_requests: int | None, seed: int
) -> list[Row]:
    """See `Workload.draw`, of which several read the file once."""
    return load(spec).draw(rate=rate, seconds=seconds, num_requests=num_requests, seed=seed)


@lru_cache(maxsize=4)
def _read(path: str, changed_ns: int, size_bytes: int) -> TraceFile:
    return read_trace_file(path)


def _stamp(file: Path) -> tuple[int, int]:
    """Tells a file that was written anew from what was read of it before."""
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError("lengths", str(file), f"a file that can be read ({error.strerror})") from None
    return found.st_mtime_ns, found.st_size


def _check_draw(
    spec: WorkloadSpec, rate: float | None, seconds: float | None, num_requests: int | None, seed: int
) -> None:
    replay = spec.arrivals is Arrivals.TRACE
    for name, value in (("rate", rate), ("seconds", seconds)):
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigError(name, value, "a finite number above 0")
    if rate is None and not replay:
        raise ConfigError("rate", None, "requests per second; arrivals as a file has them (--arrivals trace) need none")
    if num_requests is not None and not 1 <= num_requests <= MAX_REQUESTS:
        raise ConfigError("num_requests", num_requests, f"1 to {MAX_REQUESTS}")
    if num_requests is None and seconds is None and not replay:
        raise ConfigError("num_requests", None, "how many requests come, or for how long they do")
    if seed < 0:
        raise ConfigError("seed", seed, "at least 0")


def _even(spec: WorkloadSpec, limit_s: float, count: int | None, seed: int) -> NDArray[np.float64]:
    """Arrivals at one a second, as many as asked for or until past `limit_s`."""
    shape = {Arrivals.GAMMA: spec.burstiness, Arrivals.CONSTANT: math.inf}.get(spec.arrivals, 1.0)
    if count is not None:
        return np.asarray(arrival_times(count, 1.0, shape, seed))
    count = _bounded(limit_s + 4.0 * math.sqrt(limit_s) + 16.0)
    while (times := np.asarray(arrival_times(count, 1.0, shape, seed)))[-1] < limit_s:
        count = _bounded(2.0 * count)
    return times


def _bounded(count: float) -> int:
    if count > MAX_REQUESTS:
        raise ConfigError("seconds", f"about {count:.0f} requests", f"at most {MAX_REQUESTS} requests in a run")
    return max(1, math.ceil(count))


def _varied(middle: int, ratio: float, count: int, seed: tuple[int, int]) -> list[int]:
    low = max(1, math.floor(middle * (1.0 - ratio)))
    drawn: list[int] = np.random.default_rng(seed).integers(low, _most(middle, ratio) + 1, count).tolist()
    return drawn


def _most(middle: int, ratio: float) -> int:
    return math.ceil(middle * (1.0 + ratio))


def _again(row: TraceRequest, rounds: int) -> TraceRequest:
    """The request of a trace that is gone through again shares nothing with its first time."""
    if not rounds or not row.block_ids:
        return row
    return TraceRequest(
        arrival_s=row.arrival_s,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        block_ids=tuple(item + rounds * _ROUND for item in row.block_ids),
    )
