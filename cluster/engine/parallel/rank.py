"""What a follower's process is made of, once it knows what it is to be. Loads torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....kvtransfer.collective import commands
from ....kvtransfer.collective.memory import HostRankMemory, RankMemory
from ....kvtransfer.collective.rank import RankTransfers
from ....kvtransfer.layout import KVSplit
from ....kvtransfer.mapped.segment import KVSegment, take
from ....kvtransfer.store import KVStore
from ...models.reference import ModelError, ModelFiles, resolve_model
from ..devices.kv_memory import kv_layout
from ..fingerprint import fingerprint
from ..plan import StepPlan
from .messages import Setup
from .ranks import Table, TorchRanks
from .shard import Shard
from .stage import StageRunner, load_part, rank_kv


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank that can compute."""

    run: Callable[[StepPlan], object]
    """Computes a plan, or has begun to."""
    memory: RankMemory
    """Its KV, as collectives move it, …"""
    store: KVStore | None
    """… as it is read and written over the leader's link, where nobody can map it, …"""
    blocks: memoryview
    """… and as bytes, one block after another, where it is host memory (empty: it is not)."""
    block_bytes: int


class RankKV:
    """A rank's end of KV that travels between workers: commands in, answers out, both as bytes."""

    def __init__(self, memory: RankMemory, say: Callable[[bytes], None]) -> None:
        self._memory = memory
        self._say = say
        self._transfers: RankTransfers | None = None

    def hear(self, command: bytes) -> None:
        """From one thread; does not wait. ValueError for what is no command."""
        told = commands.decode(command)
        if isinstance(told, commands.Begin):
            self._transfers = RankTransfers(self._memory, told, lambda answer: self._say(commands.encode(answer)))
        elif self._transfers is not None:
            self._transfers.handle(told)


def build_rank(
    setup: Setup, kv_fd: int | None, table: Table, progress: Callable[[float], None], reference: str | None = None
) -> Rank:
    """Maps the KV memory (and closes `kv_fd`), or makes it where there is none, meets the other ranks at `table` and
    loads the weights, from files that it finds by `reference` where one is given. Raises SegmentError, RankLost,
    ModelError.
    """
    files = setup.files if reference is None else own_files(setup, reference)
    shard = Shard(
        config=files.config,
        tensor_parallel=setup.tensor_parallel,
        pipeline_stages=setup.pipeline_stages,
        rank=setup.rank,
    )
    if setup.cpus:
        os.sched_setaffinity(0, setup.cpus)
    torch.set_num_threads(setup.threads)
    whole = KVSplit(
        layout=kv_layout(files.config, setup.dtype, setup.block_size),
        tensor_parallel=setup.tensor_parallel,
        pipeline_stages=setup.pipeline_stages,
    )
    layout = whole.rank_layout(setup.rank)
    if kv_fd is None:
        segment = KVSegment(layout, setup.num_blocks)
        segment.commit()
        blocks = segment.blocks
    else:
        blocks = take(kv_fd, nonce=setup.nonce, epoch=0, layout=layout, writable=True).blocks
    ranks = TorchRanks(
        table,
        rank=setup.rank,
        tensor_parallel=setup.tensor_parallel,
        pipeline_stages=setup.pipeline_stages,
        stage_host=setup.stage_host,
        pipeline_host=setup.pipeline_host,
        timeout_s=setup.timeout_s,
    )
    model = load_part(files, shard, ranks, setup.dtype, progress, kernels=setup.kernels)
    runner = StageRunner(model, rank_kv(blocks, shard, setup.dtype, setup.block_size), shard, ranks)
    return Rank(runner.run, HostRankMemory(blocks), None, blocks, layout.block_bytes)


def own_files(setup: Setup, reference: str) -> ModelFiles:
    """The model as this node has it; ModelError where it is not the leader's."""
    files = resolve_model(reference)
    if fingerprint(files, setup.dtype) != setup.fingerprint:
        raise ModelError(f"model {reference!r} has other files on this node than where rank 0 is")
    return files
