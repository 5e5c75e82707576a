"""A model on devices as it is written down, in a plan's problem and in a simulation alike: names, files, memory, links.

Plain data, checked when it is made; what it names (a model, a hardware file, a profile) is read when asked for.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from ..config_file import read_yaml
from ..config_schema import Bytes, ConfigError, OneOf, Text, Within, assign, check
from ..latency.hardware import DeviceKind, Hardware, load_hardware
from ..latency.links import Link, LinkTerms, link_of
from ..latency.measured import MeasuredProfile, read_measured
from ..latency.memory import DEFAULT_UTILIZATION
from ..latency.model_facts import DTYPE_BYTES, ModelFacts, model_facts
from ..latency.profile import MEASURED, read_json, read_profile
from ..models.reference import DUMMY_PREFIX
from ..workload.spec import Workload, WorkloadSpec, load
from .deploy import CostSource, DeviceModel, DistServeCosts, MeasuredCosts, RooflineCosts

MAX_GPUS = 1024
_DTYPES = OneOf(tuple(DTYPE_BYTES))
_PATHS = ("profile", "hardware", "model")
_LINKS = ("intra_node", "inter_node")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """See the module. ConfigError (a ValueError) names a field out of range."""

    model: Annotated[str | None, Text()] = None
    """A registered name, a `config.json` or its folder; None: the one that `profile` measured."""
    dtype: Annotated[str, _DTYPES] = "bfloat16"
    """Of weights and activations, where `profile` does not say it."""
    kv_dtype: Annotated[str | None, _DTYPES] = None
    """None: that of the weights, 16 bits where those have 8."""
    hardware: Annotated[str | None, Text()] = None
    """The name of a hardware file or a path; None: that of the machine that `profile` measured."""
    profile: Annotated[str | None, Text()] = None
    """Instead of the hardware's roofline: a file of `tandem profile`, of a step profile (both: one worker, not split),
    or of DistServe's simulator."""
    gpus_per_node: Annotated[int | None, Within(1, MAX_GPUS)] = None
    """None: as many as the hardware's nodes have."""
    intra_node: Link | None = None
    """Between two devices of one node; None: the hardware's."""
    inter_node: Link | None = None
    memory_bytes: Annotated[int | None, Bytes(), Within(2**20)] = None
    """Of a device; None: the hardware's, or half of a profiled machine's, shared out among its workers."""
    utilization: Annotated[float, Within(0.0, 1.0, above=True)] = DEFAULT_UTILIZATION
    """Of a device's memory, what a worker may use."""
    block_size: Annotated[int, Within(1, 1024)] = 16
    max_model_len: Annotated[int | None, Within(1, 2**31 - 1)] = None
    """Longest prompt and answer together; None: the model's own."""
    prefix_cache: bool = False
    """Whether prompts of the trace that share a beginning find it cached."""

    def __post_init__(self) -> None:
        check(self)
        if self.model is None and self.profile is None:
            raise ConfigError("model", None, "a registered name, a config.json or its folder, as there is no profile")
        if self.hardware is None and self.profile is None:
            raise ConfigError("hardware", None, "the name of a hardware file or its path, as there is no profile")

    @property
    def node_gpus(self) -> int:
        """Devices of a node."""
        return self.gpus_per_node or self._base_hardware().devices_per_node

    def facts(self) -> ModelFacts:
        """Sizes of the model. ModelError or ConfigError (ValueErrors) where it is not known."""
        measured = self.measured()
        if self.model is None:
            if measured is None:
                raise ConfigError("model", None, f"a model, as {self.profile} does not say which it is of")
            return measured.facts
        reference = self.model.removeprefix(DUMMY_PREFIX)
        if measured is None:
            return model_facts(reference, dtype=self.dtype, kv_dtype=self.kv_dtype)
        facts = measured.facts
        asked = model_facts(reference)
        if (asked.config.num_layers, asked.config.hidden_size) != (facts.config.num_layers, facts.config.hidden_size):
            raise ConfigError("model", self.model, f"the profile's, {facts.name}")
        return facts

    def measured(self) -> MeasuredProfile | None:
        """The file of `tandem profile`; None: there is none, or it is of another kind."""
        if self.profile is None:
            return None
        if not Path(self.profile).exists():
            raise ValueError(
                f"profile: {self.profile} cannot be read (it is not there); measure it first, with nothing else "
                f"running for some minutes: {self._measuring(self.profile)}"
            )
        return read_measured(self.profile) if MEASURED in read_json(self.profile) else None

    def _measuring(self, profile: str) -> str:
        """The command that makes it, of what is written down here; all else is that command's own."""
        own = {one.name: one.default for one in fields(DeviceSpec)}
        given = {name: getattr(self, name) for name in ("model", "dtype", "block_size")}
        flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value != own[name]]
        return shlex.join(["tandem", "profile", *(word for flag in flags for word in flag), "--output", profile])

    def device(self) -> DeviceModel:
        """Model, device and costs: what replicas are made of. ValueError naming what cannot be read or does not fit
        together.
        """
        facts, hardware = self.facts(), self.device_hardware()
        return DeviceModel(
            facts=facts,
            hardware=hardware,
            source=self._source(facts, hardware),
            utilization=self.utilization,
            block_size=self._block_size(),
            max_model_len=self.context_tokens(facts),
            prefix_cache=self.prefix_cache,
        )

    def context_tokens(self, facts: ModelFacts) -> int:
        """The longest prompt and answer together. ConfigError where the model has no such context."""
        own = facts.config.max_model_len
        if self.max_model_len is not None and self.max_model_len > own:
            raise ConfigError("max_model_len", self.max_model_len, f"at most the model's own, {own}")
        return self.max_model_len or own

    def fitted(self, workload: WorkloadSpec, context_tokens: int) -> Workload:
        """The workload with its file read, held to that context. ValueError; where a context was asked for that is
        shorter than the model's own, that one is too short for the lengths.
        """
        try:
            return load(workload, max_model_len=context_tokens)
        except ConfigError as error:
            if error.field == "input_tokens" and context_tokens < self.facts().config.max_model_len:
                allowed = f"at least the workload's {error.value}"
                raise ConfigError("max_model_len", self.max_model_len, allowed) from None
            raise error.under("workload") from None

    def device_hardware(self) -> Hardware:
        """The hardware's file with this cluster's nodes, links and memory in it."""
        base = self._base_hardware()
        inside, between = self.links()
        return replace(
            base,
            memory_bytes=self.memory_bytes or base.memory_bytes,
            devices_per_node=self.node_gpus,
            intra_node=_terms(inside),
            inter_node=_terms(between),
        )

    def links(self) -> tuple[Link, Link]:
        """Between two devices of one node, and of two."""
        base, measured = self._base_hardware(), self.measured()
        inside, between = base.link(inside_node=True), base.link(inside_node=False)
        if measured is not None:
            inside = measured.links.get("mapped") or measured.links.get("grpc") or inside
        return self.intra_node or inside, self.inter_node or between

    def _block_size(self) -> int:
        measured = self.measured()
        return self.block_size if measured is None else measured.measured.block_size

    def _base_hardware(self) -> Hardware:
        if self.hardware is not None:
            return load_hardware(self.hardware)
        measured = self.measured()
        if measured is None:
            raise ConfigError("hardware", None, f"a hardware file; {self.profile} does not say what it is of")
        section = measured.measured
        # A profiled engine is one worker of the machine: half of what that has is shared out among them, the rest is
        # everybody else's.
        base = load_hardware("cpu-avx2" if section.device == DeviceKind.CPU else "a100-80g")
        workers = self.gpus_per_node or 1
        memory = (section.memory_bytes or base.memory_bytes) // 2 // workers
        name = section.machine or base.name
        return replace(base, name=name, memory_bytes=memory, reserved_bytes=base.reserved_bytes // workers)

    def _source(self, facts: ModelFacts, hardware: Hardware) -> CostSource:
        if self.profile is None:
            return RooflineCosts(facts=facts, hardware=hardware)
        measured = self.measured()
        if measured is not None:
            return MeasuredCosts(profiles={(1, 1): measured.costs()})
        data = read_json(self.profile)
        if any(_is_by_tensor_parallel(entry) for entry in data.values()):
            return DistServeCosts(path=self.profile, model=_distserve_name(self.profile, data, facts.name))
        return MeasuredCosts(profiles={(1, 1): read_profile(self.profile)})


def read_tree(
    path: str | Path | None,
    what: str,
    overrides: Mapping[str, Any] | None = None,
    pools: Iterable[str] = (),
    *,
    inside: Callable[[object], object] = lambda data: data,
) -> dict[str, Any]:
    """A YAML file of a DeviceSpec's fields and others, and values by dotted path that win over it, ready to be parsed.

    Sections of `pools` may be counts: `prefill: 2` for `prefill: {workers: 2}`. Links may be names, `25Gbps`,
    `300GB/s` or sections. Files that the YAML names are looked for beside it first. `inside`: from all that stands in
    the file to the fields. ConfigError names what is wrong with it; `what` is the file's name in it.
    """
    data = {} if path is None else inside(read_yaml(path, what))
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise ConfigError(what, data, "a section of keys and values")
    tree: dict[str, Any] = copy.deepcopy(dict(data))
    for name in pools:
        if name in tree and not isinstance(tree[name], Mapping):
            tree[name] = {"workers": tree[name]}
    if path is not None:
        _find_beside(tree, Path(path).parent, pools)
    for dotted, value in (overrides or {}).items():
        assign(tree, dotted, value)
    for name in _LINKS:
        if tree.get(name) is not None:
            tree[name] = link_of(tree[name], name)
    return tree


def _find_beside(tree: dict[str, Any], folder: Path, pools: Iterable[str]) -> None:
    """Makes paths of files that lie beside the problem's file, or below, its own; others stay as they are."""
    for name in _PATHS:
        tree.update(_beside(tree, name, folder))
    for name, key in (("workload", "lengths"), *((pool, "profile") for pool in pools)):
        section = tree.get(name)
        if isinstance(section, Mapping):
            tree[name] = {**section, **_beside(section, key, folder)}


def _beside(section: Mapping[str, Any], name: str, folder: Path) -> dict[str, str]:
    value = section.get(name)
    found = isinstance(value, str) and value.strip() and (folder / value).exists()
    return {name: str(folder / value)} if found and isinstance(value, str) else {}


def _terms(link: Link) -> LinkTerms:
    return LinkTerms(bandwidth_gb_s=link.bandwidth_gb_s, latency_us=link.latency_us)


def _is_by_tensor_parallel(entry: Any) -> bool:
    """Whether it is what DistServe's files have of a model."""
    return isinstance(entry, Mapping) and bool(entry) and all(str(key).isdecimal() for key in entry)


def _distserve_name(path: str, data: Mapping[str, Any], name: str) -> str:
    """What DistServe's file calls the model: `facebook/opt-13b` for opt-13b."""
    found = next((key for key in data if key.rsplit("/", 1)[-1].lower() == name.lower()), None)
    if found is None:
        raise ConfigError("model", name, f"one that {path} has: {', '.join(sorted(data))}")
    return found
