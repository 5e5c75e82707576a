"""The memories that KV is moved between for `tandem bench transfer`, and what a plain copy does in the same medium."""

from __future__ import annotations

import mmap
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ...kvtransfer.layout import KVGroup, KVLayout
from ...kvtransfer.memory_store import MemoryKVStore
from ...kvtransfer.store import KVStore
from ..ports import bind

MEMORIES = ("host", "staged", "cuda")
"""`host`: where a CPU engine has its KV. `staged`: tensors in host memory that are moved as a GPU's are, through the
same buffers: what staging costs where there is no GPU. `cuda`: a GPU's memory."""
LARGE_BYTES = 4 * 2**30
_PLAIN_BYTES = 256 * 2**20


def layout_of(block_bytes: int) -> KVLayout:
    """Blocks of this size: 16 tokens of 8 KV heads, 64 wide, bfloat16, as many layers as that takes; of one layer and
    one head where it is too small for that.
    """
    layers, rest = divmod(block_bytes, 16 * 2 * 8 * 64 * 2)
    heads, wide = (8, 64) if layers and not rest else (1, block_bytes // (16 * 2 * 2))
    group = KVGroup(
        name="layers", num_layers=layers if heads == 8 else 1, num_kv_heads=heads, head_dim=wide, dtype="bfloat16"
    )
    layout = KVLayout(block_size=16, groups=(group,))
    if layout.block_bytes != block_bytes:
        raise ValueError(f"block_kib: {block_bytes / 1024:g} is not allowed; allowed: multiples of 1/16 from 1/16 on")
    return layout


def make_store(memory: str, layout: KVLayout, num_blocks: int) -> KVStore:
    """Zeroed memory, every page of it in place."""
    if memory == "host":
        store = MemoryKVStore(layout, num_blocks)
        store.segment.commit()
        return store
    import torch

    from ..engine.gpu.kv_store import DeviceKVStore

    torch.set_num_threads(1)  # a copy's: a GPU's are not the processor's, and several would wait for each other
    return DeviceKVStore(layout, num_blocks, device="cpu" if memory == "staged" else "cuda")


def large_pull(block_bytes: int) -> int:
    """Blocks of a pull out of a GPU's memory that takes many times as long as its calls do: of some GiB, where two
    processes' KV and a plain copy's two sides are at most half of what is free.
    """
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    return min(LARGE_BYTES, free_bytes // 8) // block_bytes


def plain_copy(transport: str, memory: str, block_bytes: int, blocks: int) -> float:
    """Bytes a second of a plain copy in the medium of a transport: the device's own, this processor's, or a TCP
    connection to this machine. Best of some.
    """
    if transport == "cuda_ipc":
        return _device_copy(block_bytes, blocks)
    if transport == "mapped":
        return _memory_copy(block_bytes, blocks)
    return _loopback(block_bytes * blocks)


def _memory_copy(block_bytes: int, blocks: int) -> float:
    """A call a block, one thread, page-aligned, every page in place."""
    source, target = (np.frombuffer(mmap.mmap(-1, blocks * block_bytes), np.uint8) for _ in range(2))
    source[:], target[:] = 1, 2
    rows = tuple(zip(target.reshape(blocks, -1), source.reshape(blocks, -1), strict=True))

    def copy() -> None:
        for into, row in rows:
            into[:] = row

    return blocks * block_bytes / _best_s(copy)


def _device_copy(block_bytes: int, blocks: int) -> float:
    import torch

    torch_cuda: Any = torch.cuda
    source, target = (torch.zeros(blocks * block_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))

    def copy() -> None:
        target.copy_(source)
        torch_cuda.synchronize()

    return blocks * block_bytes / _best_s(copy)


def _loopback(num_bytes: int) -> float:
    """From one thread to another, who both give the interpreter away meanwhile; at least some MiB, so that the
    connection is at its pace.
    """
    payload = memoryview(bytearray(min(max(num_bytes, 16 * 2**20), _PLAIN_BYTES)))
    into = memoryview(bytearray(2**20))
    with bind("127.0.0.1", 0) as listener:
        listener.listen(1)
        with socket.create_connection(listener.getsockname()) as sender, listener.accept()[0] as receiver:

            def copy() -> None:
                sending = threading.Thread(target=sender.sendall, args=(payload,))
                sending.start()
                left = len(payload)
                while left:
                    left -= receiver.recv_into(into)
                sending.join()

            return len(payload) / _best_s(copy)


def _best_s(run: Callable[[], object], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        begin_s = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin_s)
    return min(taken)
