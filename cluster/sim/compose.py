"""From a scenario to what runs in virtual time: workers on their nodes, links, the router and its promises, requests.

    device = device_model(scenario)
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
from ..latency.hardware import Hardware, load_hardware
from ..latency.links import Link
from ..latency.measured import MeasuredProfile, read_measured
from ..latency.model_facts import ModelFacts, model_facts
from ..latency.profile import MEASURED, StepProfile, read_json, read_profile
from ..types import Role
from ..workload.spec import Row, Workload, WorkloadSpec, load
from .cluster import ClusterSpec
from .deploy import CostSource, DeviceModel, DistServeCosts, MeasuredCosts, Replica, RooflineCosts, worker_spec
from .router import RouterSpec
from .scenario import PoolSection, Scenario
from .worker import WorkerSpec


def device_model(scenario: Scenario) -> DeviceModel:
    """Model and device, as everybody but a pool with a profile of its own has them."""
    assert scenario.hardware is not None  # Scenario
    hardware = load_hardware(scenario.hardware)
    facts = _facts(scenario)
    longest = scenario.max_model_len or facts.config.max_model_len
    return DeviceModel(
        facts=facts,
        hardware=hardware,
        source=_source(scenario, facts, hardware),
        utilization=scenario.utilization,
        block_size=scenario.block_size,
        max_model_len=longest,
        prefix_cache=scenario.prefix_cache,
    )


def _facts(scenario: Scenario) -> ModelFacts:
    if scenario.model is None:
        assert scenario.profile is not None  # Scenario
        return read_measured(scenario.profile).facts
    return model_facts(scenario.model, dtype=scenario.dtype, kv_dtype=scenario.kv_dtype)


def _source(scenario: Scenario, facts: ModelFacts, hardware: Hardware) -> CostSource:
    if scenario.distserve is not None:
        return DistServeCosts(path=scenario.distserve, model=scenario.model or facts.name)
    profiles: dict[tuple[int, int], StepProfile] = {}
    for role, pool in scenario.pools:
        path = pool.profile or scenario.profile
        split = pool.tensor_parallel, pool.pipeline_stages
        if path is None:
            continue
        found = _costs(path)
        if profiles.setdefault(split, found) != found:
            raise ConfigError(f"{role}.profile", path, "the same for every pool of the same split")
    return MeasuredCosts(profiles=profiles) if profiles else RooflineCosts(facts=facts, hardware=hardware)


def _costs(path: str) -> StepProfile:
    """Steps of a worker: with what the engine adds, where it was measured."""
    measured = _measured(path)
    return read_profile(path) if measured is None else measured.costs()


def _measured(path: str | None) -> MeasuredProfile | None:
    """None: there is none, or it is one of steps only."""
    return read_measured(path) if path is not None and MEASURED in read_json(path) else None


def workers(scenario: Scenario, device: DeviceModel) -> tuple[WorkerSpec, ...]:
    """Every worker, on its node. ValueError naming the pool: DoesNotFit with the arithmetic, a split that is not
    possible.
    """
    nodes = _nodes(scenario, device.hardware)
    return tuple(
        _worker(f"{role.value}-{number}", role, pool, next(nodes), device)
        for role, pool in scenario.pools
        for number in range(pool.workers)
    )


def _worker(worker_id: str, role: Role, pool: PoolSection, node: str, device: DeviceModel) -> WorkerSpec:
    replica = Replica(
        role=role,
        tensor_parallel=pool.tensor_parallel,
        pipeline_stages=pool.pipeline_stages,
        node=node,
        max_batched_tokens=pool.max_batched_tokens,
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
        spec = worker_spec(worker_id, replica, device, num_blocks=blocks)
    except ConfigError as error:
        raise error.under(role.value) from None
    except ValueError as error:
        raise ValueError(f"{role.value}.{error}") from None
    return replace(spec, max_waiting=pool.max_waiting)


def _nodes(scenario: Scenario, hardware: Hardware) -> Iterator[str]:
    """The node of each worker, in order: filled one after another, a worker that is larger than a node begins one."""
    size = scenario.devices_per_node or hardware.devices_per_node
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
    device = device or device_model(scenario)
    inside, between = _links(scenario, device.hardware)
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
        ),
        inside=inside,
        between=between,
    )


def _links(scenario: Scenario, hardware: Hardware) -> tuple[Link, Link]:
    measured = _measured(scenario.profile)
    links = {} if measured is None else measured.links
    found = []
    for name, transport, given, inside in (
        ("inside", "mapped", scenario.links.inside, True),
        ("between", "grpc", scenario.links.between, False),
    ):
        own = links.get(transport) or hardware.link(inside_node=inside)
        found.append(own if given is None else given.named(name))
    return found[0], found[1]


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
    try:
        return load(scenario.workload, max_model_len=device.context_tokens)
    except ConfigError as error:
        raise error.under("workload") from None


def draw_rows(scenario: Scenario, workload: Workload) -> list[Row]:
    """The scenario's own requests. ConfigError names what is wrong."""
    rate, recorded = scenario.rate, workload.recorded_rate
    if rate is None and recorded is not None and scenario.rate_scale != 1.0:
        rate = recorded * scenario.rate_scale
    return workload.draw(rate=rate, seconds=scenario.seconds, num_requests=scenario.num_requests, seed=scenario.seed)
