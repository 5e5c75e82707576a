"""The highest rate at which a share of the requests keeps its promises: what to try next, and what was found. Pure.

Rates double from the start until a point fails (or halve until one is kept); then the gap between the highest kept and
the lowest failed is halved (geometrically) until it is narrow. Several seeds make up one point, because the knee
depends on which prompts meet: their requests are judged together, and so are those of the second halves of the runs,
where a queue that grows shows and a short run does not flatter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .report import RequestRecord, attains

ENDLESS = 64.0
"""How far below the start a rate is still tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun:
    """One seed at one rate."""

    seed: int
    requests: int
    """Judged: all that were sent, or, where the run was ended early, those that were decided by then."""
    attained: int
    late_requests: int
    """Judged requests of the second half, by arrival."""
    late_attained: int
    duration_s: float
    median_ttft_ms: float = math.nan
    p99_ttft_ms: float = math.nan
    median_tpot_ms: float = math.nan
    p99_tpot_ms: float = math.nan
    p99_lateness_ms: float = math.nan
    """Of the client itself."""
    failed: int = 0
    ended_early: bool = False
    """Nothing could have saved the point any more."""
    client_late: bool = False
    """The client was so late that the run says little about the server."""

    @property
    def attainment(self) -> float:
        """Share of the judged requests that met every promise."""
        return self.attained / self.requests if self.requests else 0.0

    @property
    def goodput(self) -> float:
        """Requests per second that met every promise."""
        return self.attained / self.duration_s if self.duration_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One offered rate, in requests per second, and its runs."""

    rate: float
    runs: tuple[SweepRun, ...]

    @property
    def attainment(self) -> float:
        """Over the requests of all runs."""
        return _share(sum(run.attained for run in self.runs), sum(run.requests for run in self.runs))

    @property
    def late_attainment(self) -> float:
        """Over the requests of the second halves."""
        return _share(sum(run.late_attained for run in self.runs), sum(run.late_requests for run in self.runs))

    @property
    def goodput(self) -> float:
        """Mean over the runs of the requests per second that met every promise."""
        return sum(run.goodput for run in self.runs) / len(self.runs)

    def keeps(self, target: float) -> bool:
        """Whether the rate can be sustained: overall, and not only until the queue has grown."""
        ended = any(run.ended_early for run in self.runs)
        return not ended and self.attainment >= target and self.late_attainment >= target


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """All points of a sweep, by rate."""

    label: str
    target: float
    """Share of requests that must keep every promise, 0 to 1."""
    promises_ms: Mapping[str, float]
    points: tuple[SweepPoint, ...]
    complete: bool = True
    """False: the bound on points or time, or a signal, came before the gap was narrow."""
    exit_code: int = 0
    """What a signal that ended it asks for; 0: there was none."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> SweepPoint | None:
        """The highest rate that was kept below the lowest that was not; None: none was."""
        found = None
        for point in sorted(self.points, key=lambda point: point.rate):
            if not point.keeps(self.target):
                break
            found = point
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything, with the derived numbers beside their runs; nothing is NaN."""
        best = self.best
        return {
            **self.facts,
            "label": self.label,
            "attainment_target": self.target,
            "goodput_slo_ms": dict(self.promises_ms),
            "complete": self.complete,
            "interrupted": self.exit_code != 0,
            "best_rate": None if best is None else best.rate,
            "points": [
                {
                    "rate": point.rate,
                    "attainment": point.attainment,
                    "late_attainment": point.late_attainment,
                    "goodput": point.goodput,
                    "kept": point.keeps(self.target),
                    "runs": [{name: _plain(value) for name, value in asdict(run).items()} for run in point.runs],
                }
                for point in self.points
            ],
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> SweepResult:
        """What `as_json` wrote. Raises ValueError where it is something else."""
        try:
            points = tuple(
                SweepPoint(rate=point["rate"], runs=tuple(_run(run) for run in point["runs"]))
                for point in saved["points"]
            )
            return cls(
                label=saved["label"],
                target=saved["attainment_target"],
                promises_ms=saved["goodput_slo_ms"],
                points=points,
                complete=saved["complete"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no saved sweep ({type(error).__name__}: {error})") from None


class RateSearch:
    """Says which rate to try next. `add` every point, in the order in which `next_rate` named their rates."""

    def __init__(self, *, start: float, resolution: float, max_points: int) -> None:
        """`resolution`: 0.05 ends when the lowest failed rate is within 5 % of the highest kept one."""
        for name, value in (("request_rate", start), ("sweep_resolution", resolution)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} is not allowed; allowed: above 0")
        if max_points < 1:
            raise ValueError(f"sweep_max_points: {max_points} is not allowed; allowed: at least 1")
        self._start = start
        self._ratio = 1.0 + resolution
        self._left = max_points
        self._kept: float | None = None
        self._failed: float | None = None

    @property
    def settled(self) -> bool:
        """Whether the gap is narrow, or not even a tiny rate is kept."""
        if self._failed is None:
            return False
        if self._kept is None:
            return self._failed <= self._start / ENDLESS
        return self._failed / self._kept <= self._ratio

    def next_rate(self) -> float | None:
        """Requests per second; None: done, or out of points."""
        if self.settled or self._left == 0:
            return None
        if self._kept is None:
            return self._start if self._failed is None else self._failed / 2
        if self._failed is None:
            return self._kept * 2
        return math.sqrt(self._kept * self._failed)

    def add(self, rate: float, kept: bool) -> None:
        """Takes in what came of the rate."""
        self._left -= 1
        if kept:
            self._kept = rate
        else:
            self._failed = rate


class Watch:
    """Follows a run so that it can end once its point is lost: more requests failed than the target forgives.

    A request still under way has failed for sure once it is older than all its promises together allow.
    """

    def __init__(self, promises_ms: Mapping[str, float], forgiven: float) -> None:
        """`forgiven`: how many requests may fail before the point is lost, for all its runs together."""
        self._promises_ms = promises_ms
        self._forgiven = forgiven
        self._missed = 0

    def done(self, record: RequestRecord) -> None:
        """Counts one that ended."""
        self._missed += not attains(record, self._promises_ms)

    def is_overdue(self, age_s: float, max_tokens: int) -> bool:
        """Whether one of this age, still under way, cannot keep its promises any more."""
        limits_ms = []
        if "e2el" in self._promises_ms:
            limits_ms.append(self._promises_ms["e2el"])
        if "ttft" in self._promises_ms and ("tpot" in self._promises_ms or max_tokens == 1):
            limits_ms.append(self._promises_ms["ttft"] + self._promises_ms.get("tpot", 0.0) * (max_tokens - 1))
        return bool(limits_ms) and age_s * 1e3 > min(limits_ms)

    def is_lost(self, overdue: int) -> bool:
        """Whether the point is lost, with `overdue` requests under way that have failed already."""
        return self._missed + overdue > self._forgiven


def sweep_run(
    records: Sequence[RequestRecord],
    promises_ms: Mapping[str, float],
    metrics_ms: Mapping[str, Mapping[str, float]],
    *,
    seed: int,
    duration_s: float,
    ended_early: bool,
    client_late: bool,
    overdue: int = 0,
) -> SweepRun:
    """Judges the records of one run, which are in order of arrival.

    `overdue`: requests without a record, which had failed when the run was ended early.
    """
    kept = [attains(record, promises_ms) for record in records]
    late = kept[len(kept) // 2 :]
    return SweepRun(
        seed=seed,
        requests=len(kept) + overdue,
        attained=sum(kept),
        late_requests=len(late) + overdue,
        late_attained=sum(late),
        duration_s=duration_s,
        median_ttft_ms=metrics_ms["ttft"]["median"],
        p99_ttft_ms=metrics_ms["ttft"]["p99"],
        median_tpot_ms=metrics_ms["tpot"]["median"],
        p99_tpot_ms=metrics_ms["tpot"]["p99"],
        p99_lateness_ms=metrics_ms["lateness"]["p99"],
        failed=sum(not record.ok for record in records) + overdue,
        ended_early=ended_early,
        client_late=client_late,
    )


def _run(saved: Mapping[str, Any]) -> SweepRun:
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in saved.items()}
    return SweepRun(**values)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
