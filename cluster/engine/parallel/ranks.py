"""What the ranks of a worker do together: sums and gathers within a stage, hidden states from stage to stage.

All ranks of a stage call the same operations in the same order. `Alone` is one rank; `TorchRanks` speaks through
torch.distributed's process groups, Gloo between processors and NCCL between GPUs. Its groups are made directly on a
prefixed store: no global group exists, so that a process may be in several workers' groups, one after another. The
store is the table that the leader keeps (`meeting`), read and written over the links that there are already: a TCPStore
would be one more port, open to whoever reaches it. What ranks then send each other is neither signed nor encrypted.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from .meeting import LOOPBACK
from .messages import RankLost

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
    def begin_recv(self, x: torch.Tensor, stage: int) -> Callable[[], torch.Tensor]:
        """As `recv`, in its turn among them, without waiting: what it returns waits, in any thread."""

    @abstractmethod
    def close(self) -> None:
        """Ends the connections, once what was sent has left; idempotent. Others may still be reading: theirs break."""


class Table(Protocol):
    """Where ranks find each other: keys, each written once."""

    def put(self, key: str, value: bytes) -> None:
        """Tells the others."""

    def take(self, key: str, timeout_s: float) -> bytes:
        """Waits for what another puts. Raises RankLost where it does not come."""


class _TableStore(Store):
    """What process groups ask of a store, from a table: Gloo's while they are made, NCCL's when they are first used."""

    def __init__(self, table: Table, timeout_s: float) -> None:
        super().__init__()
        self._table = table
        self._timeout_s = timeout_s
        self._taken: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override] # torch says str, and means bytes
        self._table.put(key, value)

    def get(self, key: str) -> bytes:
        if key not in self._taken:
            self._taken[key] = self._table.take(key, self._timeout_s)
        return self._taken[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """NCCL's watch looks whether others have told of a failure: those are told over the links."""
        return all(key in self._taken for key in keys)


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

    def begin_recv(self, x: torch.Tensor, stage: int) -> Callable[[], torch.Tensor]:
        raise AssertionError("one rank has no other stage")

    def close(self) -> None:
        """Nothing is open."""


class TorchRanks(Ranks):
    """See the module."""

    def __init__(
        self,
        table: Table,
        *,
        rank: int,
        tensor_parallel: int,
        pipeline_stages: int,
        device: str = "cpu",
        stage_host: str = LOOPBACK,
        pipeline_host: str = LOOPBACK,
        timeout_s: float,
    ) -> None:
        """Meets the others at `table`; returns when all have come. `timeout_s`: for that, and for every operation.
        `device`: `cpu` (Gloo) or `cuda` (NCCL). `stage_host`, `pipeline_host`: its addresses for the ranks of its stage
        and for those of its place in the other stages (`meeting.group_hosts`; NCCL finds its own). Raises RankLost.
        """
        stage, self.place = divmod(rank, tensor_parallel)
        self.tensor_parallel = tensor_parallel
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        self._ordered = device == "cpu"
        self._store = _TableStore(table, timeout_s)
        try:
            store = PrefixStore(f"stage/{stage}", self._store)
            self._stage = make_group(
                store, self.place, tensor_parallel, device=device, host=stage_host, timeout_s=timeout_s
            )
            store = PrefixStore(f"place/{self.place}", self._store)
            self._pipeline = make_group(
                store, stage, pipeline_stages, device=device, host=pipeline_host, timeout_s=timeout_s
            )
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
        finished(lambda: self._stage.allreduce([x]))
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
        return self.begin_recv(x, stage)()

    def begin_recv(self, x: torch.Tensor, stage: int) -> Callable[[], torch.Tensor]:
        """On GPUs what is sent to that stage afterwards waits for it: one queue for both directions."""
        try:
            work = self._pipeline.recv([x], stage, 0)
        except RuntimeError as error:
            raise RankLost(str(error)) from error

        def wait() -> torch.Tensor:
            finished(lambda: work)
            return x

        return wait

    def close(self) -> None:
        with contextlib.suppress(RankLost):
            while self._sends:
                self._finish_send()
        self._sends.clear()
        self._stage = self._pipeline = None

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.tensor_parallel)]
        finished(lambda: self._stage.allgather([parts], [x]))
        return parts

    def _finish_send(self) -> None:
        work, _ = self._sends.popleft()
        finished(lambda: work)


def finished(begin: Any) -> None:
    """Begins an operation and waits for its end; the group's timeout bounds it. On a GPU the current stream waits.
    Raises RankLost.
    """
    try:
        begin().wait()
    except RuntimeError as error:
        raise RankLost(str(error)) from error


def make_group(store: Store, rank: int, size: int, *, device: str, host: str, timeout_s: float) -> Any:
    """A process group of its own; None where one rank is all of it."""
    if size == 1:
        return None
    timeout = timedelta(seconds=timeout_s)
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timeout
    return gloo(store, rank, size, options)
