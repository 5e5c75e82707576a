"""What systems should attain, in virtual time: the staircase, requests and step profiles of the run with processes."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import EngineConfig
from ..latency.profile import read_profile
from ..types import Role
from .claims_cluster import System
from .claims_load import Staircase, judge, sweep_of
from .claims_systems import token_bytes
from .claims_virtual import EngineShape, Job, Served
from .claims_virtual_pools import Pool, VirtualPools
from .report import RequestRecord
from .sweep import SweepResult


def predict(system: System, load: Staircase) -> tuple[SweepResult, ...]:
    """Attainment against rate under each promise. ValueError for a system that is not on a step profile."""
    jobs = [
        Job(arrival_s=arrival_s, prompt_tokens=row.input_tokens, output_tokens=row.output_tokens)
        for arrival_s, row in zip(load.arrivals_s(), load.rows(), strict=True)
    ]
    served = {id(one.job): one for one in VirtualPools(_pools(system, load.max_model_len)).run(jobs)}
    records = [_record(served[id(job)]) for job in jobs]
    return tuple(
        sweep_of(
            system.label,
            load,
            promise,
            [[judge(records, load, promise, place, client_late=False)] for place in range(len(load.rates))],
        )
        for promise in load.promises
    )


def _pools(system: System, max_model_len: int) -> Sequence[Pool]:
    pools = (
        (Role.PREFILL, system.prefill, system.prefill_engine or system.engine),
        (Role.DECODE, system.decode, system.engine),
        (Role.MIXED, system.mixed, system.engine),
    )
    return [_pool(role, count, engine, max_model_len) for role, count, engine in pools if count]


def _pool(role: Role, count: int, engine: EngineConfig, max_model_len: int) -> Pool:
    if engine.paced_profile is None:
        raise ValueError("paced_profile: is missing; allowed: the file of a step profile")
    shape = EngineShape(
        num_blocks=engine.kv_cache_bytes // token_bytes() // engine.block_size,
        block_size=engine.block_size,
        max_batched_tokens=engine.max_batched_tokens,
        max_running=engine.max_running,
        max_model_len=max_model_len,
        batching=engine.batching,
    )
    return Pool(role=role, count=count, shape=shape, profile=read_profile(engine.paced_profile))


def _record(served: Served) -> RequestRecord:
    return RequestRecord(
        due_s=served.job.arrival_s,
        sent_s=served.job.arrival_s,
        first_token_s=served.first_token_s,
        last_token_s=served.last_token_s,
        prompt_tokens=served.job.prompt_tokens,
        output_tokens=served.job.output_tokens,
    )
