"""A load on a cluster in virtual time, reported as a benchmark reports a real one; and the highest rate that it bears.

    simulation = Simulation(read_scenario("split.yaml"))
    result = simulation.run()                                          # .summary, .records, .outcomes
    found = sweep(simulation, SweepPlan(target=0.9, seeds=3))          # `simulated_sweep`

Nothing in a result depends on anything but the scenario: no date, no duration of the simulation itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from ..config_schema import ConfigError, plain
from ..sim.cluster import SimCluster
from ..sim.compose import cluster_spec, draw_rows, read_workload
from ..sim.prompts import asked
from ..sim.record import Recorder, attained_by_class, ended, record
from ..sim.request import Asked, Outcome
from ..sim.scenario import Scenario
from ..types import SLO
from ..workload.report import RequestRecord, Summary, result_json, summarize
from ..workload.spec import Arrivals, Row
from .show import counted

METRICS = ("ttft", "tpot", "e2el")
"""Tokens between the first and the last are not stamped one by one, so that nothing is said of gaps between them."""
LOOKS = 200
"""How often the requests of a run are counted: for progress, for a point that is decided."""
_MOST_PERIOD_S = 20.0
"""Between two times that it is asked whether to stop."""
_SAMPLES = 400
_FEW_LEFT_OUT = 0.01
"""Of a file's requests: what a run may lack and still be of that file's load."""
_CLIENT = ("lateness", "stall", "client_warning", "max_output_tokens_per_s")
"""Of the report, what only a real client has."""
OnProgress = Callable[[float, int, int], bool]
"""Told virtual seconds, requests that have ended and all; True stops the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """One run."""

    outcomes: tuple[Outcome, ...]
    """In order of arrival; of a stopped run those that had ended."""
    planned: int
    records: tuple[RequestRecord, ...]
    summary: Summary
    by_class: Mapping[str, tuple[int, int]]
    """Requests that kept their promises, and all, by SLO class."""
    promises: Mapping[str, SLO]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    recorder: Recorder | None
    virtual_s: float
    stopped: bool
    left_out: str = ""
    """What of the load's file is not in this run, where that is so much that the run is of another load."""

    def as_json(self, *, detailed: bool) -> dict[str, Any]:
        """The result with the names of `tandem bench serve`."""
        result = result_json(self.summary, self.records, self.facts, metrics=METRICS, detailed=detailed)
        kept = {name: value for name, value in result.items() if not name.removesuffix("_ms").endswith(_CLIENT)}
        for name in ("itls", "generated_texts", "queue_times"):
            kept.pop(name, None)
        return kept | {
            "refused": self.refused,
            "slo_classes": {
                name: {
                    "ttft_ms": _ms(self.promises[name].ttft_s),
                    "tpot_ms": _ms(self.promises[name].tpot_s),
                    "requests": total,
                    "attained": attained,
                    "attainment": attained / total if total else None,
                }
                for name, (attained, total) in self.by_class.items()
            },
        }

    @property
    def refused(self) -> int:
        """Requests that were refused at the door; the summary counts them among those that failed."""
        return sum(bool(outcome.refused) for outcome in self.outcomes)

    def save(self, path: str | Path, *, label: str | None = None, detailed: bool) -> None:
        """Writes `as_json` to a file. Raises OSError."""
        content = {"label": label, **self.as_json(detailed=detailed)}
        Path(path).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")

    def lines(self) -> list[str]:
        """What stands below the table: who was refused, and what each class of several got."""
        found = []
        if self.left_out:
            found.append(f"WARNING     {self.left_out}")
        for name, reasons in (
            ("refused", [outcome.refused for outcome in self.outcomes]),
            ("given up", [outcome.failed for outcome in self.outcomes]),
        ):
            told = sorted(Counter(reason for reason in reasons if reason).items())
            if told:
                found.append(f"{name:<12}" + ", ".join(f"{count} {reason}" for reason, count in told))
        prompts = sum(len(outcome.asked.prompt_token_ids) for outcome in self.outcomes)
        if cached := sum(outcome.cached_tokens for outcome in self.outcomes):
            found.append(f"prefixes    {cached / prompts:.1%} of prompt tokens were cached")
        again = sum(outcome.tries > 1 for outcome in self.outcomes)
        if again:
            found.append(f"tried again {counted(again, 'request')}")
        if len(self.by_class) > 1:
            for name, (attained, total) in self.by_class.items():
                share = f"{attained / total:.1%} of {counted(total, 'request')} kept it" if total else "no requests"
                found.append(f"class       {name}: {share}")
        return found


class Simulation:
    """A scenario with everything that it names read. ConfigError and other ValueErrors name what is wrong with it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.device = scenario.device()
        self.workload = read_workload(scenario, self.device)
        self.spec = cluster_spec(scenario, self.device)
        self.promises = {name: promise.slo for name, promise in self.spec.router.promises.items()}
        # What is missing or makes no sense is said before anything is run.
        draw_rows(replace(scenario, num_requests=1), self.workload)
        SimCluster(self.spec)

    @property
    def promised(self) -> bool:
        """Whether any class has a promise."""
        return any(slo.ttft_s is not None or slo.tpot_s is not None for slo in self.promises.values())

    def run(
        self, *, percentiles: Sequence[float] = (99.0,), record_all: bool = False, on_progress: OnProgress | None = None
    ) -> SimulatedRun:
        """The scenario's own load. `record_all`: keeps samples and spans for pictures and traces."""
        rows = draw_rows(self.scenario, self.workload)
        if not rows:
            raise ConfigError("seconds", self.scenario.seconds, "long enough for a request to come")
        span_s = max(rows[-1].arrival_s, 1.0)
        recorder = Recorder(sample_period_s=span_s / _SAMPLES, spans=True) if record_all else None
        cluster = SimCluster(self.spec, recorder)
        look = _Look(on_progress, span_s / LOOKS)
        outcomes = cluster.run(self.asked_of(rows), decided=look, decided_period_s=min(look.period_s, _MOST_PERIOD_S))
        return self._result(cluster, outcomes, percentiles, recorder, look.stopped)

    def asked_of(self, rows: Sequence[Row]) -> list[Asked]:
        """Drawn requests as this cluster is asked them."""
        return asked(rows, sharing=self.scenario.prefix_cache)

    def _result(
        self,
        cluster: SimCluster,
        outcomes: Sequence[Outcome],
        percentiles: Sequence[float],
        recorder: Recorder | None,
        stopped: bool,
    ) -> SimulatedRun:
        kept = tuple(outcome for outcome in outcomes if ended(outcome)) if stopped else tuple(outcomes)
        records = tuple(map(record, kept))
        by_class = attained_by_class(kept, self.promises)
        summary = summarize(records, promises_ms(self.promises), percentiles)
        if len(self.promises) > 1 and self.promised:
            summary = replace(summary, attained=sum(count for count, _ in by_class.values()))
        notes = self._notes()
        if stopped:
            notes += (
                f"PARTIAL: stopped when {len(kept)} of {len(outcomes)} requests had ended; those under way are not "
                "counted, long answers more often than short ones",
            )
        return SimulatedRun(
            outcomes=kept,
            planned=len(outcomes),
            records=records,
            summary=summary,
            by_class=by_class,
            promises=self.promises,
            facts=self.facts(len(outcomes)) | {"notes": list(notes), "kv_crossed_bytes": cluster.crossed_bytes()},
            notes=notes,
            recorder=recorder,
            virtual_s=cluster.timeline.now_s(),
            stopped=stopped,
            left_out=self._left_out(),
        )

    def _notes(self) -> tuple[str, ...]:
        found = []
        if self.workload.clipped:
            found.append(f"shortened to the caps: {counted(self.workload.clipped, 'request')} of the file")
        if self.workload.dropped:
            found.append(
                f"left out, over the caps or the context: {counted(self.workload.dropped, 'request')} of the file"
            )
        if self.workload.disordered and self.scenario.workload.arrivals is Arrivals.TRACE:
            late = counted(self.workload.disordered, "request")
            found.append(f"taken by arrival: {late} of the file came before the one above")
        return tuple(found)

    def _left_out(self) -> str:
        load = self.workload
        if load.dropped_share <= _FEW_LEFT_OUT:
            return ""
        whole = load.dropped + len(load.pool)
        return (
            f"{load.dropped_share:.0%} of the file's requests are left out, {load.dropped} of {whole}: longer than the "
            f"context of {self.device.context_tokens} tokens or the caps; all of the above is of the others alone"
        )

    def facts(self, planned: int) -> dict[str, Any]:
        """What a saved result begins with."""
        scenario, workload = self.scenario, self.scenario.workload
        return {
            "virtual_time": True,
            "backend": "simulate",
            "endpoint_type": "simulate",
            "model_id": self.device.facts.name,
            "hardware": self.device.hardware.name,
            "dataset_name": "random" if workload.lengths is None else "trace",
            "dataset_path": workload.lengths,
            "num_prompts": planned,
            "request_rate": float(scenario.rate) if scenario.rate is not None else "as recorded",
            "arrivals": workload.arrivals.value,
            "burstiness": workload.burstiness,
            "max_concurrency": None,
            "seed": scenario.seed,
            "scenario": plain(scenario),
        }


class _Look:
    """Looks at a run now and then. Requests are counted less often than it is asked whether to stop: that takes long
    where there are many.
    """

    def __init__(self, on_progress: OnProgress | None, period_s: float) -> None:
        self._on_progress = on_progress
        self.period_s = period_s
        """Virtual seconds between two counts."""
        self._next_s = 0.0
        self._ended = 0
        self.stopped = False

    def __call__(self, now_s: float, outcomes: Sequence[Outcome]) -> bool:
        """See `SimCluster.run`."""
        if self._on_progress is None:
            return False
        if now_s >= self._next_s:
            self._next_s, self._ended = now_s + self.period_s, sum(map(ended, outcomes))
        self.stopped = self._on_progress(now_s, self._ended, len(outcomes))
        return self.stopped


def promises_ms(promises: Mapping[str, SLO]) -> dict[str, float]:
    """As a report has them; of several classes, by `class ttft`."""
    found = {}
    for name, slo in promises.items():
        prefix = f"{name} " if len(promises) > 1 else ""
        for metric, value_s in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)):
            if value_s is not None:
                found[f"{prefix}{metric}"] = value_s * 1e3
    return found


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
