"""From a scenario to what runs in virtual time: workers on their nodes, links, the router and its promises, requests.

    device = scenario.device()
    rows = draw_rows(scenario, read_workload(scenario, device))
    outcomes = SimCluster(cluster_spec(scenario, device)).run(asked(rows))

Pure but for reading the files that the scenario names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...router.slo_classes import BATCH, BATCH_SHARE, INTERACTIVE, INTERACTIVE_SHARE, Promise, SLOClasses
from ..config import RouterConfig, SLOClass
from ..config_schema import ConfigError
from ..latency.measured import read_measured
from ..latency.memory import DoesNotFit
from ..latency.profile import MEASURED, StepProfile, read_json, read_profile
from ..types import Role
from ..workload.spec import Arrivals, Row, Workload, WorkloadSpec
from .cluster import ClusterSpec, Failure
from .deploy import DeviceModel, Replica, worker_spec
from .router import RouterSpec
from .scenario import DEFAULT_REQUESTS, PoolSection, Scenario
from .worker_spec import WorkerSpec

MAX_BLOCKS = 2**22
"""Of KV in a simulated worker."""


def workers(scenario: Scenario, device: DeviceModel) -> tuple[WorkerSpec, ...]:
    """Every worker, on its node. ValueError naming the pool: DoesNotFit with the arithmetic, a split that is not
    possible.
    """
    nodes = _nodes(scenario)
    return tuple(
        _worker(f"{role.value}-{number}", role, pool, next(nodes), device, scenario.max_batched_tokens)
        for role, pool in scenario.pools
        for number in range(pool.workers)
    )


def _worker(
    worker_id: str, role: Role, pool: PoolSection, node: str, device: DeviceModel, max_batched_tokens: int
) -> WorkerSpec:
    replica = Replica(
        role=role,
        tensor_parallel=pool.tensor_parallel,
        pipeline_stages=pool.pipeline_stages,
        node=node,
        max_batched_tokens=pool.max_batched_tokens or max_batched_tokens,
        max_running=pool.max_running,
        batching=pool.batching,
    )
    blocks = 0
    if pool.kv_cache_bytes is not None:
        blocks = pool.kv_cache_bytes // (device.block_size * device.facts.kv_bytes_per_token())
        if blocks * device.block_size < device.context_tokens:
            needed = device.context_tokens * device.facts.kv_bytes_per_token()
            raise ConfigError(
                f"{role.value}.kv_cache_bytes", pool.kv_cache_bytes, f"at least {needed}, for the longest context"
            )
    try:
        costs = None if pool.profile is None else _costs(pool.profile)
        spec = worker_spec(worker_id, replica, device, costs=costs, num_blocks=blocks)
    except ConfigError as error:
        raise error.under(role.value) from None
    except DoesNotFit as error:
        raise DoesNotFit(f"{role.value}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{role.value}.{error}") from None
    if spec.num_blocks > MAX_BLOCKS:
        raise ConfigError(f"{role.value}.kv_cache_bytes", f"{spec.num_blocks} blocks", f"at most {MAX_BLOCKS} blocks")
    return replace(spec, max_waiting=pool.max_waiting)


def _nodes(scenario: Scenario) -> Iterator[str]:
    """The node of each worker, in order: filled one after another, a worker that is larger than a node begins one."""
    size = scenario.node_gpus
    node, free = -1, 0
    for _, pool in scenario.pools:
        devices = pool.tensor_parallel * pool.pipeline_stages
        for _ in range(pool.workers):
            if pool.node is not None:
                yield pool.node
                continue
            if free < devices:
                node, free = node + max(1, -(-devices // size)), size
            free = max(0, free - devices)
            yield f"node-{node}"


def cluster_spec(scenario: Scenario, device: DeviceModel | None = None) -> ClusterSpec:
    """What is simulated."""
    device = device or scenario.device()
    inside, between = scenario.links()
    return ClusterSpec(
        workers=workers(scenario, device),
        router=RouterSpec(
            promises=promises(scenario.workload),
            max_waiting=scenario.router.max_waiting,
            refuses=scenario.router.refuse,
            own_s=scenario.router.overhead_s,
            rpc_s=scenario.router.rpc_s,
            local_threshold_tokens=scenario.router.local_prefill_threshold_tokens,
            heartbeat_s=scenario.router.heartbeat_s,
            heartbeat_timeout_s=scenario.router.heartbeat_timeout_s,
            worker_lost_after_s=scenario.router.worker_lost_after_s,
            unready_wait_s=scenario.router.unready_wait_s,
            max_attempts=scenario.router.max_attempts,
            timeout_s=scenario.router.request_timeout_s,
        ),
        inside=inside,
        between=between,
        failures=tuple(
            Failure(worker_id=one.worker, at_s=one.at_s, back_s=one.back_s, silent=one.silent)
            for one in scenario.failures
        ),
    )


def _costs(path: str) -> StepProfile:
    """Steps of a worker: with what the engine adds, where it was measured."""
    return read_measured(path).costs() if MEASURED in read_json(path) else read_profile(path)


def promises(workload: WorkloadSpec) -> dict[str, Promise]:
    """What the router promises each class of the workload."""
    shares = {INTERACTIVE: INTERACTIVE_SHARE, BATCH: BATCH_SHARE}
    classes = {
        name: SLOClass(
            ttft_s=kind.ttft_s,
            tpot_s=kind.tpot_s,
            share=shares.get(name, 1.0) if kind.queue_share is None else kind.queue_share,
        )
        for name, kind in workload.classes.items()
    }
    try:
        known = SLOClasses(RouterConfig(slo_classes=classes))
    except ConfigError as error:
        raise error.under("workload") from None
    return {name: known.promise(name) for name in classes}


def read_workload(scenario: Scenario, device: DeviceModel) -> Workload:
    """The workload, held to the model's longest context."""
    return scenario.fitted(scenario.workload, device.context_tokens)


def draw_rows(scenario: Scenario, workload: Workload) -> list[Row]:
    """The scenario's own requests. ConfigError names what is wrong."""
    rate, recorded = scenario.rate, workload.recorded_rate
    if rate is None and recorded is not None and scenario.rate_scale != 1.0:
        rate = recorded * scenario.rate_scale
    count = scenario.num_requests
    if count is None and scenario.seconds is None and scenario.workload.arrivals is not Arrivals.TRACE:
        count = DEFAULT_REQUESTS
    return workload.draw(rate=rate, seconds=scenario.seconds, num_requests=count, seed=scenario.seed)
