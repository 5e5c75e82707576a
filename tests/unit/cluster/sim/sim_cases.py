"""Small simulated clusters and workloads."""

from __future__ import annotations

import random
from typing import Any

from tandem.cluster.latency.links import Link
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.sim.cluster import ClusterSpec, SimCluster
from tandem.cluster.sim.request import Asked
from tandem.cluster.sim.router import RouterSpec
from tandem.cluster.sim.worker_spec import WorkerSpec
from tandem.cluster.types import Role
from tandem.router.slo_classes import Promise

DECODE = DecodeTerms(step_s=0.01, row_s=0.0005, context_token_s=1e-7)
COSTS = StepProfile(
    prefill_step_s=0.008, prefill_token_s=1e-4, decode=DECODE, large_decode=DECODE, large_batch_rows=1000
)
NO_PROMISE = Promise(slo_class="", share=1.0, ttft_s=None, tpot_s=None)
FAST = Link(name="fast", bandwidth_gb_s=100.0)


def worker(worker_id: str, role: Role, **fields: Any) -> WorkerSpec:
    values: dict[str, Any] = {"costs": COSTS, "num_blocks": 4000, "block_bytes": 1000, "prefix_cache": False}
    return WorkerSpec(worker_id=worker_id, role=role, **{**values, **fields})


def cluster(*workers: WorkerSpec, inside: Link = FAST, between: Link = FAST, **router: Any) -> SimCluster:
    spec = RouterSpec(**{"promises": {"": NO_PROMISE}, "refuses": False, **router})
    return SimCluster(ClusterSpec(workers=workers, router=spec, inside=inside, between=between))


def split(prefill: int = 1, decode: int = 1, **fields: Any) -> tuple[WorkerSpec, ...]:
    names = [(f"p{index}", Role.PREFILL) for index in range(prefill)]
    names += [(f"d{index}", Role.DECODE) for index in range(decode)]
    return tuple(worker(name, role, **fields) for name, role in names)


def workload(count: int, rate: float, seed: int = 1, longest: int = 600, answer: int = 80) -> list[Asked]:
    draw, at_s, asked = random.Random(seed), 0.0, []
    for index in range(count):
        at_s += draw.expovariate(rate)
        prompt = tuple(draw.choices(range(2, 1000), k=draw.randint(1, longest)))
        asked.append(
            Asked(
                request_id=f"r{index}", arrival_s=at_s, prompt_token_ids=prompt, output_tokens=draw.randint(1, answer)
            )
        )
    return asked


def assert_clean(simulated: SimCluster) -> None:
    """Nothing of any request is left anywhere that lives."""
    for one in [one for one in simulated.workers if one.alive]:
        one.scheduler.check_integrity()
        one.holder.check_integrity()
        one.puller.check_integrity()
        load = one.scheduler.load()
        assert (load.waiting, load.running, load.held) == (0, 0, 0)
        assert load.free_blocks + load.cached_blocks == load.num_blocks
        assert (one.holder.counts().live, one.puller.counts().live) == (0, 0)
