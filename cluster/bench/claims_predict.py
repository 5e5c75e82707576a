"""What systems should attain, in virtual time: the staircase, requests and step profiles of the run with processes."""

from __future__ import annotations

from ...router.slo_classes import Promise
from ..config import EngineConfig
from ..latency.links import INSTANT
from ..latency.profile import read_profile
from ..sim.cluster import ClusterSpec, SimCluster
from ..sim.record import record
from ..sim.request import Asked
from ..sim.router import RouterSpec
from ..sim.worker_spec import WorkerSpec
from ..types import Role
from ..workload.sweep import SweepResult
from .claims_cluster import System
from .claims_load import Staircase, judge, sweep_of
from .claims_systems import token_bytes
from .claims_virtual import MAX_JOBS

_NO_PROMISE = Promise(slo_class="", share=1.0, ttft_s=None, tpot_s=None)


def predict(system: System, load: Staircase) -> tuple[SweepResult, ...]:
    """Attainment against rate under each promise. ValueError for a system that is not on a step profile.

    Nobody is refused, calls and transfers take no time, and neither does the host's work between two steps.
    """
    asked = [
        Asked(
            request_id=str(place),
            arrival_s=arrival_s,
            prompt_token_ids=(0,) * row.input_tokens,
            output_tokens=row.output_tokens,
        )
        for place, (arrival_s, row) in enumerate(zip(load.arrivals_s(), load.rows(), strict=True))
    ]
    router = RouterSpec(promises={"": _NO_PROMISE}, refuses=False)
    workers = _workers(system, load.max_model_len)
    spec = ClusterSpec(workers=workers, router=router, inside=INSTANT, between=INSTANT)
    records = [record(outcome) for outcome in SimCluster(spec).run(asked)]
    return tuple(
        sweep_of(
            system.label,
            load,
            promise,
            [[judge(records, load, promise, place, client_late=False)] for place in range(len(load.rates))],
        )
        for promise in load.promises
    )


def _workers(system: System, max_model_len: int) -> tuple[WorkerSpec, ...]:
    pools = (
        (Role.PREFILL, system.prefill, system.prefill_engine or system.engine),
        (Role.DECODE, system.decode, system.engine),
        (Role.MIXED, system.mixed, system.engine),
    )
    return tuple(
        _worker(f"{role}-{number}", role, engine, max_model_len)
        for role, count, engine in pools
        for number in range(count)
    )


def _worker(worker_id: str, role: Role, engine: EngineConfig, max_model_len: int) -> WorkerSpec:
    if engine.paced_profile is None:
        raise ValueError("paced_profile: is missing; allowed: the file of a step profile")
    return WorkerSpec(
        worker_id=worker_id,
        role=role,
        costs=read_profile(engine.paced_profile),
        num_blocks=engine.kv_cache_bytes // token_bytes() // engine.block_size,
        block_size=engine.block_size,
        max_batched_tokens=engine.max_batched_tokens,
        max_running=engine.max_running,
        max_waiting=MAX_JOBS,
        max_model_len=max_model_len,
        batching=engine.batching,
        prefix_cache=False,
    )
