"""What a follower's process is made of, once it knows what it is to be. Loads torch."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ....kvtransfer.layout import KVSplit
from ....kvtransfer.mapped.segment import take
from ..devices.kv_memory import kv_layout
from .messages import Setup
from .ranks import TorchRanks, meeting_point
from .shard import Shard
from .stage import StageRunner, load_part, rank_kv


def build_rank(setup: Setup, kv_fd: int, progress: Callable[[float], None]) -> StageRunner:
    """Maps the KV memory (and closes `kv_fd`), meets the other ranks and loads the weights. Raises SegmentError,
    RankLost, ModelError.
    """
    shard = Shard(
        config=setup.files.config,
        tensor_parallel=setup.tensor_parallel,
        pipeline_stages=setup.pipeline_stages,
        rank=setup.rank,
    )
    if setup.cpus:
        os.sched_setaffinity(0, setup.cpus)
    torch.set_num_threads(setup.threads)
    whole = KVSplit(
        layout=kv_layout(setup.files.config, setup.dtype, setup.block_size),
        tensor_parallel=setup.tensor_parallel,
        pipeline_stages=setup.pipeline_stages,
    )
    segment = take(kv_fd, nonce=setup.nonce, epoch=0, layout=whole.rank_layout(setup.rank), writable=True)
    ranks = TorchRanks(
        meeting_point(setup.store, shard.num_ranks),
        rank=setup.rank,
        tensor_parallel=setup.tensor_parallel,
        pipeline_stages=setup.pipeline_stages,
        timeout_s=setup.timeout_s,
    )

    model = load_part(setup.files, shard, ranks, setup.dtype, progress, kernels=setup.kernels)
    return StageRunner(model, rank_kv(segment.blocks, shard, setup.dtype, setup.block_size), shard, ranks)
