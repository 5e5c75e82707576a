"""The systems that claims compare: pools of workers on the paced device with a profile, and on the real CPU engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import EngineConfig
from ..latency.profile import StepProfile
from ..models.registry import CONFIGS
from .arrivals import arrival_times
from .claims_cluster import System
from .claims_virtual import EngineShape, Job, Served, VirtualEngine

MODEL = "opt-13b"
DISTSERVE_MODEL = "facebook/opt-13b"
KV_TOKENS = {1: 66_144, 2: 163_008, 4: 356_752}
"""KV slots that OPT-13B leaves on A100-80Gs, by tensor parallelism: DistServe's `max_num_tokens.csv`. On one GPU that
is 66,144 x 819,200 bytes = 54.2 GB (40 layers x K and V x 40 heads x 128 x 2 bytes) beside 25.7 GB of weights."""
MAX_RUNNING = 256
BLOCK_SIZE = 16
CHUNK_BUDGETS = (256, 512, 1024, 2048)
WHOLE_PROMPTS = 2048
"""A budget that never cuts a prompt of this model."""


def token_bytes() -> int:
    """KV of one token, all layers, 16 bits a number."""
    config = CONFIGS[MODEL]
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2


def paced_engine(
    profile: str | Path, *, budget: int, batching: str = "iteration", tensor_parallel: int = 1
) -> EngineConfig:
    """OPT-13B in the place of A100-80Gs: step times from the profile's file, KV memory as theirs."""
    return EngineConfig(
        model=f"dummy:{MODEL}",
        device="paced",
        batching=batching,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=KV_TOKENS[tensor_parallel] * token_bytes(),
        max_batched_tokens=budget,
        max_running=MAX_RUNNING,
        max_waiting=4096,
        paced_profile=str(profile),
    )


def paced_systems(
    gpus: int, profile: str | Path, *, budget: int, prefill_profile: str | Path | None = None, prefill_tp: int = 1
) -> tuple[System, ...]:
    """The split, and all GPUs colocated: chunked with the budget given, and without mixing prompts and decode rows.

    Half of the GPUs prefill, in workers of `prefill_tp`. ValueError if that is no number of workers.
    """
    prefill = max(1, gpus // 2 // prefill_tp)
    decode = gpus - prefill * prefill_tp
    if decode < 1 or prefill_tp not in KV_TOKENS:
        raise ValueError(f"gpus: {gpus} with prefill_tp {prefill_tp} is not allowed; allowed: enough for both pools")
    whole = paced_engine(profile, budget=WHOLE_PROMPTS)
    wide = paced_engine(prefill_profile or profile, budget=WHOLE_PROMPTS, tensor_parallel=prefill_tp)
    parallel = "" if prefill_tp == 1 else f" (TP {prefill_tp})"
    return (
        System(
            label=f"{prefill} prefill{parallel} + {decode} decode",
            engine=whole,
            prefill=prefill,
            decode=decode,
            prefill_engine=wide,
            prefill_gpus=prefill_tp,
        ),
        System(label=f"{gpus} mixed, chunks of {budget}", engine=replace(whole, max_batched_tokens=budget), mixed=gpus),
        System(
            label=f"{gpus} mixed, prompts alone",
            engine=replace(whole, batching="prompts_alone"),
            mixed=gpus,
        ),
    )


def cpu_systems(model: str, workers: int, *, kv_cache_bytes: int, budget: int) -> tuple[System, ...]:
    """The real CPU engine, one thread for each worker."""
    engine = EngineConfig(model=model, kv_cache_bytes=kv_cache_bytes, max_batched_tokens=budget, max_waiting=4096)
    prefill = workers // 2
    return (
        System(
            label=f"{prefill} prefill + {workers - prefill} decode",
            engine=engine,
            prefill=prefill,
            decode=workers - prefill,
        ),
        System(label=f"{workers} mixed, chunks of {budget}", engine=engine, mixed=workers),
    )


def tuned_budget(
    lengths: Sequence[tuple[int, int]],
    profile: StepProfile,
    *,
    rate: float,
    ttft_s: float,
    tpot_s: float,
    budgets: Sequence[int] = CHUNK_BUDGETS,
    seed: int = 0,
) -> tuple[int, dict[int, float]]:
    """The chunk budget with the best attainment of one mixed engine at `rate` requests/s, in virtual time, and what
    each attains.
    """
    attained = {}
    for budget in budgets:
        shape = EngineShape(
            num_blocks=KV_TOKENS[1] // BLOCK_SIZE, max_batched_tokens=budget, max_running=min(MAX_RUNNING, budget)
        )
        arrivals = arrival_times(len(lengths), rate, 1.0, seed)
        jobs = [
            Job(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
            for arrival_s, (prompt, output) in zip(arrivals, lengths, strict=True)
        ]
        served = VirtualEngine(shape, profile).run(jobs)
        attained[budget] = sum(keeps(one, ttft_s, tpot_s) for one in served) / len(served)
    return max(attained, key=lambda budget: (attained[budget], budget)), attained


def keeps(served: Served, ttft_s: float, tpot_s: float) -> bool:
    """Whether a job met both promises; one of a single token has no TPOT."""
    return served.ttft_s <= ttft_s and (served.tpot_s or 0.0) <= tpot_s
