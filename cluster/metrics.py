"""Prometheus metrics of a router: requests, phases, handoffs, promises kept, workers' ledgers; and of a worker alone.

Names are vLLM's with `tandem:`, so that dashboards carry over; of these, `request_success` and the histograms of times
and answers count choices, of which a request has `n`: their help texts say so. Times come from `Timings`, hence mean
what the waterfall, the gRPC response and the benchmark client mean: TTFT from arrival at the router, TPOT = (E2E -
TTFT) / (output tokens - 1), no TPOT for one output token. Each process has its own registry. Workers are read from
their last heartbeats when `/metrics` is scraped (`metrics_of_workers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from .histogram import LoopHistogram
from .metrics_of_workers import WorkerCollector
from .proto.tandem_internal_v1_pb2 import WorkerStatus
from .types import SLO, Timings

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_REASONS = 64
"""Different `reason` labels of one counter; what comes after them is counted as `other`, so that cardinality is
bounded.
"""

# Buckets in seconds: TTFT, token and request times as vLLM's, so that quantiles of the two can be laid side by side.
TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0),
)
TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)
TRANSFER_BUCKETS_S = (*(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),)
TRANSFER_BUCKETS_BYTES = tuple(float(4**exponent) for exponent in range(5, 19))
LENGTH_BUCKETS_TOKENS = tuple(float(2**exponent) for exponent in range(18))


def attains(timings: Timings, slo: SLO) -> tuple[bool, bool]:
    """Whether (TTFT, TPOT) of a choice meet their promises. No promise, or no TPOT (one output token): nothing to
    break.
    """
    tpot_s = timings.tpot_s
    ttft_met = slo.ttft_s is None or timings.ttft_s <= slo.ttft_s
    return ttft_met, tpot_s is None or slo.tpot_s is None or tpot_s <= slo.tpot_s


class RouterMetrics:
    """Everything a router counts. Called from its event loop; no method blocks, waits or raises for odd values."""

    def __init__(self, model_name: str = "") -> None:
        self.registry = CollectorRegistry()
        self._model = {"model_name": model_name}
        self._workers: Callable[[], Iterable[WorkerStatus]] = tuple
        self._inside = 0
        self._queue_of: Callable[[], Mapping[str, int]] = dict
        self._reasons: dict[Counter, set[str]] = {}
        self._children: dict[tuple[Counter, str], Counter] = {}
        self._make_phases()
        self._make_handoff()
        self._make_counters()
        self._of_workers = CollectorRegistry()
        self._of_workers.register(WorkerCollector(lambda: self._workers()))
        self.registry.register(_QueueCollector(model_name, lambda: self._queue_of()))
        ProcessCollector(registry=self.registry)

    def _make_phases(self) -> None:
        histogram = self._histogram
        self._ttft = histogram(
            "time_to_first_token_seconds", "From arrival at the router to a choice's first token", TTFT_BUCKETS_S
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "Between tokens of one choice, at the router", TOKEN_BUCKETS_S
        )
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "(E2E - TTFT) / (output tokens - 1) of a choice", TOKEN_BUCKETS_S
        )
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to a choice's last token", REQUEST_BUCKETS_S)
        self._queue = histogram(
            "request_queue_time_seconds", "Waiting of a choice for its prefill to begin", REQUEST_BUCKETS_S
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "Computing the prompt for a choice", REQUEST_BUCKETS_S
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From a choice's first to its last token", REQUEST_BUCKETS_S
        )
        self._prompt_length = histogram(
            "request_prompt_tokens", "Tokens in a prompt, once a request", LENGTH_BUCKETS_TOKENS
        )
        self._output_length = histogram("request_generation_tokens", "Tokens in a choice", LENGTH_BUCKETS_TOKENS)

    def _make_handoff(self) -> None:
        histogram = self._histogram
        self._transfer = histogram("kv_transfer_time_seconds", "First to last KV byte of a handoff", TRANSFER_BUCKETS_S)
        self._exposed = histogram(
            "kv_transfer_exposed_seconds",
            "Last KV byte minus end of prefill: what a choice waits for",
            TRANSFER_BUCKETS_S,
        )
        self._decode_queue = histogram(
            "request_decode_queue_time_seconds",
            "Waiting of a choice for blocks of the decode worker",
            REQUEST_BUCKETS_S,
        )
        self._transfer_bytes = histogram("kv_transfer_size_bytes", "KV moved by a handoff", TRANSFER_BUCKETS_BYTES)
        self._transferred = self._counter("kv_transferred_bytes", "KV moved by handoffs")
        self._handoffs = self._counter("handoffs", "Finished choices whose KV moved from a prefill to a decode worker")
        self._handoff_failures = self._counter("handoff_failures", "Handoffs that ended early", "reason")

    def _make_counters(self) -> None:
        counter = self._counter
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens, once a request, as its first choice finishes")
        self._generation_tokens = counter("generation_tokens", "Output tokens of finished choices")
        self._prefix_queries = counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache, once a request"
        )
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens of those whose KV was there already")
        self._success = counter("request_success", "Finished choices", "finished_reason")
        self._paths = counter("choices_by_path", "Finished choices by path: split, local, mixed, prefill_only", "path")
        self._failures = counter("request_failures", "Requests that ended in an error", "reason")
        self._refusals = counter("request_refusals", "Requests refused at the door", "reason")
        self._retries = counter("request_retries", "Attempts beyond a choice's first", "reason")
        self._prefills_kept = counter("prefills_kept", "Decode attempts that went on with an earlier attempt's prefill")
        self._canceled = counter("requests_canceled", "Requests whose client went away")
        self._slo_choices = counter("slo_choices", "Finished choices, whatever was promised them", "slo_class")
        self._slo_ttft = counter(
            "slo_ttft_attained", "Finished choices that met TTFT, or were promised none", "slo_class"
        )
        self._slo_tpot = counter(
            "slo_tpot_attained", "Finished choices that met TPOT, were promised none or have none", "slo_class"
        )
        self._slo_attained = counter(
            "slo_attained", "Finished choices that met both; its rate is goodput where n is 1", "slo_class"
        )
        self._in_flight = Gauge(
            "tandem:requests_in_flight", "Requests inside the router", ["model_name"], registry=self.registry
        ).labels(**self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> LoopHistogram:
        metric = LoopHistogram(f"tandem:{name}", about, self._model, buckets)
        self.registry.register(metric)
        return metric

    def _counter(self, name: str, about: str, label: str | None = None) -> Counter:
        """A counter; with a label, the parent whose children `_count` makes."""
        names = ["model_name"] if label is None else ["model_name", label]
        metric = Counter(f"tandem:{name}", about, names, registry=self.registry)
        return metric.labels(**self._model) if label is None else metric

    def _count(self, parent: Counter, value: str, amount: float = 1) -> None:
        known = self._reasons.setdefault(parent, set())
        if value not in known:
            if len(known) >= MAX_REASONS:
                value = "other"
            known.add(value)
        child = self._children.get((parent, value))
        if child is None:
            child = self._children[parent, value] = parent.labels(self._model["model_name"], value)
        child.inc(amount)

    def observe_choice(
        self,
        timings: Timings,
        *,
        prompt_tokens: int,
        finish_reason: str,
        slo: SLO,
        choice: int = 0,
        slo_class: str = "default",
    ) -> bool:
        """Called by the router core once for each choice that finished; says whether it met both promises. Prompt and
        cached tokens are counted for choice 0 only, whatever `n` is.
        """
        self._observe_phases(timings)
        if choice == 0:
            self._prompt_tokens.inc(prompt_tokens)
            self._prompt_length.observe(prompt_tokens)
            self._prefix_queries.inc(prompt_tokens)
            self._prefix_hits.inc(timings.cached_tokens)
        self._generation_tokens.inc(timings.output_tokens)
        self._output_length.observe(timings.output_tokens)
        self._count(self._success, str(finish_reason))
        self._count(self._paths, timings.path)
        if timings.path == "split":
            self._handoffs.inc()
            self._transfer.observe(timings.transfer_s)
            self._exposed.observe(max(timings.exposed_transfer_s, 0.0))
            self._decode_queue.observe(timings.decode_queue_s)
            self._transfer_bytes.observe(timings.transferred_bytes)
            self._transferred.inc(timings.transferred_bytes)
        ttft_met, tpot_met = attains(timings, slo)
        self._count(self._slo_choices, slo_class)
        self._count(self._slo_ttft, slo_class, ttft_met)
        self._count(self._slo_tpot, slo_class, tpot_met)
        self._count(self._slo_attained, slo_class, ttft_met and tpot_met)
        return ttft_met and tpot_met

    def _observe_phases(self, timings: Timings) -> None:
        self._ttft.observe(timings.ttft_s)
        self._e2e.observe(timings.e2e_s)
        self._queue.observe(timings.queue_s)
        self._prefill.observe(timings.prefill_s)
        self._decode.observe(timings.decode_s)
        if timings.tpot_s is not None:
            self._tpot.observe(timings.tpot_s)

    def observe_inter_token(self, gap_s: float, tokens: int = 1) -> None:
        """Called by the front ends for each delta but a choice's first: `tokens` came `gap_s` after the ones
        before. A delta of several tokens counts as that many observations of an equal share.
        """
        self._itl.observe(gap_s / tokens, tokens)

    def count_refusal(self, reason: str) -> None:
        """A request that was turned away: `invalid_request`, `overloaded`, `unavailable`, …"""
        self._count(self._refusals, reason)

    def count_failure(self, reason: str) -> None:
        """A request that was admitted and ended in an error."""
        self._count(self._failures, reason)

    def count_handoff_failure(self, reason: str) -> None:
        """A handoff that ended early, whether or not the request survived it."""
        self._count(self._handoff_failures, reason)

    def count_retry(self, reason: str) -> None:
        """An attempt beyond a choice's first."""
        self._count(self._retries, reason)

    def count_prefill_kept(self) -> None:
        """A decode attempt beyond a choice's first that needed no second prefill."""
        self._prefills_kept.inc()

    def count_canceled(self) -> None:
        """A request whose client went away before its end."""
        self._canceled.inc()

    def set_in_flight(self, requests: int) -> None:
        """How many requests are inside the router now."""
        self._inside = requests
        self._in_flight.set(requests)

    def watch_workers(self, workers: Callable[[], Iterable[WorkerStatus]]) -> None:
        """Says where the last heartbeats are; called at every scrape, must not block. One status per live worker."""
        self._workers = workers

    def watch_queue(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        """Says how many choices wait at the router, by SLO class; called at every scrape, must not block."""
        self._queue_of = waiting

    @property
    def requests_inside(self) -> int:
        """Requests inside the router now."""
        return self._inside

    @property
    def choices_waiting(self) -> dict[str, int]:
        """Choices of those that wait for a worker, by SLO class."""
        return dict(sorted(self._queue_of().items()))

    def load(self) -> dict[str, object]:
        """What is inside the router now, for `/ready`: requests, and choices that wait for a worker by SLO class."""
        return {"requests_inside": self.requests_inside, "choices_waiting": self.choices_waiting}

    def render(self) -> bytes:
        """The exposition text of `/metrics`, of content type `CONTENT_TYPE`."""
        return self.render_own() + self.render_workers()

    def render_own(self) -> bytes:
        """The part of it that is this process's alone."""
        return generate_latest(self.registry)

    def render_workers(self) -> bytes:
        """The part of it that is of the workers, which every router process knows alike."""
        return generate_latest(self._of_workers)


class _QueueCollector(Collector):
    """What waits at the router, looked at when scraped."""

    def __init__(self, model_name: str, waiting: Callable[[], Mapping[str, int]]) -> None:
        self._model_name = model_name
        self._waiting = waiting

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        about = "Choices that wait at the router until workers take them, further tries included"
        gauge = GaugeMetricFamily("tandem:router_queue_choices", about, labels=["model_name", "slo_class"])
        for slo_class, waiting in sorted(self._waiting().items()):
            gauge.add_metric([self._model_name, slo_class], waiting)
        yield gauge
