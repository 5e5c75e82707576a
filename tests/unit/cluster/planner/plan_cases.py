"""Problems and hand-made results for tests of what a plan looks like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.cluster.planner.problem import Problem, load_problem
from tandem.cluster.planner.result import (
    Affinity,
    Binding,
    Candidate,
    Evaluation,
    Fate,
    Interval,
    Marginal,
    PhaseResult,
    PlanResult,
    Pool,
    Prediction,
    Quantiles,
    RatePoint,
)
from tandem.cluster.types import Role

OPT: dict[str, Any] = {
    "model": "opt-13b",
    "hardware": "a100-80g",
    "gpus_per_node": 4,
    "workload.input_tokens": 512,
    "workload.output_tokens": 64,
    "workload.slo_classes": {"chat": {"ttft_s": 0.25, "tpot_s": 0.1}},
}


def opt(**changes: Any) -> Problem:
    """OPT-13B on four A100s; `workload__input_tokens=9` stands for `workload.input_tokens`."""
    return load_problem(None, OPT | {name.replace("__", "."): value for name, value in changes.items()})


def split(prefill: int = 1, decode: int = 1, prefill_tp: int = 2, decode_tp: int = 1, **changes: Any) -> Candidate:
    pools = (
        Pool(role=Role.PREFILL, count=prefill, tensor_parallel=prefill_tp),
        Pool(role=Role.DECODE, count=decode, tensor_parallel=decode_tp),
    )
    return Candidate(pools=pools, **({"affinity": Affinity.HIGH} | changes))


def mixed(count: int = 3, chunk: int = 512) -> Candidate:
    return Candidate(pools=(Pool(role=Role.MIXED, count=count, max_batched_tokens=chunk),), affinity=Affinity.COLOCATED)


def evaluated(candidate: Candidate, goodput: float, spread: float = 0.05, **changes: Any) -> Evaluation:
    """Kept up to `goodput` requests/s, and less and less beyond."""
    rates = [goodput * share for share in (0.25, 0.5, 0.75, 1.0, 1.15, 1.4)]
    points = tuple(
        RatePoint(
            rate=rate,
            seed=seed,
            attainment=max(0.0, min(1.0, 1.0 - 0.1 * (rate / goodput) ** 6 + 0.01 * (seed - 1))),
            late_attainment=max(0.0, min(1.0, 1.0 - 0.12 * (rate / goodput) ** 6 + 0.01 * (seed - 1))),
            requests=500,
        )
        for rate in rates
        for seed in (0, 1, 2)
    )
    found = Evaluation(
        candidate=candidate,
        fate=Fate.SIMULATED,
        bound=goodput * 1.5,
        goodput=Interval(mean=goodput, low=goodput * (1 - spread), high=goodput * (1 + spread)),
        seeds=(goodput * (1 - spread / 2), goodput, goodput * (1 + spread / 2)),
        points=points,
        binding=Binding(promise="ttft", slo_class="chat", share=0.83),
        simulated_requests=9000,
        simulated_s=1.5,
        prediction=Prediction(
            rate=goodput,
            attainment=0.912,
            by_class={"chat": 0.912},
            ttft=Quantiles(p50=0.081234, p90=0.212, p99=0.4),
            tpot=Quantiles(p50=0.02, p90=0.031, p99=0.09),
        ),
    )
    return replace(found, **changes)


def refused(candidate: Candidate, why: str = "opt-13b does not fit: 80.00 GiB x 0.9 - 24 GiB weights") -> Evaluation:
    return Evaluation(candidate=candidate, fate=Fate.REFUSED, why=why)


def result(**changes: Any) -> PlanResult:
    """Disaggregated 2.0 requests/s per GPU against 1.5 colocated."""
    best, colocated = evaluated(split(), 6.0), evaluated(mixed(), 4.5)
    others = (evaluated(split(2, 1), 8.0), evaluated(mixed(4), 5.6), refused(split(1, 1, 1, 4)))
    found = PlanResult(
        disaggregated=best,
        colocated=colocated,
        difference=Interval(mean=0.5, low=0.41, high=0.59),
        explored=(best, colocated, *others),
        phases=tuple(
            PhaseResult(
                role=role,
                tensor_parallel=tensor,
                pipeline_stages=stages,
                fate=Fate.SCREENED if stages == 1 else Fate.REFUSED,
                goodput=2.5 * tensor if stages == 1 else 0.0,
                why="" if stages == 1 else "does not fit: 80.00 GiB",
            )
            for role in (Role.PREFILL, Role.DECODE)
            for tensor in (1, 2, 4)
            for stages in (1, 2)
        ),
        marginal=(
            Marginal(role=Role.PREFILL, gpus=2, goodput=8.2, gain=2.2),
            Marginal(role=Role.DECODE, gpus=1, goodput=6.0, gain=0.0),
        ),
        input_tokens=512.0,
        output_tokens=64.0,
        seeds=(0, 1, 2),
        resolution=0.02,
        simulated_requests=54_000,
        wall_s=3.2,
        cpu_s=6.1,
    )
    return replace(found, **changes)
