"""What one GPU computes of a worker of several, and what it says to the others: NCCL between GPUs, Gloo where tests run
the kernels on processors.

Within a stage the ranks sum behind row-parallel products, gather logits, and all have what was drawn: the first rank
draws and tells the others its int32 tokens, which is less than the parameters of every draw would be and hangs on no
generator. Between stages the residual stream travels, float32 [T, C], nothing rounded; logits come back from the last
stage's first rank to the leader, which draws. That way back has a group of its own: NCCL runs what two ranks say to
each other in one order, and logits that wait behind the next step's residuals, which wait for them, would never come.

All ranks call the same operations in the same order, and all of them come in `meet` once: NCCL looks for addresses at
a pair's first word, and the table where they stand is read only while a worker starts.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore

from ...models.config import ModelConfig
from ..parallel.meeting import LOOPBACK
from ..parallel.messages import RankLost
from ..parallel.ranks import Table, TorchRanks, finished, make_group
from ..parallel.shard import Shard
from ..plan import StepPlan

logger = logging.getLogger(__name__)

START_S = 600.0
"""For what ranks agree on while they start: one of them may compile kernels that another has."""
ABORT_S = 10.0
"""For groups to end that were given up."""


class Part:
    """One rank of a worker, of several or of one. One thread; collectives are queued on the current stream."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.tell: Callable[[StepPlan], None] = lambda plan: None
        """The leader's way to have a plan computed by the others."""

    @property
    def leads(self) -> bool:
        """Whether this rank draws."""
        return self.shard.rank == 0

    @property
    def plans_ahead(self) -> int:
        """Plans under way: one computed and one laid out, or one for each stage."""
        return 2 if self.shard.pipeline_stages == 1 else self.shard.pipeline_stages

    @property
    def looks_ahead(self) -> bool:
        """In a pipeline the next plan begins before the one before is drawn."""
        return self.shard.pipeline_stages == 1

    def smallest(self, name: str, value: int) -> int:
        """Of what every rank says, once under each name."""
        return value

    @property
    def ranks(self) -> DeviceRanks:
        """The others."""
        raise AssertionError("one rank has no others")

    def give_up(self) -> None:
        """What waits for other ranks on the device waits no longer. Returns at once; idempotent."""

    def close(self) -> None:
        """Ends what there is between ranks, once no graph is left that captured any of it. Bounded; idempotent."""


def whole(config: ModelConfig) -> Part:
    """A worker of one GPU."""
    return Part(Shard(config=config))


class SharedPart(Part):
    """One rank of several."""

    def __init__(self, shard: Shard, table: Table, ranks: DeviceRanks) -> None:
        super().__init__(shard)
        self._table = table
        self._ranks = ranks

    @property
    def ranks(self) -> DeviceRanks:
        return self._ranks

    def smallest(self, name: str, value: int) -> int:
        """Raises RankLost."""
        self._table.put(f"{name}/{self.shard.rank}", str(value).encode())
        others = (self._table.take(f"{name}/{rank}", START_S) for rank in range(self.shard.num_ranks))
        return min(int(said) for said in others)

    def give_up(self) -> None:
        self._ranks.abort()

    def close(self) -> None:
        self._ranks.close()


class Aborts:
    """Groups that are given up, each by a thread of its own. NCCL first lets go of what waits for other ranks; then it
    does not return before every graph is destroyed that captured a collective of the group (`commDestroySync`), and the
    groups beside it must not wait for that.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def begin(self, groups: Iterable[Any]) -> None:
        """Returns at once."""
        for group in groups:
            thread = threading.Thread(target=self._abort, args=(group,), name="abort of ranks", daemon=True)
            self._threads.append(thread)
            thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether all of them have ended."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @staticmethod
    def _abort(group: Any) -> None:
        with contextlib.suppress(RuntimeError):
            group.abort()


class DeviceRanks(TorchRanks):
    """One GPU's end. Waits for nothing but, on processors, for what it receives."""

    def __init__(
        self,
        table: Table,
        shard: Shard,
        device: torch.device,
        *,
        stage_host: str = LOOPBACK,
        pipeline_host: str = LOOPBACK,
        timeout_s: float,
    ) -> None:
        """As `TorchRanks`; `device`: this rank's own."""
        super().__init__(
            table,
            rank=shard.rank,
            tensor_parallel=shard.tensor_parallel,
            pipeline_stages=shard.pipeline_stages,
            device=device.type,
            stage_host=stage_host,
            pipeline_host=pipeline_host,
            timeout_s=timeout_s,
        )
        self._shard = shard
        self._device = device
        self._on_its_way: deque[tuple[Any, torch.Tensor]] = deque()
        self._returns: Any = None
        self._aborts = Aborts()
        self._aborting = threading.Lock()
        self._given_up = self._closed = False
        try:
            if shard.pipeline_stages > 1 and shard.place == 0 and (shard.is_first or shard.is_last):
                store = PrefixStore("returns", self._store)
                self._returns = make_group(
                    store, int(shard.is_last), 2, device=device.type, host=pipeline_host, timeout_s=timeout_s
                )
        except RuntimeError as error:
            raise RankLost(f"rank {shard.rank} did not meet the others: {error}") from error

    def meet(self) -> None:
        """A first word on every way that there is; once, before all else. `abort` ends it. Raises RankLost."""
        try:
            self._say_first_words()
        except RuntimeError as error:
            raise RankLost(f"rank {self._shard.rank} did not meet the others: {error}") from error

    def share_drawn(self, drawn: torch.Tensor) -> None:
        """The first rank's `drawn`, to all ranks of the stage."""
        if self.tensor_parallel > 1 and drawn.numel():
            finished(lambda: self._stage.broadcast(drawn, 0))

    def pass_on(self, residual: torch.Tensor) -> None:
        """[T, C] float32 to the next stage; may be overwritten afterwards."""
        self._send(self._pipeline, residual.clone(), self._shard.stage + 1)

    def take_over(self, residual: torch.Tensor) -> torch.Tensor:
        """[T, C] float32 from the stage before, into `residual`."""
        return self.recv(residual, self._shard.stage - 1)

    def give_back(self, logits: torch.Tensor) -> None:
        """The last stage's first rank, to the leader: logits [R, V] float32; a word that the step is over for none."""
        self._send(self._returns, logits.clone() if logits.numel() else logits.new_zeros(1), 0)

    def get_back(self, rows: int) -> torch.Tensor:
        """The leader's end of `give_back`: [R, V]."""
        vocab_size = self._shard.config.vocab_size
        logits = torch.empty((rows, vocab_size) if rows else (1,), dtype=torch.float32, device=self._device)
        finished(lambda: self._returns.recv([logits], 1, 0))
        return logits if rows else logits.new_empty(0, vocab_size)

    def abort(self) -> None:
        """What waits for other ranks on the device waits no longer, and means nothing: they are gone. Any thread;
        returns at once; idempotent. Gloo notices by itself.
        """
        with self._aborting:
            if not self._given_up and self._device.type == "cuda":
                self._aborts.begin(filter(None, (self._stage, self._pipeline, self._returns)))
            self._given_up = True

    def close(self) -> None:
        """Behind the end of every graph that captured a sum: NCCL waits for that. Waits once, `ABORT_S` at most."""
        if self._closed:
            return
        self._closed = True
        self.abort()
        if not self._aborts.wait(ABORT_S):
            logger.error("a group of ranks has not ended within %g s after it was given up", ABORT_S)
        self._on_its_way.clear()
        self._returns = None
        super().close()

    def _send(self, group: Any, x: torch.Tensor, to: int) -> None:
        """Not so many are on their way that they would fill the memory; nobody waits for the others."""
        while self._on_its_way and (
            self._on_its_way[0][0].is_completed() or len(self._on_its_way) >= 2 * self._shard.pipeline_stages
        ):
            finished(lambda: self._on_its_way.popleft()[0])
        try:
            self._on_its_way.append((group.send([x], to, 0), x))
        except RuntimeError as error:
            raise RankLost(str(error)) from error

    def _say_first_words(self) -> None:
        shard = self._shard
        word = torch.zeros(1, 1, dtype=torch.float32, device=self._device)
        self.all_reduce(word)
        if not shard.is_first:
            self.take_over(word)
        if not shard.is_last:
            self.pass_on(word)
        if self._returns is not None:
            if shard.is_last:
                self.give_back(word[:0])
            else:
                self.get_back(0)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
