"""Phases apart or together, on one device: OPT-13B on A100s with the step times that DistServe's authors measured, the
lengths of ShareGPT, and systems that differ in nothing but how they batch. What the verdict of a plan rests on.

Two rows have the control planes of the systems that were measured (`cluster.sim.systems`); the others none, so that
only batching and the price of a mixed step are left. That price has two bounds: fixed costs once for both halves
(`cluster.latency.profile`: what operators say within 4 ms, `tests/paper`), or each half paid as if alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..latency.interface import StepCosts, StepRun
from ..sim.cluster import SimCluster
from ..sim.deploy import CostSource, Replica
from ..sim.prompts import asked
from ..sim.systems import DISTSERVE, TANDEM, VLLM, Control, ServingSystem
from ..types import SLO, Role
from ..workload.spec import WorkloadSpec, load
from .claims_load import crossing
from .replay import device_of

PROMISES = (SLO(ttft_s=0.2, tpot_s=0.1), SLO(ttft_s=0.2, tpot_s=0.03))
"""Those of DistServe's README for this model, and a tight one."""
TARGET = 0.9
RATES = tuple(0.25 * step for step in range(2, 17))
"""Requests a second and GPU."""
REQUESTS, SEED = 600, 1
PAID_APART = "the same, halves of a mixed step paid apart"
_IDEAL = replace(TANDEM, name="ideal", control=Control())


@dataclass(frozen=True, slots=True)
class Apart:
    """`StepCosts` of which a mixed step takes as long as its prompts and its decode rows one after the other."""

    costs: StepCosts

    @property
    def pipeline_stages(self) -> int:
        """See `StepCosts`."""
        return self.costs.pipeline_stages

    def step_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """See `StepCosts.step_time_s`."""
        return self._sum(self.costs.step_time_s, prefill_tokens, prefill_squares, decode_rows, context_tokens)

    def stage_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """See `StepCosts.stage_time_s`."""
        return self._sum(self.costs.stage_time_s, prefill_tokens, prefill_squares, decode_rows, context_tokens)

    def decode_steps(self, rows: int, context_tokens: int, steps: int) -> StepRun:
        """See `StepCosts.decode_steps`."""
        return self.costs.decode_steps(rows, context_tokens, steps)

    def _sum(self, time_s: Callable[[int, int, int, int], float], *sizes: int) -> float:
        if not sizes[0] or not sizes[2]:
            return time_s(*sizes)
        return time_s(sizes[0], sizes[1], 0, 0) + time_s(0, 0, sizes[2], sizes[3])


@dataclass(frozen=True, slots=True)
class ApartCosts:
    """A `CostSource` of `Apart`."""

    source: CostSource

    def costs(self, tensor_parallel: int, pipeline_stages: int) -> StepCosts:
        """See `CostSource.costs`."""
        return Apart(self.source.costs(tensor_parallel, pipeline_stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to serve on so many GPUs."""

    name: str
    system: ServingSystem
    workers: tuple[tuple[Replica, int], ...]
    apart: bool = False
    """Whether its mixed steps are priced by `Apart`."""

    @property
    def gpus(self) -> int:
        """Devices in all."""
        return sum(replica.gpus * count for replica, count in self.workers)


def contenders() -> list[Contender]:
    """See the module."""

    def mixed(name: str, tokens: int, batching: str = "iteration", *, apart: bool = False) -> Contender:
        replica = replace(_IDEAL.replica(Role.MIXED, 2), max_batched_tokens=tokens, batching=batching)
        return Contender(name=name, system=_IDEAL, workers=((replica, 2),), apart=apart)

    def split(name: str, system: ServingSystem, count: int, wide: int = 1) -> Contender:
        prefill, decode = system.replica(Role.PREFILL, 2), system.replica(Role.DECODE, wide)
        return Contender(name=name, system=system, workers=((prefill, 1), (decode, count)))

    return [
        split("DistServe as measured: prefill TP 2, decode TP 1", DISTSERVE, 1),
        Contender(name="vLLM 0.2 as measured", system=VLLM, workers=((VLLM.replica(Role.MIXED), 1),)),
        split("apart: prefill TP 2, decode TP 1", _IDEAL, 1),
        split("apart: prefill TP 2, decode TP 2", _IDEAL, 1, 2),
        mixed("together: 2 of TP 2, whole prompts alone", 16_384, "prompts_alone"),
        mixed("together: 2 of TP 2, chunks of 512", 512),
        mixed("together: 2 of TP 2, chunks of 2048", 2048),
        mixed(PAID_APART, 2048, apart=True),
    ]


def attainment(contender: Contender, data: Path, lengths: Path, rate: float, promises: Sequence[SLO]) -> list[float]:
    """The share of requests that keep each of `promises` at so many a second and GPU. `data`, `lengths`: the folder of
    DistServe's coefficients, the file of ShareGPT's lengths. ValueError, OSError.
    """
    device = replace(device_of(contender.system, data), max_model_len=2048)
    if contender.apart:
        device = replace(device, source=ApartCosts(device.source))
    workload = load(WorkloadSpec(lengths=str(lengths)), max_model_len=2048)
    rows = workload.draw(rate=rate * contender.gpus, seconds=None, num_requests=REQUESTS, seed=SEED)
    requests = [replace(request, slo_class="") for request in asked(rows)]
    outcomes = SimCluster(contender.system.cluster(contender.workers, device)).run(requests)
    return [sum(outcome.attains(promise) for outcome in outcomes) / len(outcomes) for promise in promises]


def goodput(contender: Contender, data: Path, lengths: Path, promises: Sequence[SLO] = PROMISES) -> list[float]:
    """Requests a second and GPU up to which TARGET of them keep each of `promises`; the rest as `attainment`."""
    curves: list[list[tuple[float, float]]] = [[] for _ in promises]
    for rate in RATES:
        shares = attainment(contender, data, lengths, rate, promises)
        for curve, share in zip(curves, shares, strict=True):
            curve.append((rate, share))
        if max(shares) < TARGET:
            break
    return [crossing(curve, TARGET) for curve in curves]


def show_goodput(rows: Sequence[tuple[Contender, Sequence[float]]]) -> str:
    """A table of Markdown."""
    names = " | ".join(_named(one) for one in PROMISES)
    lines = [
        f"| requests/s and GPU that {100 * TARGET:g} % keep | GPUs | {names} |",
        f"|---|---:|{'---:|' * len(PROMISES)}",
    ]
    for contender, found in rows:
        cells = " | ".join(f"{one:.2f}" for one in found)
        lines.append(f"| {contender.name} | {contender.gpus} | {cells} |")
    return "\n".join(lines)


def _named(promise: SLO) -> str:
    assert promise.ttft_s is not None
    assert promise.tpot_s is not None
    return f"{1e3 * promise.ttft_s:g} / {1e3 * promise.tpot_s:g} ms"
