"""How fast virtual time passes: standard scenes, simulated again and again, by the CPU time of this process.

OPT-13B on A100s, in float16, under a load that is near saturation: mixed workers, prefill and decode apart, one pair
with pipelines. Costs are the packaged roofline's or, where a file is given, DistServe's measured coefficients; lengths
a pool's or, without one, uneven made-up ones. Prompts share nothing and no prefix cache looks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any

from ...router.slo_classes import Promise
from ..latency.hardware import load_hardware
from ..latency.interface import StepCosts
from ..latency.links import Link
from ..latency.model_facts import model_facts
from ..latency.profile import distserve_profile
from ..latency.roofline import Roofline
from ..sim.cluster import ClusterSpec, SimCluster
from ..sim.prompts import asked
from ..sim.request import Outcome
from ..sim.router import RouterSpec
from ..sim.worker_spec import WorkerSpec
from ..types import Role
from ..workload.spec import Workload, WorkloadSpec, load

MODEL, HARDWARE = "opt-13b", "a100-80g"
KV_TOKENS = 66_144
"""What fits beside OPT-13B's weights on one A100-80G (DistServe's profile)."""
TOKEN_BYTES = 2 * 40 * 5120 * 2
NVLINK = Link(name="nvlink", bandwidth_gb_s=200.0, latency_us=10.0)
_PROMISE = Promise(slo_class="interactive", share=1.0, ttft_s=2.0, tpot_s=0.15)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """What is measured."""

    requests: int = 4000
    rounds: int = 3
    seed: int = 0
    profile: str | None = None
    """DistServe's file of measured coefficients; None: the packaged roofline."""
    lengths: str | None = None
    """A pool of lengths (`cluster.workload.traces` says in which formats)."""

    def __post_init__(self) -> None:
        for name, most in (("requests", 1_000_000), ("rounds", 100)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name}: {value} is not allowed; allowed: 1 to {most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A cluster and its load."""

    name: str
    workers: tuple[tuple[Role, int, int], ...]
    """Role, how many, pipeline stages of each."""
    rate: float
    promised: bool = False
    """Requests whose promise cannot be kept are refused."""


SCENES = (
    Scene(name="4 mixed", workers=((Role.MIXED, 4, 1),), rate=12.0),
    Scene(name="2 prefill + 2 decode", workers=((Role.PREFILL, 2, 1), (Role.DECODE, 2, 1)), rate=14.0),
    Scene(name="the same, promised", workers=((Role.PREFILL, 2, 1), (Role.DECODE, 2, 1)), rate=14.0, promised=True),
    Scene(name="1 + 1, 2 stages", workers=((Role.PREFILL, 1, 2), (Role.DECODE, 1, 2)), rate=8.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneResult:
    """One scene; rates are of the median round, by process CPU time."""

    name: str
    requests: int
    decode_tokens: int
    """First tokens are prefill's, and not counted."""
    events: int
    steps: int
    refused: int
    simulated_s: float
    cpu_s: tuple[float, ...]
    digest: str
    """Of every time in every outcome: the same in each round, or the run is void."""

    @property
    def median_s(self) -> float:
        """CPU seconds of a round."""
        return statistics.median(self.cpu_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateResult:
    """All scenes."""

    options: SimulateOptions
    scenes: tuple[SceneResult, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return asdict(self)


def run_simulate(options: SimulateOptions, say: Callable[[str], None]) -> SimulateResult:
    """Measures every scene. ValueError where a file is not what it should be, or a round came out otherwise."""
    spec = (
        WorkloadSpec(lengths=options.lengths)
        if options.lengths
        else WorkloadSpec(input_tokens=290, output_tokens=186, range_ratio=0.95)
    )
    workload = load(spec, max_model_len=2048)
    costs = {stages: _costs(options, stages) for stages in (1, 2)}
    results = []
    for scene in SCENES:
        say(scene.name)
        rounds = [_round(scene, options, workload, costs) for _ in range(options.rounds)]
        if len({one.digest for one in rounds}) > 1:
            raise ValueError(f"{scene.name}: the same seed gave other times")
        cpu_s = tuple(one.cpu_s[0] for one in rounds)
        results.append(replace(rounds[0], cpu_s=cpu_s))
    return SimulateResult(options=options, scenes=tuple(results))


def _costs(options: SimulateOptions, stages: int) -> StepCosts:
    if options.profile is not None:
        return distserve_profile(options.profile, "facebook/opt-13b", pipeline_stages=stages)
    return Roofline(model_facts(MODEL, dtype="float16"), load_hardware(HARDWARE), 1, stages)


def _round(scene: Scene, options: SimulateOptions, workload: Workload, costs: dict[int, StepCosts]) -> SceneResult:
    rows = workload.draw(rate=scene.rate, seconds=None, num_requests=options.requests, seed=options.seed)
    requests = asked(rows, sharing=False)
    cluster = SimCluster(_cluster(scene, costs))
    began_s = time.process_time()
    outcomes = cluster.run(requests)
    cpu_s = time.process_time() - began_s
    return SceneResult(
        name=scene.name,
        requests=len(outcomes),
        decode_tokens=sum(max(0, outcome.output_tokens - 1) for outcome in outcomes),
        events=cluster.timeline.events_total,
        steps=sum(worker.engine.steps_total for worker in cluster.workers),
        refused=sum(bool(outcome.refused) for outcome in outcomes),
        simulated_s=cluster.timeline.now_s(),
        cpu_s=(cpu_s,),
        digest=digest(outcomes),
    )


def _cluster(scene: Scene, costs: dict[int, StepCosts]) -> ClusterSpec:
    workers = tuple(
        WorkerSpec(
            worker_id=f"{role}-{number}",
            role=role,
            costs=costs[stages],
            num_blocks=KV_TOKENS // 16,
            block_bytes=16 * TOKEN_BYTES,
            max_batched_tokens=2048,
            max_waiting=4096,
            prefix_cache=False,
        )
        for role, count, stages in scene.workers
        for number in range(count)
    )
    promise = _PROMISE if scene.promised else Promise(slo_class="interactive", share=1.0, ttft_s=None, tpot_s=None)
    router = RouterSpec(promises={"interactive": promise}, refuses=scene.promised, own_s=0.001, rpc_s=0.0005)
    return ClusterSpec(workers=workers, router=router, inside=NVLINK, between=NVLINK)


def digest(outcomes: list[Outcome]) -> str:
    """Of everything that became of every request."""
    lines = (
        f"{one.asked.request_id} {one.refused} {one.failed} {one.dispatched_s!r} {one.first_token_s!r} "
        f"{one.last_token_s!r} {one.output_tokens} {one.queue_s!r} {one.prefill_s!r} {one.decode_queue_s!r} "
        f"{one.exposed_transfer_s!r} {one.transferred_bytes} {one.cached_tokens} {one.prefill_worker} "
        f"{one.decode_worker} {one.path} {one.tries}\n"
        for one in outcomes
    )
    return blake2b("".join(lines).encode(), digest_size=8).hexdigest()


def show(result: SimulateResult) -> str:
    """The table."""
    lines = [
        f"{'scene':22} {'decode tokens/s':>15} {'requests/s':>10} {'events/s':>9} {'steps/s':>8} "
        f"{'simulated s per s':>17} {'refused':>7}  digest"
    ]
    lines += [
        f"{one.name:22} {one.decode_tokens / one.median_s:15,.0f} {one.requests / one.median_s:10,.0f} "
        f"{one.events / one.median_s:9,.0f} {one.steps / one.median_s:8,.0f} {one.simulated_s / one.median_s:17,.0f} "
        f"{one.refused:7,}  {one.digest}"
        for one in result.scenes
    ]
    rounds, count = result.options.rounds, result.options.requests
    lines.append(f"one core, process CPU time, median of {rounds} rounds of {count:,} requests")
    return "\n".join(lines)
