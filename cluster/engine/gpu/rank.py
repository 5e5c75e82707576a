"""A follower on a GPU: the same device as its leader's, for its own part of the model, given the leader's plans."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ....kvtransfer.collective.memory import DeviceRankMemory
from ..devices.cuda import CudaDevice
from ..parallel.messages import GpuSetup, Setup
from ..parallel.rank import Rank, own_files
from ..parallel.ranks import Table
from ..parallel.shard import Shard
from ..plan import StepPlan
from .part import DeviceRanks, SharedPart


def build_gpu_rank(
    setup: Setup, gpu: GpuSetup, table: Table, progress: Callable[[float], None], reference: str | None = None
) -> Rank:
    """Meets the other ranks at `table`, loads its part, and measures and captures with them. Raises RankLost,
    ValueError (ModelError for the files, DoesNotFit with the arithmetic).
    """
    files = setup.files if reference is None else own_files(setup, reference)
    torch.set_num_threads(setup.threads)
    shard = Shard(
        config=files.config,
        tensor_parallel=setup.tensor_parallel,
        pipeline_stages=setup.pipeline_stages,
        rank=setup.rank,
    )
    where = torch.device(gpu.device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # nothing of this process lies on another rank's
    ranks = DeviceRanks(
        table,
        shard,
        where,
        stage_host=setup.stage_host,
        pipeline_host=setup.pipeline_host,
        timeout_s=setup.timeout_s,
    )
    ranks.meet()
    device = CudaDevice(
        files,
        dtype=setup.dtype,
        block_size=setup.block_size,
        kernels=setup.kernels,
        stage=lambda what, share: progress(share or 0.0),
        part=SharedPart(shard, table, ranks),
        **gpu.arguments(),
    )
    memory = DeviceRankMemory(device.kv.tensor)
    return Rank(Following(device).run, memory, device.kv, memoryview(b""), device.kv.layout.block_bytes)


class Following:
    """Plans one after another, as many of them under way as the leader has."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._under_way = 0

    def run(self, plan: StepPlan) -> None:
        """Begins it; waits for the oldest where there would be too many. Raises RankLost."""
        if self._under_way == self._device.plans_ahead:
            self._device.collect()
            self._under_way -= 1
        self._device.launch(plan)
        self._under_way += 1
