"""A profile that was measured (`tandem profile`): its steps, its transfers, what the engine adds, and where that was.

The file is that of a `StepProfile` with one section more, `measured`, so that whoever wants only steps reads it as one
(`engine.paced_profile`, `profile.read_profile`). Pure but for reading and writing the file.

    profile = read_measured("smollm2-cpu.json")
    profile.costs(), profile.links, profile.facts, profile.memory(24 * 2**30).blocks
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from ..config_schema import ConfigError, Text, Within, check, parse, plain
from ..models.config import ModelConfig
from .links import Link, LinkTerms
from .memory import DeviceMemory, WorkerMemory, worker_memory
from .model_facts import ModelFacts
from .profile import MEASURED, StepProfile, read_json, step_profile

QUANTIZED_DTYPES = {"w8a8": "int8"}
"""What a parameter is kept as, by `EngineConfig.quantization`."""
_Count = Annotated[int, Within(0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One kind of step, its sizes as `cluster.engine.step_shape` counts them, timed several times."""

    prefill_tokens: _Count = 0
    prefill_squares: _Count = 0
    decode_rows: _Count = 0
    context_tokens: _Count = 0
    times_s: Annotated[tuple[float, ...], Within(0.0, above=True)]

    def __post_init__(self) -> None:
        check(self)
        _check_times(self.times_s)
        if self.prefill_tokens + self.decode_rows == 0:
            raise ConfigError("prefill_tokens", 0, "a step that computes a token")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What `StepCosts.step_time_s` takes."""
        return self.prefill_tokens, self.prefill_squares, self.decode_rows, self.context_tokens

    @property
    def kind(self) -> str:
        """`prefill`, `decode` or `mixed`."""
        if not self.decode_rows:
            return "prefill"
        return "mixed" if self.prefill_tokens else "decode"

    @property
    def median_s(self) -> float:
        """Of its times."""
        return statistics.median(self.times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTransfer:
    """One size over one transport, timed several times: from the end of prefill to the last byte."""

    link: Annotated[str, Text()]
    size_bytes: Annotated[int, Within(1)]
    times_s: Annotated[tuple[float, ...], Within(0.0, above=True)]

    def __post_init__(self) -> None:
        check(self)
        _check_times(self.times_s)

    @property
    def median_s(self) -> float:
        """Of its times."""
        return statistics.median(self.times_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointErrors:
    """Of predicted against measured, |predicted / measured - 1|."""

    median: Annotated[float, Within(0.0)]
    p90: Annotated[float, Within(0.0)]
    worst: Annotated[float, Within(0.0)]
    points: Annotated[int, Within(1)]

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The section `measured`: what was measured, of what, on what. ConfigError names a field out of range."""

    model: Annotated[str, Text()]
    """As it was asked for."""
    model_config: ModelConfig
    device: Annotated[str, Text()]
    dtype: Annotated[str, Text()]
    quantization: Annotated[str | None, Text()] = None
    kernels: str = ""
    threads: Annotated[int, Within(1)] = 1
    block_size: Annotated[int, Within(1)]
    kv_token_bytes: Annotated[int, Within(1)]
    """KV of one token in all layers."""
    machine: str = ""
    memory_bytes: _Count = 0
    """Of the machine; 0: not known."""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    max_spread: Annotated[float, Within(0.0)] = 0.0
    """How far the middle half of a point's times may lie apart, as a share of their median."""
    steps: dict[str, MeasuredStep]
    transfers: dict[str, MeasuredTransfer] = field(default_factory=dict)
    links: dict[str, LinkTerms] = field(default_factory=dict)
    """By transport."""
    engine_overhead_s: Annotated[float, Within(0.0, 3600.0)] = 0.0
    """Between two steps. Not in the terms of the steps: a real worker on a paced device has its own."""
    others_busy: Annotated[float, Within(0.0, 1.0)] = 0.0
    """Of the machine's processors, what others used while steps were measured."""
    fitted: dict[str, PointErrors] = field(default_factory=dict)
    """By kind, on all points, by the profile."""
    held_out: dict[str, PointErrors] = field(default_factory=dict)
    """By kind, on each point by a fit that has not seen it."""
    left_out: tuple[str, ...] = ()
    """Points for which there was no time."""
    doubts: tuple[str, ...] = ()
    """Why it was not saved under the name that was asked for; none: it was."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredProfile:
    """A file of `tandem profile`."""

    steps: StepProfile
    measured: Measurement

    def costs(self) -> StepProfile:
        """What a step takes in a worker: the device's time and the engine's between two of them."""
        return replace(self.steps, overhead_s=self.steps.overhead_s + self.measured.engine_overhead_s)

    @property
    def links(self) -> dict[str, Link]:
        """By transport, e.g. `mapped`, `grpc`."""
        return {name: terms.named(name) for name, terms in self.measured.links.items()}

    def link(self, transport: str) -> Link:
        """ConfigError naming those that were measured, where this one was not."""
        try:
            return self.links[transport]
        except KeyError:
            known = ", ".join(self.links) or "none, this profile was measured without transfers"
            raise ConfigError("transport", transport, f"one that was measured: {known}") from None

    @property
    def facts(self) -> ModelFacts:
        """Sizes of the model that was measured."""
        m = self.measured
        dtype = QUANTIZED_DTYPES.get(m.quantization or "", m.dtype)
        return ModelFacts(name=m.model, config=m.model_config, dtype=dtype, kv_dtype=m.dtype)

    @property
    def block_bytes(self) -> int:
        """KV of one block, all layers: what a handoff moves for it."""
        return self.measured.block_size * self.measured.kv_token_bytes

    def memory(
        self,
        memory_bytes: int | None = None,
        *,
        reserved_bytes: int = 0,
        utilization: float = 0.9,
        max_batched_tokens: int = 512,
        max_rows: int = 64,
        min_tokens: int = 1,
    ) -> WorkerMemory:
        """What a worker holds that has `memory_bytes` of its own; None: all of the machine that was measured.

        DoesNotFit, ConfigError or ValueError as `memory.worker_memory`.
        """
        size = self.measured.memory_bytes if memory_bytes is None else memory_bytes
        if size < 1:
            raise ConfigError("memory_bytes", size or None, "what a worker has, as the profile does not say it")
        return worker_memory(
            self.facts,
            DeviceMemory(self.measured.machine or self.measured.device, size, reserved_bytes),
            block_size=self.measured.block_size,
            utilization=utilization,
            max_batched_tokens=max_batched_tokens,
            max_rows=max_rows,
            min_tokens=min_tokens,
        )

    def save(self, path: str | Path) -> None:
        """Writes the file that `read_measured` reads, whole or not at all. Raises OSError."""
        target = Path(path)
        text = json.dumps({**plain(self.steps), MEASURED: plain(self.measured)}, indent=1) + "\n"
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def read_measured(path: str | Path) -> MeasuredProfile:
    """What `MeasuredProfile.save` wrote. ValueError naming the file and what is wrong with it."""
    values = read_json(path)
    section = values.pop(MEASURED, None)
    if section is None:
        raise ValueError(f"profile: {path} has no section {MEASURED}; allowed: a file of `tandem profile`")
    steps = step_profile(values, str(path))
    try:
        return MeasuredProfile(steps=steps, measured=parse(Measurement, section, MEASURED))
    except ConfigError as error:
        raise ValueError(f"profile: {path}: {error}") from None


def _check_times(times_s: tuple[float, ...]) -> None:
    if not times_s:
        raise ConfigError("times_s", None, "at least one time")
