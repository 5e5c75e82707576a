"""The systems that claims compare: pools of workers on the paced device with a profile, and on the real CPU engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config import EngineConfig
from ..models.registry import CONFIGS
from .claims_cluster import System

MODEL = "opt-13b"
DISTSERVE_MODEL = "facebook/opt-13b"
KV_TOKENS = {1: 66_144, 2: 163_008, 4: 356_752}
"""KV slots that OPT-13B leaves on A100-80Gs, by tensor parallelism: DistServe's `max_num_tokens.csv`. On one GPU that
is 66,144 x 819,200 bytes = 54.2 GB (40 layers x K and V x 40 heads x 128 x 2 bytes) beside 25.7 GB of weights."""
MAX_RUNNING = 256
BLOCK_SIZE = 16
CHUNK_BUDGETS = (512, 2048)
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


def split(
    gpus: int,
    profiles: Mapping[int, str | Path],
    *,
    prefill: int | None = None,
    prefill_tp: int = 1,
    decode_tp: int = 1,
) -> System:
    """Pools of prefill and decode; `prefill` workers, or those of half of the GPUs. `profiles`: by tensor parallelism.
    ValueError if that is no number of workers.
    """
    count = max(1, gpus // 2 // prefill_tp) if prefill is None else prefill
    left = gpus - count * prefill_tp
    if prefill_tp not in KV_TOKENS or decode_tp not in KV_TOKENS or count < 1 or left < 1 or left % decode_tp:
        given = f"{gpus} with prefill {count}, prefill_tp {prefill_tp}, decode_tp {decode_tp}"
        raise ValueError(f"gpus: {given} is not allowed; allowed: enough for both pools, TP 1, 2 or 4")
    decode = left // decode_tp
    return System(
        label=f"{count} prefill{_tp(prefill_tp)} + {decode} decode{_tp(decode_tp)}",
        engine=paced_engine(profiles[decode_tp], budget=WHOLE_PROMPTS, tensor_parallel=decode_tp),
        prefill=count,
        decode=decode,
        prefill_engine=paced_engine(profiles[prefill_tp], budget=WHOLE_PROMPTS, tensor_parallel=prefill_tp),
        prefill_gpus=prefill_tp,
        worker_gpus=decode_tp,
    )


def colocated(
    gpus: int, profiles: Mapping[int, str | Path], *, budget: int | None, tensor_parallel: int = 1, source: str = ""
) -> System:
    """All GPUs mixed; `budget` None: prompts and decode rows never share a step. `source`: said in the label."""
    how = "prompts alone" if budget is None else f"chunks of {budget}"
    engine = paced_engine(
        profiles[tensor_parallel],
        budget=budget or WHOLE_PROMPTS,
        batching="prompts_alone" if budget is None else "iteration",
        tensor_parallel=tensor_parallel,
    )
    return System(
        label=f"{gpus // tensor_parallel} mixed{_tp(tensor_parallel)}, {how}{source}",
        engine=engine,
        mixed=gpus // tensor_parallel,
        worker_gpus=tensor_parallel,
    )


def candidates(gpus: int, profiles: Mapping[int, str | Path]) -> tuple[System, ...]:
    """Every way to use the GPUs that is worth a prediction: splits, then colocated ones."""
    splits = [
        split(gpus, profiles, prefill=prefill, prefill_tp=wide, decode_tp=deep)
        for wide in profiles
        for deep in profiles
        for prefill in range(1, gpus)
        if (left := gpus - prefill * wide) > 0 and left % deep == 0
    ]
    mixed = [
        colocated(gpus, profiles, budget=budget, tensor_parallel=parallel)
        for parallel in profiles
        if gpus % parallel == 0
        for budget in (*CHUNK_BUDGETS, None)
    ]
    return (*splits, *mixed)


def _tp(parallel: int) -> str:
    return "" if parallel == 1 else f" (TP {parallel})"


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
