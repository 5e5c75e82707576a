"""What the ranks of a worker do together: sums and gathers within a stage, hidden states from stage to stage.

All ranks of a stage call the same operations in the same order. `Alone` is one rank; `TorchRanks` speaks through
torch.distributed's process groups, Gloo between processors and NCCL between GPUs. Its groups are made directly on a
prefixed store: no global group exists, so that a process may be in several workers' groups, one after another.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from .messages import RankLost

LOOPBACK = "127.0.0.1"
MAX_SENDS = 16
"""Hidden states on their way to the next stage at once."""


class Ranks(ABC):
    """One rank's end. Used by one thread. Every operation blocks, but for `send`, and raises `RankLost`."""

    tensor_parallel: int
    place: int

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x` [...] of a stage, the same bits on each; may overwrite `x`."""

    @abstractmethod
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[R, n] of each rank of a stage -> [R, ranks * n], in order of their places."""

    @abstractmethod
    def send(self, x: torch.Tensor, stage: int) -> None:
        """To the rank of the same place in another stage. `x` must not be changed afterwards."""

    @abstractmethod
    def recv(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        """Fills `x` from the rank of the same place in another stage, and returns it."""

    @abstractmethod
    def close(self) -> None:
        """Ends the connections, once what was sent has left; idempotent. Others may still be reading: theirs break."""


def meeting_point(path: str, num_ranks: int) -> Store:
    """Where ranks of one machine meet: a file that they have in common. No port is open to others."""
    return FileStore(path, num_ranks)


class Alone(Ranks):
    """A worker of one rank."""

    tensor_parallel = 1
    place = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def send(self, x: torch.Tensor, stage: int) -> None:
        raise AssertionError("one rank has no other stage")

    def recv(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        raise AssertionError("one rank has no other stage")

    def close(self) -> None:
        """Nothing is open."""


class TorchRanks(Ranks):
    """See the module."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        tensor_parallel: int,
        pipeline_stages: int,
        device: str = "cpu",
        timeout_s: float,
    ) -> None:
        """Meets the others at `store`; returns when all have come. `timeout_s`: for that, and for every operation.
        `device`: `cpu` (Gloo over loopback) or `cuda` (NCCL). Raises RankLost.
        """
        stage, self.place = divmod(rank, tensor_parallel)
        self.tensor_parallel = tensor_parallel
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        self._ordered = device == "cpu"
        try:
            self._stage = _group(store, f"stage/{stage}", self.place, tensor_parallel, device, timeout_s)
            self._pipeline = _group(store, f"place/{self.place}", stage, pipeline_stages, device, timeout_s)
        except RuntimeError as error:
            raise RankLost(f"rank {rank} did not meet the others: {error}") from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """On processors, more than two ranks are summed in order of their places, each element alike: the backend's own
        sum takes an order that hangs on the size of `x`, and a token would depend on its batch.
        """
        if self.tensor_parallel == 1 or x.numel() == 0:
            return x
        if self._ordered and self.tensor_parallel > 2:
            parts = self._gather(x)
            total = parts[0]
            for part in parts[1:]:
                total += part
            return total
        x = x.contiguous()
        _wait(lambda: self._stage.allreduce([x]))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if self.tensor_parallel == 1:
            return x
        if x.numel() == 0:
            return x.new_empty(x.shape[0], x.shape[1] * self.tensor_parallel)
        return torch.cat(self._gather(x), dim=-1)

    def send(self, x: torch.Tensor, stage: int) -> None:
        x = x.contiguous()
        if len(self._sends) >= MAX_SENDS:
            self._finish_send()
        try:
            self._sends.append((self._pipeline.send([x], stage, 0), x))
        except RuntimeError as error:
            raise RankLost(str(error)) from error

    def recv(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        _wait(lambda: self._pipeline.recv([x], stage, 0))
        return x

    def close(self) -> None:
        with contextlib.suppress(RankLost):
            while self._sends:
                self._finish_send()
        self._sends.clear()
        self._stage = self._pipeline = None

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.tensor_parallel)]
        _wait(lambda: self._stage.allgather([parts], [x]))
        return parts

    def _finish_send(self) -> None:
        work, _ = self._sends.popleft()
        _wait(lambda: work)


def _wait(begin: Any) -> None:
    """Begins an operation and waits for its end; the group's timeout bounds it."""
    try:
        begin().wait()
    except RuntimeError as error:
        raise RankLost(str(error)) from error


def _group(store: Store, name: str, rank: int, size: int, device: str, timeout_s: float) -> Any:
    """A process group of its own; None where one rank is all of it."""
    if size == 1:
        return None
    prefixed = PrefixStore(name, store)
    timeout = timedelta(seconds=timeout_s)
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=LOOPBACK)]
    options._timeout = timeout
    return gloo(prefixed, rank, size, options)
