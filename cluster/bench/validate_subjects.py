"""The clusters that are validated, out of what a person writes: `1P+1D`, `2P+1D`, `2M`, `2M/512`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..config import ClusterConfig, EngineConfig, check_served
from ..latency.profile import DecodeTerms, StepProfile, read_profile
from ..types import Role, StepTimeCoefficients
from .claims_cluster import System
from .claims_systems import WHOLE_PROMPTS, colocated, split
from .validate_predict import Subject

DEFAULT_CHUNK = 512
MAX_WORKERS = 16
_SPLIT, _MIXED = re.compile(r"(\d+)P\+(\d+)D", re.IGNORECASE), re.compile(r"(\d+)M(?:/(\d+))?", re.IGNORECASE)
_CPU_WAITING = 4096
_QUICK = DecodeTerms(step_s=0.008, row_s=0.0, context_token_s=0.0)
QUICK_PROFILE = StepProfile(
    prefill_step_s=0.02,
    prefill_token_s=0.0,
    decode=_QUICK,
    large_decode=_QUICK,
    large_batch_rows=1,
    source="steps of 8 and 20 ms, for what processes add to them",
)


def parse_pools(text: str) -> tuple[int, int, int, int]:
    """(prefill, decode, mixed, token budget of mixed workers). ValueError."""
    if found := _SPLIT.fullmatch(text.strip()):
        prefill, decode, mixed, chunk = int(found[1]), int(found[2]), 0, WHOLE_PROMPTS
    elif found := _MIXED.fullmatch(text.strip()):
        prefill, decode, mixed, chunk = 0, 0, int(found[1]), int(found[2] or DEFAULT_CHUNK)
    else:
        prefill = decode = mixed = chunk = 0
    whole = mixed > 0 if not prefill else decode > 0
    if not (whole and prefill + decode + mixed <= MAX_WORKERS and chunk >= 1):
        raise ValueError(
            f"plans: {text!r} is not allowed; allowed: 2P+1D, 2M, or 2M/512 for chunks of 512 tokens, of at most "
            f"{MAX_WORKERS} workers"
        )
    return prefill, decode, mixed, chunk


def paced_subject(text: str, profile: str | Path) -> Subject:
    """Paced workers in the place of A100s under OPT-13B, by a step profile's file. ValueError."""
    prefill, decode, mixed, chunk = parse_pools(text)
    profiles = {1: profile}
    system = colocated(mixed, profiles, budget=chunk) if mixed else split(prefill + decode, profiles, prefill=prefill)
    engine, other = replace(system.engine, prefix_cache=False), system.prefill_engine
    return Subject(system=replace(system, engine=engine, prefill_engine=other and replace(other, prefix_cache=False)))


def config_subject(
    config: ClusterConfig, label: str, *, time_scale: float, folder: Path, profile: str | None = None
) -> Subject:
    """The cluster of a file that `tandem plan` wrote. Profiles of paced workers are written into `folder`, so many
    times as slow; engines that compute have the `profile` given. ValueError.
    """
    check_served(config)
    engines = {
        role: _scaled(config.engine_of(role), time_scale, folder / f"{label}.{role.value}.json")
        for role, count in config.pools
        if count
    }
    workers = config.prefill + config.decode + config.mixed
    if config.mixed and config.prefill:
        raise ValueError(f"config: {label} has mixed workers beside both pools, which the simulator does not know")
    if workers > MAX_WORKERS:
        raise ValueError(f"config: {label} has {workers} workers; allowed: at most {MAX_WORKERS} on one machine")
    system = System(
        label=label,
        engine=engines.get(Role.DECODE) or engines[Role.MIXED],
        prefill=config.prefill,
        decode=config.decode,
        mixed=config.mixed,
        prefill_engine=engines.get(Role.PREFILL),
    )
    computes = system.engine.device != "paced"
    return Subject(system=system, profile=profile if computes else None, router=config.router)


def _scaled(engine: EngineConfig, factor: float, path: Path) -> EngineConfig:
    """The engine with its step times in a file of its own; one that computes as it is."""
    if engine.device != "paced":
        return engine
    if engine.paced_profile is not None:
        profile = read_profile(engine.paced_profile)
    else:
        terms = StepTimeCoefficients(
            step_s=engine.paced_step_s,
            prefill_token_s=engine.paced_prefill_token_s,
            decode_row_s=engine.paced_decode_row_s,
            context_token_s=engine.paced_context_token_s,
        )
        profile = StepProfile.linear(terms)
    profile.scaled(factor).save(path)
    return replace(engine, paced_profile=str(path), prefix_cache=False)


def cpu_subject(text: str, model: str, profile: str | Path, *, kv_cache_bytes: int, max_model_len: int) -> Subject:
    """Workers that compute, one thread each, and the profile that was measured of them. ValueError."""
    prefill, decode, mixed, chunk = parse_pools(text)
    engine = EngineConfig(
        model=model,
        kv_cache_bytes=kv_cache_bytes,
        max_batched_tokens=min(chunk, DEFAULT_CHUNK),
        max_waiting=_CPU_WAITING,
        max_model_len=max_model_len,
        prefix_cache=False,
    )
    label = f"{mixed} mixed" if mixed else f"{prefill} prefill + {decode} decode"
    system = System(label=f"{label}, cpu", engine=engine, prefill=prefill, decode=decode, mixed=mixed)
    return Subject(system=system, profile=str(profile))
