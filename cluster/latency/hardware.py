"""What a device can do, from a YAML file: peaks, memory, links, and the constants that operators were fitted to.

`load_hardware("h100")` reads one of this package's own files (`hardware/*.yaml`: where each number is from stands
beside it), `load_hardware("my.yaml")` one of the user's. What is below the last comment of the A100's and the H100's
file is written by `python -m tandem.cluster.profiler.fit_operators`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated

from ..config_file import read_yaml
from ..config_schema import Bytes, ConfigError, Text, Within, check, nearest, parse
from .links import Link, LinkTerms
from .operators import OperatorTerms, Peaks

FOLDER = Path(__file__).with_name("hardware")


class DeviceKind(StrEnum):
    """What kind of device a file describes."""

    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Relative errors on operators that were not in the fit."""

    median: Annotated[float, Within(0.0)]
    p90: Annotated[float, Within(0.0)]
    points: Annotated[int, Within(1)]

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of device and how it is wired. ConfigError (a ValueError) names a field out of range."""

    name: Annotated[str, Text()]
    kind: DeviceKind
    memory_bytes: Annotated[int, Bytes(), Within(2**20)]
    reserved_bytes: Annotated[int, Bytes(), Within(0)] = 0
    """Of the memory, what the runtime takes before any weight: context, libraries, communication buffers."""
    memory_bandwidth_gb_s: Annotated[float, Within(0.0, 1e6, above=True)]
    peak_tflops: dict[str, Annotated[float, Within(0.0, 1e6, above=True)]]
    """By dtype of the products' inputs, without sparsity."""
    step_overhead_us: Annotated[float, Within(0.0, 1e9)] = 0.0
    """Of a step, once: what the engine does while the device waits."""
    devices_per_node: Annotated[int, Within(1, 1024)] = 1
    intra_node: LinkTerms
    inter_node: LinkTerms
    terms: OperatorTerms
    held_out: dict[str, HeldOut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        if not self.peak_tflops:
            raise ConfigError("peak_tflops", {}, "at least one dtype, e.g. bfloat16: 312")

    def peaks(self, dtype: str) -> Peaks:
        """For products of `dtype`. float16 and bfloat16 stand for each other. ConfigError if the file has none."""
        near = {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype, dtype)
        tflops = self.peak_tflops.get(dtype, self.peak_tflops.get(near))
        if tflops is None:
            raise ConfigError("dtype", dtype, f"one that {self.name} has a peak for: {', '.join(self.peak_tflops)}")
        return Peaks(tflops * 1e12, self.memory_bandwidth_gb_s * 1e9)

    def link(self, *, inside_node: bool) -> Link:
        """The link between two devices of one node, or of two."""
        terms = self.intra_node if inside_node else self.inter_node
        name = f"{self.name} {'inside a node' if inside_node else 'between nodes'}"
        return terms.named(name)


def known_hardware() -> list[str]:
    """Names of the files that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(reference: str) -> Hardware:
    """A device by the name of its file, or by the path of another one. ConfigError names the nearest known device, or
    what is wrong with the file.
    """
    if reference.endswith((".yaml", ".yml")):
        return read_hardware(Path(reference).expanduser())
    if reference.lower() not in known_hardware():
        near = nearest(reference, known_hardware())
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(
            "hardware", reference, f"{hint}a path to a .yaml file, or one of {', '.join(known_hardware())}"
        )
    return _packaged(reference.lower())


@cache
def _packaged(name: str) -> Hardware:
    return read_hardware(FOLDER / f"{name}.yaml")


def read_hardware(path: Path) -> Hardware:
    """A device out of a YAML file. ConfigError names the field, its value and what is allowed."""
    return parse(Hardware, read_yaml(path, "hardware") or {}, "")
