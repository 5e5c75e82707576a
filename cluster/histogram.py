"""A Prometheus histogram for one thread: an observation is a search and two additions, without locks. A router makes
one for every token and a dozen for every request.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class LoopHistogram(Collector):
    """Register it like any collector. Observations and scrapes come from one event loop."""

    def __init__(self, name: str, about: str, labels: dict[str, str], buckets: tuple[float, ...]) -> None:
        """`buckets`: upper bounds, ascending, without infinity."""
        self._name, self._about, self._labels = name, about, labels
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """`value`, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def describe(self) -> Iterable[Metric]:
        """The name, so that none is registered twice."""
        return (HistogramMetricFamily(self._name, self._about, labels=list(self._labels)),)

    def collect(self) -> Iterator[Metric]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        family = HistogramMetricFamily(self._name, self._about, labels=list(self._labels))
        bounds = [str(floatToGoString(bound)) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family
