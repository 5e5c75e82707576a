"""Another worker's KV on a GPU of this host, copied into this worker's own by kernels (`dispatch.kv_moves`).

Copies are queued on the store's stream (`kv_store`: the host orders them and the engine's steps). The kernels are
launched for whole blocks where both sizes are equal, else for tokens; both take any dtype and 64-bit offsets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ....kernels.gpu_plans.moves import Part
from ....kernels.operations import KvMoves
from ....kvtransfer.cuda_ipc.driver import Allocation, CudaError
from ....kvtransfer.cuda_ipc.memory import DeviceCopy, DeviceLost, DeviceMemory, PeerMemory
from ....kvtransfer.layout import KVLayout
from ....kvtransfer.mapped.segment import SegmentError


class Target(Protocol):
    """What is copied into: of a `DeviceKVStore`, which see."""

    layout: KVLayout
    tensor: torch.Tensor

    @property
    def moves(self) -> KvMoves:
        """Who copies."""

    @property
    def device_index(self) -> int:
        """Of its GPU."""

    def sent(self, values: Sequence[int]) -> torch.Tensor:
        """Integers on the device."""

    def streaming(self) -> AbstractContextManager[None]:
        """What is launched meanwhile goes to its stream."""

    def recorded(self) -> Any:
        """An event behind what was launched so."""


def as_tensor(allocation: Allocation, num_bytes: int) -> torch.Tensor:
    """The first bytes of device memory, uint8. Not valid after the allocation is closed."""
    # On the GPU where it lies: with another one's name PyTorch would copy it there.
    return torch.as_tensor(_Interface(allocation.address, num_bytes), device=torch.device("cuda", allocation.home()))


class _Interface:
    """CUDA array interface, version 3."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class GpuMemory(DeviceMemory):
    """The memory of a `DeviceKVStore` that was allocated to be shared."""

    def __init__(self, store: Target, fd: int) -> None:
        """`fd` stays the caller's."""
        self._store = store
        self.fd = fd

    def open(self, fd: int, layout: KVLayout, num_blocks: int) -> PeerMemory:
        num_bytes = num_blocks * layout.block_bytes
        try:
            allocation = Allocation.open(fd, num_bytes, self._store.device_index)
        except CudaError as error:
            raise SegmentError(f"its GPU memory cannot be mapped: {error}") from error
        try:
            memory = as_tensor(allocation, num_bytes)
        except RuntimeError as error:
            allocation.close()
            raise SegmentError(f"its GPU memory cannot be used: {error}") from error
        blocks = memory.view(self._store.tensor.dtype)
        return GpuPeer(self._store, blocks.view(num_blocks, *block_shape(layout)), allocation)


def block_shape(layout: KVLayout) -> tuple[int, ...]:
    """[L, 2, K, S, D] of a layout with one group."""
    (group,) = layout.groups
    return (group.num_layers, 2, group.num_kv_heads, layout.block_size, group.head_dim)


class GpuPeer(PeerMemory):
    """Blocks [N, L, 2, K, S, D] of another worker; `allocation` is what holds their mapping, if anything does."""

    def __init__(self, store: Target, blocks: torch.Tensor, allocation: Allocation | None) -> None:
        self._store = store
        self._blocks = blocks
        self._allocation = allocation

    def begin_copy(
        self, source_ids: Sequence[int], target_ids: Sequence[int], *, first_token: int, num_tokens: int
    ) -> DeviceCopy:
        try:
            with self._store.streaming():
                self._launch(source_ids, target_ids, first_token, num_tokens)
                return _Copy(self._store.recorded())
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error

    def close(self) -> None:
        if self._allocation is not None:
            self._allocation.close()

    def _launch(self, source_ids: Sequence[int], target_ids: Sequence[int], first: int, count: int) -> None:
        store, size = self._store, self._blocks.shape[4]
        own = store.layout.block_size
        if size == own and first % size == 0 and count % size == 0:
            begin, end = first // size, (first + count) // size
            store.moves.copy_blocks(
                self._blocks, store.tensor, store.sent(source_ids[begin:end]), store.sent(target_ids[begin:end])
            )
            return
        layers, heads = self._blocks.shape[1], self._blocks.shape[3]
        part = Part(num_layers=layers, num_heads=heads, first_token=first, num_tokens=count)
        assert math.prod(self._blocks.shape[1:]) // size == math.prod(store.tensor.shape[1:]) // own
        store.moves.repack(self._blocks, store.tensor, store.sent(source_ids), store.sent(target_ids), part)


class _Copy(DeviceCopy):
    def __init__(self, event: Any) -> None:
        """`event`: behind the copy; None where it is done."""
        self._event = event

    def done(self) -> bool:
        try:
            return self._event is None or bool(self._event.query())
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error

    def wait(self) -> None:
        try:
            if self._event is not None:
                self._event.synchronize()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error
