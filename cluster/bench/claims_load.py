"""The load under which systems are compared, and how it is judged. Pure but for reading the trace.

Poisson arrivals whose rate climbs a staircase, so that a system comes to each rate from the one below and not from
empty: a short run from empty flatters an overloaded system. On each stair what arrives while the system still comes
from the stair below (`settle_s`), or so late that most of its answer falls into the stair above (`guard_s`), loads the
system and is not judged. All systems get the same requests at the same times.

Time may be stretched (`time_scale`): arrivals and promises take so many times as long, as the workers' steps must, and
what is reported is scaled back. That is exact for all that is modelled; router, sockets and what a worker does between
two steps go at their own speed, and so weigh that much less.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ..workload.datasets import BenchRequest
from ..workload.report import RequestRecord, summarize
from ..workload.sweep import SweepPoint, SweepResult, SweepRun, sweep_run
from ..workload.traces import TraceRequest, draw_rows, fit_trace, read_trace, trace_requests

MAX_REQUESTS = 20_000
TARGET = 0.9
_WARMUP_SEED = 0x5EED
_WARMUP_TOKENS = 8
_RESAMPLES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """TTFT and TPOT, both to be kept."""

    ttft_s: float
    tpot_s: float

    @property
    def ms(self) -> dict[str, float]:
        """As the reports name them."""
        return {"ttft": self.ttft_s * 1e3, "tpot": self.tpot_s * 1e3}

    def __str__(self) -> str:
        return f"TTFT {self.ttft_s * 1e3:g} ms, TPOT {self.tpot_s * 1e3:g} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Staircase:
    """The load, in the time that is reported. ValueError naming the field."""

    dataset_path: str
    rates: tuple[float, ...]
    """Requests/s to the whole cluster, ascending."""
    stair_s: float
    """Judged seconds of each rate."""
    settle_s: float = 0.0
    guard_s: float = 0.0
    promises: tuple[Promise, ...]
    time_scale: float = 1.0
    max_model_len: int = 2048
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rates or list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise ValueError(f"rates: {self.rates} are not allowed; allowed: ascending, above 0")
        bounds = (
            ("stair_s", 1.0, 600.0),
            ("settle_s", 0.0, 600.0),
            ("guard_s", 0.0, 600.0),
            ("time_scale", 0.1, 100.0),
        )
        for name, low, high in bounds:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; allowed: {low:g} to {high:g}")
        if sum(self.counts) > MAX_REQUESTS:
            raise ValueError(f"rates: they make {sum(self.counts)} requests; allowed: at most {MAX_REQUESTS}")

    @property
    def whole_s(self) -> float:
        """A stair with what is not judged."""
        return self.settle_s + self.stair_s + self.guard_s

    @property
    def counts(self) -> tuple[int, ...]:
        """Requests of each stair."""
        return tuple(max(1, round(rate * self.whole_s)) for rate in self.rates)

    @property
    def edges_s(self) -> tuple[float, ...]:
        """When each stair begins on the real clock, and when the last one ends."""
        return tuple(place * self.whole_s * self.time_scale for place in range(len(self.rates) + 1))

    def arrivals_s(self) -> tuple[float, ...]:
        """When each is due on the real clock: a Poisson process, given its count on each stair."""
        draw = np.random.default_rng(self.seed)
        times = [sorted(self.whole_s * (place + draw.random(count))) for place, count in enumerate(self.counts)]
        return tuple(float(time_s) * self.time_scale for stair in times for time_s in stair)

    def judged(self) -> tuple[int | None, ...]:
        """For every request, the stair on which it is judged; None: on none."""
        found: list[int | None] = []
        for arrival_s in self.arrivals_s():
            stair, inside_s = divmod(arrival_s / self.time_scale, self.whole_s)
            counts = self.settle_s <= inside_s < self.settle_s + self.stair_s
            found.append(int(stair) if counts else None)
        return tuple(found)

    def rows(self) -> tuple[TraceRequest, ...]:
        """The lengths of each request, drawn from the trace. ValueError."""
        return draw_rows(self._pool(), sum(self.counts), self.seed)

    def requests(self, vocabulary: Sequence[int], *, warmups: int) -> tuple[tuple[BenchRequest, ...], ...]:
        """The warm-ups, whose answers are short, and the load, with prompts of the trace's lengths. ValueError."""
        return (
            trace_requests(self.warmup_rows(warmups), vocabulary, self.seed ^ _WARMUP_SEED),
            trace_requests(self.rows(), vocabulary, self.seed),
        )

    def warmup_rows(self, count: int) -> tuple[TraceRequest, ...]:
        """The lengths of the warm-ups. ValueError."""
        rows = draw_rows(self._pool(), count, self.seed ^ _WARMUP_SEED)
        return tuple(replace(row, output_tokens=min(row.output_tokens, _WARMUP_TOKENS)) for row in rows)

    def _pool(self) -> list[TraceRequest]:
        fitted = fit_trace(
            read_trace(self.dataset_path),
            max_model_len=self.max_model_len,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
        )
        if not fitted.rows:
            raise ValueError(f"dataset_path: nothing in it fits into a context of {self.max_model_len} tokens")
        return [replace(row, block_ids=()) for row in fitted.rows]

    def key(self) -> str:
        """Names this load among saved results: what was measured under another one is another result."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def judge(
    records: Sequence[RequestRecord | None], load: Staircase, promise: Promise, stair: int, *, client_late: bool
) -> SweepRun:
    """What the records of one stair say under one promise, scaled back. `records`: of all requests in order of arrival;
    None: it had not ended when the run was over, which keeps no promise.
    """
    scaled = {name: value * load.time_scale for name, value in promise.ms.items()}
    mine = [record for record, on in zip(records, load.judged(), strict=True) if on == stair]
    own = [record for record in mine if record is not None]
    metrics = {
        name: {key: value / load.time_scale for key, value in values.items()}
        for name, values in summarize(own, scaled, (99.0,)).metrics_ms.items()
    }
    return sweep_run(
        own,
        scaled,
        metrics,
        seed=load.seed,
        duration_s=load.stair_s,
        ended_early=False,
        client_late=client_late,
        overdue=len(mine) - len(own),
    )


def quantiles_ms(records: Sequence[RequestRecord], time_scale: float) -> dict[str, tuple[float, ...]]:
    """`ttft_p50`, `ttft_p90`, `tpot_p50`, `tpot_p90` of the answers, scaled back: each with its 95 % interval (value,
    low, high; a bootstrap over requests). A metric that nobody has is left out.
    """
    found = {}
    for name in ("ttft", "tpot"):
        series = [record.ttft_s if name == "ttft" else record.tpot_s for record in records if record.ok]
        values = np.array([value for value in series if value is not None]) * 1e3 / time_scale
        if not values.size:
            continue
        draws = np.random.default_rng(0).choice(values, (_RESAMPLES, values.size))
        for percent in (50, 90):
            spread = np.percentile(np.percentile(draws, percent, axis=1), [2.5, 97.5])
            found[f"{name}_p{percent}"] = (float(np.percentile(values, percent)), *(float(edge) for edge in spread))
    return found


def sweep_of(label: str, load: Staircase, promise: Promise, runs: Sequence[Sequence[SweepRun]]) -> SweepResult:
    """The runs of each stair under one promise as a sweep; stairs without any are left out."""
    points = [SweepPoint(rate=rate, runs=tuple(own)) for rate, own in zip(load.rates, runs, strict=True) if own]
    return SweepResult(label=label, target=TARGET, promises_ms=promise.ms, points=tuple(points))


def crossing(points: Sequence[tuple[float, float]], target: float) -> float:
    """The rate at which attainment first falls below `target`, on the line between the two rates around it; the highest
    rate if it never does, 0 if it never is above.
    """
    before: tuple[float, float] | None = None
    for rate, attainment in points:
        if attainment < target:
            if before is None:
                return 0.0
            share = (before[1] - target) / (before[1] - attainment)
            return before[0] + share * (rate - before[0])
        before = (rate, attainment)
    return before[0] if before else 0.0
