"""The worker's own rank, and the seam to the device: a model that several processes compute (`engine.forward`).

1. The constructor starts a process for each other rank (`followers`), lends it its KV memory, waits until all run, lets
   all meet, and loads its own part while they load theirs.
2. `run` tells the followers the plan, computes its own part, and returns the logits, which the device samples from.
3. Whatever goes wrong between ranks is the end of the worker: `run` raises it, and `watch` tells it when nobody runs.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...models.reference import ModelFiles
from ..forward import Forward, Stage
from ..plan import StepPlan
from .followers import Followers, Lost
from .kv import RankedKVStore
from .messages import Kind, RankLost, Setup, encode_step
from .ranks import TorchRanks, meeting_point
from .shard import Shard, own_processors
from .stage import StageRunner, load_part, rank_kv

OPERATION_S = 120.0
"""How long a rank waits for the others in one operation: for as long as the slowest may compute between two. A rank
that has ended is noticed at once; this bounds what nothing else does."""


class ParallelForward(Forward):
    """A model on several ranks of this machine's processors."""

    def __init__(
        self,
        files: ModelFiles,
        dtype: str,
        kernels: str,
        kv: RankedKVStore,
        *,
        threads: int = 1,
        cpus: Sequence[int] = (),
        stage: Stage | None = None,
    ) -> None:
        """`kv` says how the model is split. `kernels`: `torch` or `reference`; `threads`: of each rank; `cpus`: shared
        out among the ranks where there are enough. Raises ValueError for a split that the model does not allow,
        ModelError for the files, RankLost where a process does not start, OSError.
        """
        tensor_parallel, pipeline_stages = kv.split.tensor_parallel, kv.split.pipeline_stages
        shard = Shard(config=files.config, tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages)
        if not all(segment.shareable for segment in kv.segments):
            raise ValueError("tensor_parallel, pipeline_stages: ranks need memory that they share (Linux's memfd)")
        self._threads, self._bound_thread = threads, 0
        self._block_size = kv.layout.block_size
        self._folder = Path(tempfile.mkdtemp(prefix="tandem-ranks-"))  # nobody else may look in
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
                nonce=kv.segments[rank].nonce,
                threads=threads,
                cpus=own_processors(tuple(cpus), rank, shard.num_ranks),
                store=str(self._folder / "ranks"),
                timeout_s=OPERATION_S,
            )
            for rank in range(1, shard.num_ranks)
        ]
        try:
            self._followers = Followers(setups, [segment.lend() for segment in kv.segments[1:]])
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        try:
            self._followers.gather()
            self._followers.connect()
            torch.set_num_threads(threads)
            self._ranks = TorchRanks(
                meeting_point(str(self._folder / "ranks"), shard.num_ranks),
                rank=0,
                tensor_parallel=tensor_parallel,
                pipeline_stages=pipeline_stages,
                timeout_s=OPERATION_S,
            )
            progress = None if stage is None else lambda share: stage("loading weights", share)
            model = load_part(files, shard, self._ranks, dtype, progress, kernels=kernels)
            self._followers.ready(lambda share: None)
            self.resident_bytes = model.resident_bytes()
            memory = rank_kv(kv.segments[0].blocks, shard, dtype, self._block_size)
            self._runner = StageRunner(model, memory, shard, self._ranks)
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

    def run(self, plan: StepPlan) -> NDArray[np.float32]:
        assert self._runner is not None
        current = threading.get_ident()
        if current != self._bound_thread:
            torch.set_num_threads(self._threads)  # torch counts them by thread
            self._bound_thread = current
        self._followers.say(Kind.PLAN, encode_step(plan, self._block_size))
        try:
            logits: NDArray[np.float32] = self._runner.run(plan).numpy()
        except RankLost:
            self._followers.check()  # who was lost says more than what broke
            raise
        return logits

    def close(self) -> None:
        self._runner = None
        self._followers.close()
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        shutil.rmtree(self._folder, ignore_errors=True)
