"""How much KV a worker's GPU holds: what its part of the memory leaves beside weights, the largest step and graphs.

    usable = memory · gpu_memory_utilization - reserved
    KV     = usable - weights - activations - graphs
    blocks = KV // bytes of a block

The sum is `cluster.latency.memory`'s, with what was measured in place of what was estimated: weights and the peak of a
profiling step of `max_batched_tokens` are read from torch's allocator, which counts this process only, so that workers
that start beside each other on one GPU do not count each other's memory. Graphs are captured on top of the KV, behind
which they cannot be measured: `graph_bytes` says what to leave for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...latency.memory import DoesNotFit, gib
from ..parallel.messages import RankLost

RESERVED_BYTES = 900 * 2**20
"""What a process takes of a GPU before any tensor: CUDA's context and the libraries' workspaces, collectives
(`cluster/latency/hardware/h100.yaml`)."""
GRAPH_OVERHEAD_BYTES = 4 * 2**20
"""Of one captured graph, outside of its pool; an assumption until measured."""


_RAN_OUT = ("out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED")
"""What CUDA, its driver and its libraries call it."""
_SPLIT = "a quantization, or more ranks (tensor_parallel, pipeline_stages)"


@dataclass(frozen=True, slots=True)
class Phase:
    """Of a start, in which the device's memory may run out."""

    name: str
    helps: str
    """Fields that leave more room."""


LOADING = Phase("loading weights", _SPLIT)
KV = Phase("taking KV memory", f"fewer kv_cache_bytes or a lower gpu_memory_utilization, {_SPLIT}")
STEPS = Phase("computing a step", "fewer max_batched_tokens, fewer max_running, fewer kv_cache_bytes, " + _SPLIT)
CAPTURING = Phase(
    "capturing decode steps",
    "enforce_eager: true, fewer max_running, fewer kv_cache_bytes or a lower gpu_memory_utilization",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceShare:
    """A worker's part of one GPU."""

    name: str
    """What errors call the device."""
    total_bytes: int
    free_bytes: int
    """Before this worker took anything but what `RESERVED_BYTES` are for."""
    utilization: float
    """`gpu_memory_utilization`."""

    def check_free(self) -> None:
        """DoesNotFit where others hold so much of the device that this part of it cannot be had."""
        wanted, can_be = int(self.total_bytes * self.utilization), self.free_bytes + RESERVED_BYTES
        if wanted <= can_be:
            return
        most = int(can_be / self.total_bytes * 100) / 100
        raise DoesNotFit(
            f"gpu_memory_utilization: {self.utilization:g} of {gib(self.total_bytes)} of {self.name} is "
            f"{gib(wanted)}, but {gib(self.free_bytes)} are free: others hold "
            f"{gib(self.total_bytes - self.free_bytes)}; allowed: at most {most:g}, or stop them"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """What a loaded model takes of its device."""

    weight_bytes: int
    activation_bytes: int
    """Of the largest step, at its peak, beyond the weights."""
    graph_bytes: int
    max_batched_tokens: int
    """Of that largest step."""
    reserved_bytes: int = RESERVED_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRoom:
    """What is left for KV."""

    kv_bytes: int
    """A whole number of blocks."""
    blocks: int
    arithmetic: str
    """The sum, for a person."""


def kv_room(
    share: DeviceShare, taken: StepMemory, *, model: str, block_bytes: int, block_size: int, min_tokens: int = 1
) -> KVRoom:
    """Blocks of `block_size` tokens that fit. `min_tokens`: context that must, at least.

    Raises DoesNotFit (a ValueError) with the arithmetic, naming the fields that would help.
    """
    left = int(share.total_bytes * share.utilization) - taken.reserved_bytes - taken.weight_bytes
    left -= taken.activation_bytes + taken.graph_bytes
    blocks = max(left, 0) // block_bytes
    arithmetic = (
        f"{gib(share.total_bytes)} of {share.name} x {share.utilization:g} "
        f"- {gib(taken.reserved_bytes)} reserved - {gib(taken.weight_bytes)} weights "
        f"- {gib(taken.activation_bytes)} activations ({taken.max_batched_tokens} tokens) "
        f"- {gib(taken.graph_bytes)} graphs = {gib(left)} for KV, {blocks} blocks of {block_size} tokens"
    )
    wanted = max(-(-min_tokens // block_size), 1)
    if blocks < wanted:
        raise DoesNotFit(
            f"{model} does not fit: {arithmetic}; needed: KV of {max(min_tokens, block_size)} tokens, "
            f"{gib(wanted * block_bytes)}. More room: a higher gpu_memory_utilization ({share.utilization:g} now), "
            f"fewer max_batched_tokens ({taken.max_batched_tokens}), a quantization, or more ranks (tensor_parallel, "
            "pipeline_stages)"
        )
    return KVRoom(kv_bytes=blocks * block_bytes, blocks=blocks, arithmetic=arithmetic)


def check_weights(share: DeviceShare, *, model: str, weight_bytes: int, block_bytes: int) -> None:
    """DoesNotFit, before anything is read, where the weights leave no room for a block of KV."""
    left = int(share.total_bytes * share.utilization) - RESERVED_BYTES - weight_bytes
    if left < block_bytes:
        raise DoesNotFit(
            f"{model} does not fit: {gib(share.total_bytes)} of {share.name} x {share.utilization:g} "
            f"- {gib(RESERVED_BYTES)} reserved - {gib(weight_bytes)} weights = {gib(left)} for KV and activations. "
            f"More room: a higher gpu_memory_utilization ({share.utilization:g} now), {_SPLIT}"
        )


def check_asked_kv(share: DeviceShare, *, model: str, weight_bytes: int, kv_bytes: int) -> None:
    """DoesNotFit, before anything is read, where the weights and the KV that is asked for are more than is free.
    `kv_bytes`: of this rank.
    """
    left = share.free_bytes - weight_bytes - kv_bytes
    if left < 0:
        raise DoesNotFit(
            f"{model} does not fit: {gib(share.free_bytes)} free of {gib(share.total_bytes)} of {share.name} "
            f"- {gib(weight_bytes)} weights - {gib(kv_bytes)} KV (kv_cache_bytes) = {gib(left)} for activations. "
            f"More room: fewer kv_cache_bytes (0: what fits), {_SPLIT}"
        )


@contextlib.contextmanager
def fitting(model: str, phase: Phase) -> Iterator[None]:
    """DoesNotFit naming what helps where the device's memory runs out meanwhile."""
    try:
        yield
    except RankLost:
        raise  # whoever it was has told why
    except RuntimeError as error:
        if not any(words in str(error) for words in _RAN_OUT):
            raise
        told = str(error).partition("\n")[0].partition(" Of the allocated memory")[0].rstrip(".")
        raise DoesNotFit(
            f"{model} does not fit: the GPU's memory ran out {phase.name}: {told}. More room: {phase.helps}"
        ) from error


def graph_bytes(decode_peak_bytes: int, graphs: int) -> int:
    """To be left for captured graphs, before they are: one pool of the largest decode step's peak (`step_peak_bytes`),
    in which the others' activations fit, and what each graph takes beside it. 0 for none.
    """
    return decode_peak_bytes + graphs * GRAPH_OVERHEAD_BYTES if graphs else 0


def device_share(device: torch.device, utilization: float) -> DeviceShare:
    """Of a GPU, now: to be asked before anything is allocated on it."""
    free, total = torch.cuda.mem_get_info(device)
    return DeviceShare(
        name=torch.cuda.get_device_name(device), total_bytes=total, free_bytes=free, utilization=utilization
    )


def held_bytes(device: torch.device) -> int:
    """What this process's tensors take of a GPU, in the segments that torch keeps for them."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def step_peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """What a step takes of a GPU at its peak, beyond what is held before it. Runs it twice: the first time kernels are
    compiled and libraries take their workspaces, and both are counted.
    """
    held = held_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        run()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_reserved(device) - held)
