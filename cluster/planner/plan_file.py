"""`plan.yaml`: a placement as a cluster's configuration that `tandem serve --config plan.yaml` starts, with what was
predicted of it in the section `plan` (`config.PlanConfig`).

Keys stand in a fixed order and nothing in it depends on when it was written, so that two plans can be compared by
`diff`. Workers that compute nothing (`device: paced`) take the times of their steps from files that lie beside it.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ... import __version__
from ..config_schema import ConfigError, plain
from ..latency.hardware import DeviceKind
from ..latency.model_facts import DTYPE_BYTES
from ..latency.profile import StepProfile
from ..latency.profile_fit import profile_of
from ..models.reference import DUMMY_PREFIX
from ..models.registry import CONFIGS
from ..types import Role
from ..workload.spec import WorkloadSpec
from .nodes import gpus_of, nodes_of
from .place import replicas_of
from .problem import Problem, SearchLimits
from .result import Candidate, Evaluation, PlanResult, Pool, Quantiles
from .setting import Setting
from .verdict import verdict
from .words import devices_text, loss_text, model_text, promises_text, source_text, workload_text

DEVICES = ("cpu", "cuda", "paced")
"""What workers of a cluster can be."""
MAX_WAITING = 1024
"""The plan was simulated without bounds on queues; these are so wide that they are met only beyond its rates."""
_PACED_CPUS = 1.6
"""Logical processors that Ray books for all workers that compute nothing, so that any plan starts on two cores."""
_MOST_PACED_CPUS = 0.9
_WIDTH = 116


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """What is written."""

    text: str
    profiles: dict[str, StepProfile]
    """By the name of their file, which stands beside the plan's."""

    def save(self, path: str | Path) -> list[Path]:
        """Writes all of it; says which files. Raises OSError."""
        target = Path(path)
        written = [target]
        for name, profile in self.profiles.items():
            profile.save(target.parent / name)
            written.append(target.parent / name)
        target.write_text(self.text, encoding="utf-8")
        return written


def device_of(problem: Problem, wanted: str | None = None) -> str:
    """What the plan's workers are to run on: `wanted`, else what was profiled, else the hardware's kind; GPUs are stood
    in for by the paced device, which rehearses a plan anywhere. ConfigError for one that there is not.
    """
    if wanted is not None:
        if wanted not in DEVICES:
            raise ConfigError("device", wanted, f"one of {', '.join(DEVICES)}")
        return wanted
    measured = problem.measured()
    if measured is not None and measured.measured.device in DEVICES:
        return measured.measured.device
    return "cpu" if problem.device_hardware().kind is DeviceKind.CPU else "paced"


def on_gpus(problem: Problem) -> bool:
    """Whether it was planned for GPUs, measured or not."""
    measured = problem.measured()
    if measured is not None:
        return measured.measured.device == "cuda"
    return problem.device_hardware().kind is not DeviceKind.CPU


def plan_file(
    problem: Problem,
    setting: Setting,
    result: PlanResult,
    chosen: Evaluation,
    *,
    name: str = "plan",
    device: str | None = None,
    command: Sequence[str] = (),
) -> PlanFile:
    """The file of `chosen`, one of the result's. `name`: of the file without suffix; `command`: as it was given."""
    kind = device_of(problem, device)
    document: dict[str, Any] = {
        "model": _model(problem, setting, kind),
        "engine": _shared_engine(problem, setting, kind),
    }
    profiles: dict[str, StepProfile] = {}
    for role in (Role.PREFILL, Role.DECODE, Role.MIXED):
        pool = chosen.candidate.pool(role)
        if pool is None:
            document[role.value] = 0
            continue
        engine = _pool_engine(setting, chosen.candidate, pool, kind)
        if kind == "paced":
            file = f"{name}.{role.value}.json"
            profiles[file] = _steps(problem, setting, pool)
            engine["paced_profile"] = file
        elif kind == "cuda":
            engine["gpus"] = list(gpus_of(setting, chosen.candidate)[role])
        document[role.value] = {"workers": pool.count, "engine": engine}
    workers = sum(pool.count for pool in chosen.candidate.pools)
    if kind == "paced":
        document["worker_cpus"] = max(0.01, min(_MOST_PACED_CPUS, int(_PACED_CPUS / workers * 100) / 100))
    document["router"] = _router(problem)
    document["plan"] = _prediction(problem, setting, result, chosen)
    ending = [f"made with   {shlex.join(command)}"] if command else []
    ending += _uses(chosen, kind, f"{name}.yaml", several_nodes=setting.nodes > 1, gpus=on_gpus(problem))
    head = _head(problem, setting, result, chosen, kind, ending)
    body = yaml.safe_dump(document, sort_keys=False, default_flow_style=False, width=_WIDTH, allow_unicode=True)
    return PlanFile(text=f"{head}\n{body}", profiles=profiles)


def _head(
    problem: Problem, setting: Setting, result: PlanResult, chosen: Evaluation, kind: str, ending: list[str]
) -> str:
    """Comments: what this is, where its workers belong, and at the end what is said of how it is used."""
    lines = [
        f"Made by tandem plan {__version__}: {chosen.candidate.label}.",
        verdict(result),
        "",
        f"model     {model_text(setting)}{_dtype_text(problem, setting)}",
        f"devices   {devices_text(setting)}; {source_text(problem, setting)}",
        f"workload  {workload_text(problem)}{loss_text(setting)}",
        f"promises  {promises_text(problem)}",
        *(f"{node:<9} {', '.join(workers)}" for node, workers in nodes_of(setting, chosen.candidate).items()),
        "",
    ]
    if kind == "paced":
        lines += ["The paced device computes nothing and takes the time that the plan predicts: a rehearsal.", ""]
    wrapped = [
        piece for line in [*lines, *ending] for piece in (textwrap.wrap(line, _WIDTH, subsequent_indent="  ") or [""])
    ]
    return "\n".join(f"# {line}".rstrip() for line in wrapped)


def _uses(chosen: Evaluation, kind: str, file: str, *, several_nodes: bool, gpus: bool) -> list[str]:
    """How it is started, where it can be, and how its prediction is seen again; of a rehearsal of GPUs (`gpus`), how
    it becomes more.
    """
    seen = "as predicted: nobody is refused; without --no-refuse as its router, which refuses what is lost anyway"
    uses = [f"simulate    tandem simulate --cluster {file} --no-refuse  ({seen})"]
    if kind == "paced" and gpus:
        uses.append(f"on GPUs     tandem plan --config {file} --device cuda --output {file}")
    if kind == "paced" and any(pool.pipeline_stages > 1 for pool in chosen.candidate.pools):
        return [*uses, "not served  the paced device has no pipelines; tandem plan --max-pp 1 plans without them"]
    if several_nodes:
        uses.append("on nodes    nodes: {prefill-0: [10.0.0.1]} names them by address, one for each stage")
    return [*uses, f"start with  tandem serve --config {file}"]


def _model(problem: Problem, setting: Setting, kind: str) -> str:
    """The reference that serves it: the paced device needs no weights, so any known architecture does."""
    measured = problem.measured()
    reference = problem.model or (None if measured is None else measured.measured.model)
    assert reference is not None  # Problem.facts has read it
    if kind != "paced" or reference.startswith(DUMMY_PREFIX):
        return reference
    if setting.device.facts.name in CONFIGS:
        return f"{DUMMY_PREFIX}{setting.device.facts.name}"
    path = Path(reference.removeprefix(DUMMY_PREFIX)).expanduser()
    return f"{DUMMY_PREFIX}{path.absolute()}" if path.exists() else reference


def _shared_engine(problem: Problem, setting: Setting, kind: str) -> dict[str, Any]:
    device = setting.device
    engine: dict[str, Any] = {
        "device": kind,
        "dtype": _dtype(setting),
        "block_size": device.block_size,
        "max_model_len": device.context_tokens,
        "prefix_cache": device.prefix_cache,
    }
    measured = problem.measured()
    if kind == "cpu" and measured is not None:
        engine["threads"] = measured.measured.threads
        if measured.measured.quantization is not None:
            engine["quantization"] = measured.measured.quantization
    if kind == "cuda" and device.facts.kv_dtype_bytes == 1:
        engine["kv_cache_dtype"] = "fp8"  # whatever was planned: int8, of the same size, wants scales that nobody has
    return engine


def _dtype(setting: Setting) -> str:
    """Of weights and of KV as an engine's configuration has it; 8 bits are a quantization there, or narrow KV."""
    return "float32" if setting.device.facts.kv_dtype == "float32" else "bfloat16"


def _dtype_text(problem: Problem, setting: Setting) -> str:
    """What the file's workers have instead of the precision that was planned for; empty: they have it."""
    planned, held, measured = setting.device.facts.dtype, _dtype(setting), problem.measured()
    if planned == held or (measured is not None and measured.measured.quantization is not None):
        return ""
    return f" (served as {held}{', of the same size' if DTYPE_BYTES[planned] == DTYPE_BYTES[held] else ''})"


def _pool_engine(setting: Setting, candidate: Candidate, pool: Pool, kind: str) -> dict[str, Any]:
    device = setting.device
    replica = next(one for one in replicas_of(setting, candidate) if one.role is pool.role)
    facts = device.facts if kind == "cuda" else replace(device.facts, kv_dtype=_dtype(setting))
    token_bytes = facts.kv_bytes_per_token()
    engine: dict[str, Any] = {}
    if pool.worker_gpus > 1:
        engine |= {"tensor_parallel": pool.tensor_parallel, "pipeline_stages": pool.pipeline_stages}
    engine |= {
        "kv_cache_bytes": device.memory(replica).blocks * device.block_size * token_bytes,
        "max_batched_tokens": pool.max_batched_tokens,
        "max_running": pool.max_running,
        "max_waiting": MAX_WAITING,
    }
    if pool.batching != "iteration":
        engine["batching"] = pool.batching
    return engine


def _steps(problem: Problem, setting: Setting, pool: Pool) -> StepProfile:
    """What the paced device takes: a profile as it is, a roofline as a profile that was fitted to it."""
    measured = problem.measured()
    if measured is not None:
        return measured.steps  # a real worker on a paced device has an engine's overhead of its own
    costs = setting.device.source.costs(pool.tensor_parallel, pool.pipeline_stages)
    if isinstance(costs, StepProfile):
        return costs
    split = f"TP {pool.tensor_parallel} PP {pool.pipeline_stages}"
    source = f"{source_text(problem, setting)}, {setting.device.facts.name}, {split}"
    profile, _ = profile_of(
        costs,
        max_tokens=pool.max_batched_tokens,
        max_rows=pool.max_running,
        max_context=setting.device.context_tokens,
        source=source,
    )
    return profile


def _router(problem: Problem) -> dict[str, Any]:
    """Promises: every class its own, and who names no class that of the class with most requests."""
    classes = problem.workload.classes
    most = max(classes.values(), key=lambda kind: kind.share)
    sections = {}
    for name, kind in classes.items():
        section = {"ttft_s": kind.ttft_s, "tpot_s": kind.tpot_s}
        sections[name] = section if kind.queue_share is None else {**section, "share": kind.queue_share}
    return {"slo": {"ttft_s": most.ttft_s, "tpot_s": most.tpot_s}, "slo_classes": sections, "max_waiting": MAX_WAITING}


def _prediction(problem: Problem, setting: Setting, result: PlanResult, chosen: Evaluation) -> dict[str, Any]:
    """The section `plan`, in the order of `PlanConfig`."""
    section: dict[str, Any] = {}
    found = chosen.prediction
    if found is not None:
        section |= {
            "predicted_attainment": round(found.attainment, 4),
            "predicted_by_class": {name: round(share, 4) for name, share in found.by_class.items()},
            "rate": _told_rate(found.rate),
            "ttft_ms": _quantiles(found.ttft),
        }
        if found.tpot is not None:
            section["tpot_ms"] = _quantiles(found.tpot)
    seeds = f"seeds {result.seeds[0]} to {result.seeds[-1]}" if result.seeds else "one seed"
    return {
        **section,
        "goodput_per_gpu": _told_rate(chosen.goodput_per_gpu),
        "placement": chosen.candidate.label,
        "model": model_text(setting),
        "workload": f"{workload_text(problem)}; {promises_text(problem)}",
        "made_with": f"tandem {__version__}, {source_text(problem, setting)}, {seeds}",
        "problem": _asked(problem),
    }


def _asked(problem: Problem) -> dict[str, Any]:
    """The problem but for how it was searched and what is as always; files by their whole path. Of the search: which
    splits it may not look at, for these make another problem.
    """
    asked = {name: value for name, value in _told(problem).items() if name != "search"}
    limits = {name: value for name, value in _told(problem.search).items() if name.startswith("max_")}
    if limits:
        asked["search"] = limits
    workload = asked["workload"] = _told(problem.workload)
    for section, names in ((asked, ("model", "hardware", "profile")), (workload, ("lengths",))):
        for name in names:
            if name in section and Path(section[name]).expanduser().exists():
                section[name] = str(Path(section[name]).expanduser().absolute())
    return asked


def _told(spec: Problem | SearchLimits | WorkloadSpec) -> dict[str, Any]:
    """What is not as its field has it by default."""
    told = {}
    for one in fields(spec):
        value = getattr(spec, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if value != default:
            told[one.name] = _said(plain(value))
    return told


def _said(value: Any) -> Any:
    """Without what is None in it."""
    if not isinstance(value, dict):
        return value
    return {name: _said(entry) for name, entry in value.items() if entry is not None}


def _quantiles(found: Quantiles) -> dict[str, float]:
    return {name: _rounded(seconds * 1e3) for name, seconds in asdict(found).items()}


def _told_rate(value: float) -> float:
    """Three digits, as everywhere a rate is told (`words.number`)."""
    return float(f"{value:.3g}")


def _rounded(value: float) -> float:
    """Four digits: what is below differs between machines."""
    return float(f"{value:.4g}")
