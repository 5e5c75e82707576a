"""A cluster's own file, or a plan's, as the values of a scenario: what `tandem serve` would start, in virtual time.

    scenario = read_scenario(None, cluster_values(load_config("plan.yaml")) | {"rate": 8.0})

What a cluster's file does not say stands in the section `plan` of a plan's, as the problem that it answers, or has to
come from elsewhere: the hardware (its links; its steps where no profile is named) and the workload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...router.slo_classes import INTERACTIVE
from ..config import ClusterConfig, EngineConfig, RouterConfig, SLOClass
from ..config_schema import ConfigError
from ..latency.measured import QUANTIZED_DTYPES
from ..latency.model_facts import DTYPE_BYTES
from ..types import SLO, Role

_CPU_HARDWARE = "cpu-avx2"
_SHARED = ("block_size", "max_model_len", "prefix_cache")
_OF_THE_PROBLEM = ("hardware", "gpus_per_node", "intra_node", "inter_node", "memory_bytes", "utilization")
_OF_A_POOL = ("tensor_parallel", "pipeline_stages", "max_batched_tokens", "max_running", "max_waiting", "batching")
_OF_THE_ROUTER = (
    "max_waiting",
    "heartbeat_timeout_s",
    "worker_lost_after_s",
    "unready_wait_s",
    "max_attempts",
    "request_timeout_s",
    "local_prefill_threshold_tokens",
)


def cluster_values(config: ClusterConfig) -> dict[str, Any]:
    """Values by their dotted path in a scenario. ConfigError for workers whose step times stand in no file, or in one
    of other KV.
    """
    engines = {role: config.engine_of(role) for role in Role}
    counts = dict(config.pools)
    engine = next(engines[role] for role in Role if counts[role])
    held = sorted({engines[role].kv_cache_dtype for role in Role if counts[role]})
    if len(held) > 1:
        raise ConfigError("kv_cache_dtype", held, "one for all: KV is handed over as it is held")
    values: dict[str, Any] = {name: getattr(engine, name) for name in _SHARED}
    asked = {} if config.router.plan is None else config.router.plan.problem
    values |= {"model": engine.model, **_dtypes(engine, asked)}
    values |= {name: asked[name] for name in _OF_THE_PROBLEM if name in asked}
    if "profile" in asked and ("hardware" not in asked or engine.device == "cpu"):
        values["profile"] = asked["profile"]
        if engine.kv_cache_dtype != "auto":
            allowed = f"auto with a profile, whose KV is not narrow: {asked['profile']}"
            raise ConfigError("engine.kv_cache_dtype", engine.kv_cache_dtype, allowed)
    elif engine.device == "cpu":
        values["hardware"] = _CPU_HARDWARE
    for role, count in counts.items():
        values[f"{role.value}.workers"] = count
        if count:
            values |= {f"{role.value}.{name}": value for name, value in _pool(role, engines[role]).items()}
    values |= {f"router.{name}": getattr(config.router, name) for name in _OF_THE_ROUTER}
    return values | _load(config.router, asked.get("workload"))


def _dtypes(engine: EngineConfig, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of weights and of KV: the engine's; where it computes nothing those that it was planned for, whose times it
    takes. A block of KV stays as large as in the file.
    """
    dtype = QUANTIZED_DTYPES.get(engine.quantization or "", engine.dtype)
    kv_dtype = engine.dtype if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype
    if engine.device == "paced":
        dtype = asked.get("dtype", dtype)
        planned = str(asked.get("kv_dtype", dtype))
        kv_dtype = planned if DTYPE_BYTES.get(planned) == DTYPE_BYTES[engine.dtype] else engine.dtype
    return {"dtype": dtype, "kv_dtype": kv_dtype}


def _pool(role: Role, engine: EngineConfig) -> dict[str, Any]:
    if engine.device == "paced" and engine.paced_profile is None:
        raise ConfigError(f"{role.value}.engine.paced_profile", None, "a file, where workers are paced")
    values = {name: getattr(engine, name) for name in _OF_A_POOL}
    return values | {"kv_cache_bytes": engine.kv_cache_bytes or None, "profile": engine.paced_profile}


def _load(router: RouterConfig, planned: object) -> dict[str, Any]:
    """The load that was planned for, at its rate; promises are the router's, and so are the classes where there are
    others than were planned for, with as many requests each.
    """
    section = planned if isinstance(planned, Mapping) else {}
    values: dict[str, Any] = {f"workload.{name}": value for name, value in section.items() if name != "slo_classes"}
    classes: Mapping[str, SLO | SLOClass] = router.slo_classes or {INTERACTIVE: router.slo}
    shares = {name: 1.0 / len(classes) for name in classes}
    if isinstance(told := section.get("slo_classes"), Mapping) and told.keys() == classes.keys():
        shares = {name: one.get("share", 1.0) if isinstance(one, Mapping) else 1.0 for name, one in told.items()}
    sections: dict[str, Any] = {
        name: {"share": shares[name], "ttft_s": kind.ttft_s, "tpot_s": kind.tpot_s} for name, kind in classes.items()
    }
    for name, kind in router.slo_classes.items():
        sections[name]["queue_share"] = kind.share
    values["workload.slo_classes"] = sections
    rate = None if router.plan is None else router.plan.rate or router.plan.problem.get("rate")
    return values if rate is None else {**values, "rate": rate}
