"""KV memory of a GPU, and how its blocks reach the host and come back.

**Order.** Blocks move on a stream of their own, beside the engine's; nothing on the device orders the two, the host
does. A block is offered to readers after `Device.collect` has returned the step that wrote it, and `collect` has waited
for that step's event: whoever starts a copy then finds the step's writes done. A block that is written for a sequence
is read by a step only after `write_blocks` has returned, which waits for its copies, and is granted to a writer only
when every plan that named it has come back: so no step that is under way reads or writes it meanwhile.

**Staging.** Bytes pass through pinned buffers of bounded size: one for blocks that are read now, a few for those that
will be (`begin_read`: the copy and the sending before it overlap), two to write through (the host fills one while the
device empties the other). Blocks from `COPY_ALONE_BYTES` on travel each by itself, by the copy engine, so that a
transfer takes no multiprocessor from a step; smaller ones are gathered and scattered by a kernel
(`dispatch.kv_moves`), in one call and one copy.

**Sharing.** The memory is allocated with a descriptor (`kvtransfer.cuda_ipc.driver`), so that workers on this host copy
out of it device to device; generations stand in host memory, in `segment`. Where the driver cannot, the memory is
PyTorch's and nobody else's.

On `device="cpu"` the same code moves plain tensors: tests, and the measure of what staging itself costs.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ....kernels.dispatch import kv_moves
from ....kernels.gpu_plans.moves import Part
from ....kernels.operations import KvMoves
from ....kvtransfer.cuda_ipc.driver import Allocation, CudaUnsupported
from ....kvtransfer.layout import KVLayout
from ....kvtransfer.mapped.segment import KVSegment
from ....kvtransfer.neighbors import neighbors
from ....kvtransfer.store import BlockRead, KVStore
from ....kvtransfer.transport import MESSAGE_BYTES
from .kv_peers import GpuMemory, as_tensor, block_shape

logger = logging.getLogger(__name__)

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}
COPY_ALONE_BYTES = 128 * 2**10
"""A block of so much is worth a call to the copy engine."""
READS_AHEAD = 4
"""Buffers for blocks that are not sent yet; readers beyond them read when their turn comes."""


class _Buffer:
    """Room for some whole blocks, in host memory that the device can reach, and the event behind its last copy."""

    def __init__(self, store: DeviceKVStore, num_blocks: int) -> None:
        # Not the store, which has the buffers: a store that is dropped gives its memory back at once.
        self._block_bytes, self._stream = store.layout.block_bytes, store.stream
        self.bytes: torch.Tensor = store.host_memory(num_blocks * store.layout.block_bytes).view(num_blocks, -1)
        """[block, byte] uint8."""
        array: Any = self.bytes.numpy().reshape(-1)
        self.view = memoryview(array)
        self.ids: torch.Tensor = store.host_memory(8 * num_blocks).view(torch.int64)
        self._copied = torch.cuda.Event() if store.on_gpu else None

    @property
    def num_blocks(self) -> int:
        """That fit."""
        return self.bytes.shape[0]

    def blocks(self, count: int) -> list[memoryview]:
        """The first blocks, writable."""
        size = self._block_bytes
        return [self.view[i * size : (i + 1) * size] for i in range(count)]

    def record(self) -> None:
        """The copy that was just queued is this buffer's last one."""
        if self._copied is not None:
            self._copied.record(self._stream)

    def wait(self) -> None:
        """Until the last copy is done."""
        if self._copied is not None:
            self._copied.synchronize()


class _Read(BlockRead):
    def __init__(self, buffer: _Buffer, count: int, free: list[_Buffer]) -> None:
        self._buffer: _Buffer | None = buffer
        self._count = count
        self._free = free

    def views(self) -> list[memoryview]:
        assert self._buffer is not None, "this read has ended"
        self._buffer.wait()
        return [view.toreadonly() for view in self._buffer.blocks(self._count)]

    def end(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._free.append(buffer)  # a copy that is under way comes before the next one into it


class DeviceKVStore(KVStore):
    """`num_blocks` zeroed blocks of a layout with one group, as one tensor. Its engine's kernels use `tensor`; all else
    is called from one thread, the worker's event loop.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        device: torch.device | str,
        staging_bytes: int = MESSAGE_BYTES,
        copy_alone_bytes: int | None = None,
        shared: bool = True,
    ) -> None:
        """`shared`: on a GPU, others may have the memory, which then is not PyTorch's and lasts until `close`; False:
        it is counted and freed like any tensor. `staging_bytes`: of each buffer; one block at least.
        `copy_alone_bytes`: as COPY_ALONE_BYTES, which is the
        default on a GPU; on a CPU no kernel is used by default, since it would be interpreted.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks} is not >= 1")
        (group,) = layout.groups
        if group.dtype not in TORCH_DTYPES:
            raise ValueError(f"dtype: {group.dtype!r} is not one of {sorted(TORCH_DTYPES)}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.on_gpu: bool = self.device.type == "cuda"
        self.stream: Any = None
        if self.on_gpu:
            # Before the engine's: a copy is short, and a request waits for it.
            self.stream = torch.cuda.Stream(self.device, priority=-1)
        self.segment: KVSegment = KVSegment(layout, num_blocks, in_device=True)
        num_bytes = num_blocks * layout.block_bytes
        self._allocation = self._allocate(num_bytes) if self.on_gpu and shared else None
        if self._allocation is not None and self._allocation.fd is not None:
            memory = as_tensor(self._allocation, num_bytes).zero_()
            self.device_memory = GpuMemory(self, self._allocation.fd)
        else:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        shape = (num_blocks, *block_shape(layout))
        self.tensor: torch.Tensor = memory.view(TORCH_DTYPES[group.dtype]).view(shape)
        """[block, layer, 2, kv_head, slot, head_dim]."""
        if self.on_gpu:
            torch.cuda.current_stream(self.device).synchronize()  # the zeros, before another stream writes over them
        self._flat = self.tensor.view(num_blocks, -1).view(torch.uint8)
        default = COPY_ALONE_BYTES if self.on_gpu else 0
        alone = default if copy_alone_bytes is None else copy_alone_bytes
        self._by_kernel = layout.block_bytes < alone
        room = max(1, staging_bytes // layout.block_bytes)
        self._now = _Buffer(self, room)
        self._writing = (_Buffer(self, room), _Buffer(self, room))
        self._ahead = [_Buffer(self, room) for _ in range(READS_AHEAD)]
        """Free ones. Made now: this thread is on the right GPU, and no request waits for them."""
        self._room = room
        self._packed = self._packed_ids = torch.empty(0)
        if self._by_kernel:
            self._packed = torch.empty((room, layout.block_bytes), dtype=torch.uint8, device=self.device)
            self._packed_ids = torch.empty(room, dtype=torch.int64, device=self.device)

    def read_block(self, block_id: int) -> memoryview:
        return memoryview(bytes(self.read_blocks((block_id,))[0]))  # its own: the buffer is the next reader's

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        self.write_blocks((block_id,), (payload,))

    def read_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        self._check(block_ids)
        if len(block_ids) > self._room:
            raise ValueError(f"block_ids: {len(block_ids)} blocks are more than the {self._room} that are staged")
        self._copy_out(self._now, block_ids)
        self._now.wait()
        return [view.toreadonly() for view in self._now.blocks(len(block_ids))]

    def begin_read(self, block_ids: Sequence[int]) -> BlockRead | None:
        self._check(block_ids)
        if not self._ahead or len(block_ids) > self._room:
            return None
        buffer = self._ahead.pop()
        self._copy_out(buffer, block_ids)
        return _Read(buffer, len(block_ids), self._ahead)

    def write_blocks(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> None:
        self._check(block_ids)
        views = [memoryview(payload).cast("B") for payload in payloads]
        for view in views:
            if len(view) != self.layout.block_bytes:
                raise ValueError(f"payload: {len(view)} bytes are not one block ({self.layout.block_bytes} bytes)")
        if len(views) != len(block_ids):
            raise ValueError(f"payloads: {len(views)} for {len(block_ids)} blocks")
        for turn, start in enumerate(range(0, len(views), self._room)):
            buffer, part = self._writing[turn % 2], views[start : start + self._room]
            buffer.wait()
            for into, view in zip(buffer.blocks(len(part)), part, strict=True):
                into[:] = view
            self._copy_in(buffer, block_ids[start : start + len(part)])
        for buffer in self._writing:
            buffer.wait()

    def host_memory(self, num_bytes: int) -> torch.Tensor:
        """Page-aligned uint8 that the device can copy from and into without the host."""
        if self.on_gpu:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8))

    @property
    def moves(self) -> KvMoves:
        """What moves its blocks. Not asked for where the copy engine does: on CPUs nothing loads Triton."""
        return kv_moves(self.device)

    @property
    def device_index(self) -> int:
        """Of the GPU, as PyTorch counts them."""
        return self.device.index if self.device.index is not None else torch.cuda.current_device()

    def sent(self, values: Sequence[int]) -> torch.Tensor:
        """Integers as int64 on the device, once the stream is there."""
        on_host = torch.tensor(list(values), dtype=torch.int64, pin_memory=self.on_gpu)
        return on_host.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """What is launched meanwhile, by this thread, is launched on the store's stream."""
        with torch.inference_mode(), torch.cuda.stream(self.stream) if self.on_gpu else contextlib.nullcontext():
            yield

    def recorded(self) -> Any:
        """An event behind what was launched so; None where that is done."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def warm_up(self) -> None:
        """Has the kernels compiled that blocks are moved with, so that no pull holds the event loop for it. Before any
        block is somebody's; none is changed.
        """
        if not self.moves.compiles:
            return
        layers, heads = self.tensor.shape[1], self.tensor.shape[3]
        part = Part(num_layers=layers, num_heads=heads, num_tokens=self.layout.block_size)
        with self.streaming():
            none, first = self.sent([-1]), self.sent([0])
            self.moves.copy_blocks(self.tensor, self.tensor, none, none)
            self.moves.repack(self.tensor, self.tensor, first, first, part)
            if self._by_kernel:
                self.moves.gather_blocks(self._flat, none, self._packed[:1])
                self.moves.scatter_blocks(self._packed[:1], self._flat, none)
        if self.on_gpu:
            self.stream.synchronize()

    def close(self) -> None:
        """Waits for the device, then frees the memory: no tensor of it may be used any more. Idempotent."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        if self._allocation is not None:
            self._allocation.close()
        self.segment.close()

    def _copy_out(self, buffer: _Buffer, block_ids: Sequence[int]) -> None:
        count = len(block_ids)
        with self.streaming():
            if self._by_kernel:
                packed = self.moves.gather_blocks(self._flat, self._sent_ids(buffer, block_ids), self._packed[:count])
                buffer.bytes[:count].copy_(packed, non_blocking=True)
            else:
                for first, place, length in neighbors(block_ids):
                    stretch = self._flat[first : first + length]
                    buffer.bytes[place : place + length].copy_(stretch, non_blocking=True)
            buffer.record()

    def _copy_in(self, buffer: _Buffer, block_ids: Sequence[int]) -> None:
        count = len(block_ids)
        with self.streaming():
            if self._by_kernel:
                packed = self._packed[:count]
                packed.copy_(buffer.bytes[:count], non_blocking=True)
                self.moves.scatter_blocks(packed, self._flat, self._sent_ids(buffer, block_ids))
            else:
                for first, place, length in neighbors(block_ids):
                    stretch = self._flat[first : first + length]
                    stretch.copy_(buffer.bytes[place : place + length], non_blocking=True)
            buffer.record()

    def _sent_ids(self, buffer: _Buffer, block_ids: Sequence[int]) -> torch.Tensor:
        """The ids on the device, by way of the buffer's own pinned ones."""
        count = len(block_ids)
        buffer.wait()  # a read that ended early may not have taken its ids yet
        buffer.ids.numpy()[:count] = block_ids
        return self._packed_ids[:count].copy_(buffer.ids[:count], non_blocking=True)

    def _allocate(self, num_bytes: int) -> Allocation | None:
        """Memory that can be shared; None where the driver has none of that kind. `CudaError` where none is left."""
        try:
            return Allocation.create(num_bytes, self.device_index)
        except CudaUnsupported as error:
            logger.warning("KV memory is not shared with workers on this host: %s", error)
            return None

    def _check(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks:
                raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")
