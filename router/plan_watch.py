"""Keeps what a cluster's plan predicted beside what the cluster sees: as metrics, and as a line when the two part.

Each router process counts its own requests. Whoever is asked for metrics adds up what all of them counted, so that
there is one series for the cluster; process 0 alone judges the sum and says what has changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..cluster.clock import Clock
from ..cluster.config import Percentiles, PlanConfig, RouterConfig
from ..cluster.events import WaterfallLog
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from .attainment import ALL, Attainment, Change, PlanJudge, PlanState, Seen, Tally

logger = logging.getLogger(__name__)
LOOK_S = 5.0
_VALUES = {PlanState.BELOW: -1.0, PlanState.AS_PLANNED: 0.0, PlanState.ABOVE: 1.0}
_QUANTILES = {"0.5": "p50", "0.9": "p90", "0.99": "p99"}


class PlanWatch:
    """One router process's part of it. Lives on the router's event loop."""

    def __init__(self, config: RouterConfig, clock: Clock, log: WaterfallLog) -> None:
        self.attainment = Attainment(clock.now_s())
        self.plan = config.plan or PlanConfig()
        self._clock = clock
        self._log = log
        self._judge = PlanJudge(self.plan)
        self._is_judge = config.process == 0 and self._judge.judges
        self._below: dict[str, str] = {}
        """By class: what was said when it fell below."""

    def seen(self) -> Seen:
        """By this process."""
        return self.attainment.seen(self._clock.now_s())

    @property
    def states(self) -> dict[str, PlanState]:
        """By class, as judged; of process 0 only."""
        return dict(self._judge.states)

    @property
    def warning(self) -> str:
        """One line for the operator while attainment is below the plan's; empty while it is not."""
        return self._below.get(ALL) or "; ".join(self._below.values())

    def look(self, seen: Seen) -> list[Change]:
        """Judges what all processes have seen, and tells the log and the operator what has changed."""
        changes = self._judge.look(seen)
        for change in changes:
            logger.log(logging.WARNING if change.state is PlanState.BELOW else logging.INFO, "%s", change)
            self._below.pop(change.slo_class, None)
            if change.state is PlanState.BELOW:
                self._below[change.slo_class] = str(change)
            self._log.record_plan(
                state=change.state.value,
                slo_class=change.slo_class,
                requests=change.seen.requests,
                attainment=change.seen.attainment,
                predicted_attainment=change.predicted,
                rate=change.rate,
                planned_rate=change.planned_rate,
            )
        return changes

    async def run(self, seen: Callable[[], Awaitable[Seen]]) -> None:
        """Looks every LOOK_S, until canceled; returns at once where there is nothing to judge. `seen`: by all."""
        while self._is_judge:
            await asyncio.sleep(LOOK_S)
            self.look(await seen())


def report(watch: PlanWatch, answer: pb.RouterReport) -> None:
    """Puts what this process knows into its answer to another."""
    seen = watch.seen()
    answer.attainment_window_s = seen.window_s
    for name, tally in seen.by_class.items():
        counts = answer.attainment[name]
        counts.offered, counts.requests, counts.attained = tally.offered, tally.requests, tally.attained
    answer.plan_states.update({name: state.value for name, state in watch.states.items()})


def seen_in(answer: pb.RouterReport) -> Seen:
    """What `report` put there."""
    by_class = {
        name: Tally(counts.offered, counts.requests, counts.attained) for name, counts in answer.attainment.items()
    }
    return Seen(by_class, answer.attainment_window_s)


def render(model_name: str, plan: PlanConfig, seen: Seen, states: Mapping[str, str]) -> bytes:
    """The exposition text of prediction and sight, one series for the whole cluster. The label `slo_class` is empty
    where a series is of all classes together. Pure.
    """
    registry = CollectorRegistry()
    registry.register(_PlanCollector(model_name, plan, seen, states))
    return generate_latest(registry)


class _PlanCollector(Collector):
    def __init__(self, model_name: str, plan: PlanConfig, seen: Seen, states: Mapping[str, str]) -> None:
        self._model_name = model_name
        self._plan = plan
        self._seen = seen
        self._states = states

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        plan, seen = self._plan, self._seen
        tallies = {ALL: seen.whole, **dict(sorted(seen.by_class.items()))}
        judged = {name: tally for name, tally in tallies.items() if tally.requests}
        predicted = dict(plan.predicted_by_class)
        if plan.predicted_attainment is not None:
            predicted = {ALL: plan.predicted_attainment, **predicted}
        states = {name: _VALUES[PlanState(state)] for name, state in self._states.items()}
        about = f"of the requests that ended in the last {seen.window_s:.0f} s"
        found = [
            self._by_class(
                "attainment",
                "Share of requests that kept TTFT and TPOT, refused and failed ones included, " + about,
                {name: tally.attainment for name, tally in judged.items()},
            ),
            self._by_class(
                "attainment_requests",
                "Requests under a promise, " + about,
                {name: float(tally.requests) for name, tally in tallies.items()},
            ),
            self._by_class("predicted_attainment", "What the cluster's plan says of tandem:attainment", predicted),
            self._by_class("plan_parted", "-1: attainment is below the plan's, 1: above, 0: as planned", states),
            self._alone("request_rate", "Requests/s that ended, whatever became of them", seen.rate),
        ]
        if plan.rate is not None:
            found.append(self._alone("predicted_request_rate", "Requests/s that the plan is for", plan.rate))
        found += [
            self._percentiles("predicted_time_to_first_token_seconds", "What the plan says of TTFT", plan.ttft_ms),
            self._percentiles(
                "predicted_request_time_per_output_token_seconds", "What the plan says of TPOT", plan.tpot_ms
            ),
        ]
        return [metric for metric in found if metric.samples]

    def _by_class(self, name: str, about: str, values: Mapping[str, float]) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"tandem:{name}", about, labels=["model_name", "slo_class"])
        for slo_class, value in values.items():
            gauge.add_metric([self._model_name, slo_class], value)
        return gauge

    def _alone(self, name: str, about: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"tandem:{name}", about, labels=["model_name"])
        gauge.add_metric([self._model_name], value)
        return gauge

    def _percentiles(self, name: str, about: str, given: Percentiles) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"tandem:{name}", about, labels=["model_name", "quantile"])
        for quantile, field in _QUANTILES.items():
            if (value_ms := getattr(given, field)) is not None:
                gauge.add_metric([self._model_name, quantile], value_ms / 1e3)
        return gauge
