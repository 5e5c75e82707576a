"""The worker's own rank, and the seam to the device: a model that several processes compute (`engine.forward`).

1. The constructor is given a process for each other rank (`rank_process`), lends it its KV memory, waits until all run,
   lets all meet, and loads its own part while they load theirs.
2. `launch` tells the followers the plan and computes its own part. In a pipeline that is all: the first stage is free,
   and `pipeline_stages` plans may be under way before the logits of the oldest are asked for.
3. Whatever goes wrong between ranks is the end of the worker: whoever launches, or waits for logits, is told, and
   `watch` tells it when nobody does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ....kvtransfer.collective.ports import RankPort
from ...models.reference import ModelFiles
from ..fingerprint import fingerprint
from ..forward import Forward, Pending, Stage
from ..plan import StepPlan
from .followers import Followers, Lost
from .kv import RankedKVStore
from .kv_port import follower_ports
from .meeting import LOOPBACK, group_hosts
from .messages import Kind, RankLost, Setup, encode_step
from .rank_process import RankProcess
from .ranks import TorchRanks
from .shard import Shard, own_processors
from .stage import StageRunner, load_part, rank_kv
from .under_way import UnderWay

R = TypeVar("R")
OPERATION_S = 120.0
"""How long a rank waits for the others in one operation: for as long as the slowest may compute between two. A rank
that has ended is noticed at once; this bounds what nothing else does."""
NAMED_S = 1.0
"""How long it may take until the end of a rank is seen that has broken a connection."""


class ParallelForward(Forward):
    """A model on several ranks of this machine's processors."""

    def __init__(
        self,
        files: ModelFiles,
        dtype: str,
        kernels: str,
        kv: RankedKVStore,
        processes: Sequence[RankProcess],
        *,
        threads: int = 1,
        cpus: Sequence[int] = (),
        stage: Stage | None = None,
    ) -> None:
        """`kv` says how the model is split; `processes`: the other ranks', its own from now on. `kernels`: `torch`
        or `reference`; `threads`: of each rank; `cpus`: shared out among the ranks where there are enough. Raises
        ValueError for a split that the model does not allow, ModelError for the files, RankLost where a process does
        not come up, OSError.
        """
        tensor_parallel, pipeline_stages = kv.split.tensor_parallel, kv.split.pipeline_stages
        shard = Shard(config=files.config, tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages)
        if not all(segment.shareable for segment in kv.segments.values()):
            raise ValueError("tensor_parallel, pipeline_stages: ranks need memory that they share (Linux's memfd)")
        hosts = group_addresses(processes, tensor_parallel)
        found_by = "" if all(process.is_local for process in processes) else fingerprint(files, dtype)
        self._threads, self._bound_thread = threads, 0
        self._block_size = kv.layout.block_size
        self.plans_ahead = pipeline_stages
        self._under_way: UnderWay | None = None
        self._ranks: TorchRanks | None = None
        self._runner: StageRunner | None = None
        setups = [
            Setup(
                files=files,
                tensor_parallel=tensor_parallel,
                pipeline_stages=pipeline_stages,
                rank=rank,
                dtype=dtype,
                kernels=kernels,
                block_size=self._block_size,
                num_blocks=kv.num_blocks,
                nonce=kv.segments[rank].nonce if rank in kv.segments else b"",
                threads=threads,
                cpus=own_processors(tuple(cpus), rank, shard.num_ranks),
                stage_host=hosts[rank][0],
                pipeline_host=hosts[rank][1],
                fingerprint=found_by,
                timeout_s=OPERATION_S,
            )
            for rank in range(1, shard.num_ranks)
        ]
        lent = [kv.segments[rank].lend() if rank in kv.segments else None for rank in range(1, shard.num_ranks)]
        self._own_hosts = [None if process.is_local else process.host for process in processes]
        self._followers = Followers(processes, setups, lent)
        try:
            self._followers.gather()
            self._followers.connect()
            torch.set_num_threads(threads)
            self._ranks = TorchRanks(
                self._followers.meeting,
                rank=0,
                tensor_parallel=tensor_parallel,
                pipeline_stages=pipeline_stages,
                stage_host=hosts[0][0],
                pipeline_host=hosts[0][1],
                timeout_s=OPERATION_S,
            )
            progress = None if stage is None else lambda share: stage("loading weights", share)
            model = load_part(files, shard, self._ranks, dtype, progress, kernels=kernels)
            self._followers.ready()
            self.resident_bytes = model.resident_bytes()
            memory = rank_kv(kv.segments[0].blocks, shard, dtype, self._block_size)
            self._runner = StageRunner(model, memory, shard, self._ranks)
            self._under_way = UnderWay() if pipeline_stages > 1 else None
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the other ranks' processes."""
        return self._followers.pids

    def watch(self, on_lost: Lost) -> None:
        """`on_lost` is called once, from any thread, when a rank is lost."""
        self._followers.watch(on_lost)

    def other_ranks(self) -> Sequence[RankPort]:
        return follower_ports(self._followers, self._own_hosts)

    def run(self, plan: StepPlan) -> NDArray[np.float32]:
        return self.launch(plan)()

    def launch(self, plan: StepPlan) -> Pending:
        runner = self._runner
        assert runner is not None
        current = threading.get_ident()
        if current != self._bound_thread:
            torch.set_num_threads(self._threads)  # torch counts them by thread
            self._bound_thread = current
        self._followers.say(Kind.PLAN, encode_step(plan, self._block_size))
        begun = self._told(lambda: runner.begin(plan))

        def finish() -> NDArray[np.float32]:
            logits: NDArray[np.float32] = self._told(lambda: runner.finish(begun)).numpy()
            return logits

        if self._under_way is not None:
            return self._under_way.add(finish)
        logits = finish()
        return lambda: logits

    def done(self) -> bool:
        return self._under_way is not None and self._under_way.done()

    def wait(self, wake: threading.Event) -> bool:
        return self._under_way is None or self._under_way.wait(wake)

    def _told(self, work: Callable[[], R]) -> R:
        """Does it. Who was lost says more than what broke, and is known a moment later."""
        try:
            return work()
        except RankLost:
            deadline_s = time.monotonic() + NAMED_S
            while time.monotonic() < deadline_s:
                self._followers.check()
                time.sleep(0.01)
            raise

    def close(self) -> None:
        self._runner = None
        self._followers.close()
        if self._under_way is not None:
            self._under_way.close()
            self._under_way = None
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None


def group_addresses(processes: Sequence[RankProcess], tensor_parallel: int) -> list[tuple[str, str]]:
    """Of each rank, the leader's first: `meeting.group_hosts`. `processes`: the other ranks'."""
    leader_host = next((process.leader_host for process in processes if not process.is_local), LOOPBACK)
    others = (leader_host if process.is_local else process.host for process in processes)
    return group_hosts([leader_host, *others], tensor_parallel)
