"""Prometheus metrics of workers, from what they say of themselves: shown by a router for all of them, by a worker alone
for itself, under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from .proto.tandem_internal_v1_pb2 import WorkerStatus


def kv_usage(status: WorkerStatus) -> float:
    """Share of KV blocks that are held, 0 to 1; cached blocks that nobody holds count as available."""
    if not status.num_blocks:
        return 0.0
    held = status.num_blocks - status.free_blocks - status.cached_blocks
    return max(held, 0) / status.num_blocks


_WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerStatus], float]], ...] = (
    ("num_requests_running", "Sequences in the running batch", lambda s: s.running),
    ("num_requests_waiting", "Sequences that wait for a place or for KV", lambda s: s.waiting),
    ("num_requests_held", "Prefilled sequences whose KV waits for a decode worker", lambda s: s.held),
    ("kv_cache_usage_perc", "Share of KV blocks held; 1 is full", kv_usage),
    ("kv_blocks_free", "Blocks on the free list", lambda s: s.free_blocks),
    ("kv_blocks_cached", "Blocks that only the prefix cache keeps", lambda s: s.cached_blocks),
    ("kv_blocks_held", "Blocks with a holder", lambda s: s.num_blocks - s.free_blocks - s.cached_blocks),
    ("kv_blocks", "Blocks in all", lambda s: s.num_blocks),
    ("kv_blocks_credited", "Blocks promised to requests that are on their way", lambda s: s.credited_blocks),
    ("kv_blocks_credit_limit", "Most blocks that may be promised", lambda s: s.credit_limit_blocks),
    ("queued_prefill_tokens", "Prompt tokens admitted, not yet computed", lambda s: s.queued_prefill_tokens),
    ("context_tokens", "Sum of context over running sequences", lambda s: s.context_tokens),
    ("leases", "Handoffs whose KV is kept for a decode worker", lambda s: s.leases),
    ("pulls", "Transfers under way", lambda s: s.pulls),
    ("streams", "Sequences that run here for routers", lambda s: s.streams),
    ("ledger_integrity", "1: every block is accounted for", lambda s: s.integrity_ok),
    ("ledger_proof_age_seconds", "Since the block ledger was last proven", lambda s: s.integrity_age_s),
    ("worker_draining", "1: takes no new work", lambda s: s.draining),
    ("worker_role_version", "Raised with every change of role", lambda s: s.role_version),
)

_WORKER_COUNTERS: tuple[tuple[str, str, Callable[[WorkerStatus], float]], ...] = (
    ("num_preemptions", "Sequences put back to the queue", lambda s: s.preemptions_total),
    (
        "worker_prefix_cache_queries",
        "Context tokens looked up in this worker's prefix cache",
        lambda s: s.prefix_queries_tokens_total,
    ),
    ("worker_prefix_cache_hits", "Tokens of those whose KV was there already", lambda s: s.prefix_hits_tokens_total),
    ("engine_steps", "Model iterations", lambda s: s.steps_total),
    ("engine_late_steps", "Steps that took longer than a paced device promises", lambda s: s.late_steps_total),
    ("engine_computed_tokens", "Tokens whose KV was computed, prompts and answers", lambda s: s.computed_tokens_total),
)

_WORKER_LABELED: tuple[tuple[str, str, str, Callable[[WorkerStatus], Mapping[str, int]]], ...] = (
    ("kv_pulls", "Handoffs whose KV came to this worker, by transport", "transport", lambda s: s.pulls_total),
    (
        "worker_handoff_failures",
        "Handoffs that ended early on this worker, as reader or (expired) as holder",
        "reason",
        lambda s: s.handoff_failures_total,
    ),
)


class WorkerCollector(Collector):
    """Turns the last heartbeats into metrics when scraped, so that a worker that is gone leaves no stale series."""

    def __init__(self, workers: Callable[[], Iterable[WorkerStatus]]) -> None:
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        statuses = list(self._workers())
        labels = ["worker", "role"]
        for name, about, read in _WORKER_GAUGES:
            gauge = GaugeMetricFamily(f"tandem:{name}", about, labels=labels)
            for status in statuses:
                value = float(read(status))
                gauge.add_metric([status.worker_id, status.role], value if math.isfinite(value) else 0.0)
            yield gauge
        for name, about, read in _WORKER_COUNTERS:
            counter = CounterMetricFamily(f"tandem:{name}", about, labels=labels)
            for status in statuses:
                counter.add_metric([status.worker_id, status.role], float(read(status)))
            yield counter
        for name, about, label, read_map in _WORKER_LABELED:
            counter = CounterMetricFamily(f"tandem:{name}", about, labels=[*labels, label])
            for status in statuses:
                for name_of, count in sorted(read_map(status).items()):
                    counter.add_metric([status.worker_id, status.role, name_of], count)
            yield counter
        info_labels = [*labels, "epoch", "address", "device", "model", "fingerprint"]
        info = GaugeMetricFamily("tandem:worker_info", "1 for every live worker", labels=info_labels)
        for s in statuses:
            info.add_metric([s.worker_id, s.role, str(s.epoch), s.address, s.device, s.model, s.fingerprint], 1)
        yield info


def worker_registry(status: Callable[[], WorkerStatus]) -> CollectorRegistry:
    """What a worker's own `/metrics` shows: its status as of the scrape, under the names that the router uses."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(lambda: (status(),)))
    ProcessCollector(registry=registry)
    return registry
