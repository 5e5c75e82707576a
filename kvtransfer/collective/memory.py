"""A rank's KV memory as a collective reads and writes it: equal rows of bytes, gathered into one message or scattered
from one; and the memory that messages travel in. Loads torch.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.dispatch import kv_moves
from .plan import Rows

MAX_FREE_BYTES = 64 * 2**20
"""Of a rank: what four sessions have under way, of batches of 4 MiB. `holder` and `reader` bound what is in use."""


class RankMemory(ABC):
    """Used by several threads, each for blocks that nobody else uses."""

    device: torch.device

    @abstractmethod
    def gather(self, rows: Rows, message: torch.Tensor) -> None:
        """Copies rows into `message` [bytes], which is filled when this returns."""

    @abstractmethod
    def scatter(self, message: torch.Tensor, rows: Rows) -> None:
        """Copies `message` [bytes] to rows; when this returns, they are written."""

    @abstractmethod
    def clear(self, rows: Rows) -> None:
        """Writes zeros into rows; when this returns, they are written."""

    def empty(self, size: int) -> torch.Tensor:
        """Room for a message."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class HostRankMemory(RankMemory):
    """Memory of the host, as bytes."""

    device = torch.device("cpu")

    def __init__(self, memory: memoryview) -> None:
        """`memory`: all blocks, one after another, writable."""
        self._bytes: NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)

    def gather(self, rows: Rows, message: torch.Tensor) -> None:
        size = rows.row_bytes
        np.take(self._bytes.reshape(-1, size), rows.rows, axis=0, out=message.numpy().reshape(-1, size), mode="clip")

    def scatter(self, message: torch.Tensor, rows: Rows) -> None:
        size = rows.row_bytes
        self._bytes.reshape(-1, size)[rows.rows] = message.numpy().reshape(-1, size)

    def clear(self, rows: Rows) -> None:
        self._bytes.reshape(-1, rows.row_bytes)[rows.rows] = 0


class DeviceRankMemory(RankMemory):
    """A tensor on a GPU. Rows move through `dispatch.kv_moves`, on the calling thread's own stream: `Order` in
    `cluster.engine.gpu.kv_store` says why no stream must be waited for.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """[block, …], contiguous, of any dtype."""
        self.device = tensor.device
        self._bytes = tensor.view(torch.uint8).reshape(len(tensor), -1)
        self._ids_on_device = tensor.device.type == "cuda"

    def gather(self, rows: Rows, message: torch.Tensor) -> None:
        kv_moves(self.device).gather_blocks(
            self._rows(rows.row_bytes), self._ids(rows), message.view(-1, rows.row_bytes)
        )
        self._finish()

    def scatter(self, message: torch.Tensor, rows: Rows) -> None:
        kv_moves(self.device).scatter_blocks(
            message.view(-1, rows.row_bytes), self._rows(rows.row_bytes), self._ids(rows)
        )
        self._finish()

    def clear(self, rows: Rows) -> None:
        self._rows(rows.row_bytes).index_fill_(0, self._ids(rows), 0)
        self._finish()

    def _rows(self, row_bytes: int) -> torch.Tensor:
        return self._bytes.view(-1, row_bytes)

    def _ids(self, rows: Rows) -> torch.Tensor:
        return torch.from_numpy(rows.rows).to(self.device)

    def _finish(self) -> None:
        if self._ids_on_device:
            torch.cuda.current_stream(self.device).synchronize()


class MessageBuffers:
    """What messages of a rank travel in: what one has left is kept for the next, whichever pair of ranks either is of,
    so that what is kept hangs on no number of sessions. Used by the threads of all pairs.
    """

    def __init__(self, memory: RankMemory, limit_bytes: int = MAX_FREE_BYTES) -> None:
        self._memory = memory
        self._limit_bytes = limit_bytes
        self._free: deque[torch.Tensor] = deque()
        """In the order in which they were given back."""
        self._free_bytes = 0
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Kept now."""
        return self._free_bytes

    def take(self, size: int) -> torch.Tensor:
        """[size] bytes: of the smallest buffer that is free and large enough, else new."""
        with self._lock:
            fitting = [index for index, buffer in enumerate(self._free) if _whole_bytes(buffer) >= size]
            if fitting:
                index = min(fitting, key=lambda index: _whole_bytes(self._free[index]))
                buffer = self._free[index]
                del self._free[index]
                self._free_bytes -= _whole_bytes(buffer)
                return torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(buffer.untyped_storage())[:size]
        return self._memory.empty(size)

    def give(self, buffer: torch.Tensor) -> None:
        """Nothing reads or writes it any more, on no stream either. The oldest go where too many are kept."""
        size = _whole_bytes(buffer)
        if size > self._limit_bytes:
            return
        with self._lock:
            self._free.append(buffer)
            self._free_bytes += size
            while self._free_bytes > self._limit_bytes:
                self._free_bytes -= _whole_bytes(self._free.popleft())


def _whole_bytes(buffer: torch.Tensor) -> int:
    """It may have had a longer message before."""
    return buffer.untyped_storage().nbytes()
