"""From a model, a device and a split to a simulated worker: what it costs, what it holds, what it hands over.

Costs come from one of three sources (`CostSource`): a roofline over the model's sizes, profiles that were measured (one
a split), or the coefficients that DistServe published. Memory always comes from the model's sizes
(`cluster.latency.memory`), so that a split that does not fit is refused with the arithmetic whatever it would cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..latency.hardware import Hardware
from ..latency.interface import StepCosts
from ..latency.memory import DEFAULT_UTILIZATION, WorkerMemory, worker_memory
from ..latency.model_facts import ModelFacts
from ..latency.profile import StepProfile, distserve_profile
from ..latency.roofline import Roofline
from ..types import Role
from .worker_spec import WorkerSpec

UNBOUNDED_WAITING = 1_000_000
"""Nobody is turned away at a worker's own door: planning wants to see a queue grow."""


class CostSource(Protocol):
    """Step costs of a replica by its split. Plain data, so that it can be sent to other processes."""

    def costs(self, tensor_parallel: int, pipeline_stages: int) -> StepCosts:
        """ValueError, naming what there is, for a split that nothing is known of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCosts:
    """From sizes and a hardware file (`cluster.latency.roofline`): any split that the model allows."""

    facts: ModelFacts
    hardware: Hardware

    def costs(self, tensor_parallel: int, pipeline_stages: int) -> StepCosts:
        """See `CostSource.costs`."""
        return Roofline(self.facts, self.hardware, tensor_parallel, pipeline_stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistServeCosts:
    """From a file of DistServe's simulator: the tensor parallelisms that stand in it, pipelines as it models them."""

    path: str
    model: str
    """As the file calls it, `facebook/opt-13b`."""

    def costs(self, tensor_parallel: int, pipeline_stages: int) -> StepCosts:
        """See `CostSource.costs`."""
        return distserve_profile(
            self.path, self.model, tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """Profiles that were measured, by (tensor_parallel, pipeline_stages): exactly those splits."""

    profiles: dict[tuple[int, int], StepProfile]

    def costs(self, tensor_parallel: int, pipeline_stages: int) -> StepCosts:
        """See `CostSource.costs`."""
        found = self.profiles.get((tensor_parallel, pipeline_stages))
        if found is None:
            known = ", ".join(f"TP {tensor} PP {stages}" for tensor, stages in sorted(self.profiles))
            raise ValueError(
                f"profile: there is none for TP {tensor_parallel} PP {pipeline_stages}; measured were {known}"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One worker as a plan has it."""

    role: Role
    tensor_parallel: int = 1
    pipeline_stages: int = 1
    node: str = ""
    """KV between two workers of one node goes over the link inside, else over the one between nodes."""
    max_batched_tokens: int = 2048
    """Of a step; of a mixed worker also what a prompt is cut into."""
    max_running: int = 256
    batching: str = "iteration"
    """`prompts_alone`: never a prompt and a decode row in one step, as before chunked prefill."""
    handoff_shards: int = 1
    """Over how many links, each inside a node of its own, KV leaves or comes at once: the stages of a pipeline whose
    counterpart has the same ones (DistServe, OSDI '24, §4.2)."""

    @property
    def gpus(self) -> int:
        """Devices that it takes."""
        return self.tensor_parallel * self.pipeline_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """A model on a kind of device: facts, memory and costs."""

    facts: ModelFacts
    hardware: Hardware
    source: CostSource
    utilization: float = DEFAULT_UTILIZATION
    block_size: int = 16
    max_model_len: int = 0
    """Longest prompt and answer together; 0: the model's."""
    prefix_cache: bool = False

    @property
    def context_tokens(self) -> int:
        """The longest context that a worker must hold."""
        return self.max_model_len or self.facts.config.max_model_len

    def memory(self, replica: Replica) -> WorkerMemory:
        """What it holds. DoesNotFit with the arithmetic, ValueError for a split that the model does not allow."""
        return worker_memory(
            self.facts,
            self.hardware,
            replica.tensor_parallel,
            replica.pipeline_stages,
            block_size=self.block_size,
            utilization=self.utilization,
            max_batched_tokens=replica.max_batched_tokens,
            max_rows=replica.max_running,
            min_tokens=self.context_tokens,
        )


_KNOWN: dict[tuple[int, int, int], tuple[CostSource, StepCosts]] = {}
"""By source, which is held so that its id stays its own, and split."""
_MAX_KNOWN = 1024


def costs_of(source: CostSource, tensor_parallel: int, pipeline_stages: int) -> StepCosts:
    """As `CostSource.costs`, worked out once: a search asks for the same few splits for every worker of every run."""
    key = id(source), tensor_parallel, pipeline_stages
    if key not in _KNOWN:
        if len(_KNOWN) >= _MAX_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = source, source.costs(tensor_parallel, pipeline_stages)
    return _KNOWN[key][1]


def worker_spec(
    worker_id: str, replica: Replica, device: DeviceModel, *, costs: StepCosts | None = None, num_blocks: int = 0
) -> WorkerSpec:
    """The simulated worker. DoesNotFit (a ValueError) where its memory does not suffice, with the arithmetic;
    ValueError for a split that the model does not allow or nothing is known of.

    `costs`, `num_blocks`: instead of the device's own, where a half of a cluster is to cost nothing.
    """
    return WorkerSpec(
        worker_id=worker_id,
        role=replica.role,
        costs=costs or costs_of(device.source, replica.tensor_parallel, replica.pipeline_stages),
        num_blocks=num_blocks or device.memory(replica).blocks,
        block_size=device.block_size,
        block_bytes=-(-device.block_size * device.facts.kv_bytes_per_token() // replica.handoff_shards),
        node=replica.node,
        max_batched_tokens=replica.max_batched_tokens,
        max_running=replica.max_running,
        max_waiting=UNBOUNDED_WAITING,
        max_model_len=device.context_tokens,
        batching=replica.batching,
        prefix_cache=device.prefix_cache,
    )
