"""A worker of several GPUs, seen as one device: the leader's GPU in this process, the others' in processes of their own
that are told every plan.

1. The constructor is handed a process for each other rank, tells each what it is to be, and all of them meet. Every
   rank then does the same on its own GPU: loads its part of the model, profiles a step, agrees on how much KV there is
   (what the smallest has room for), captures decode steps.
2. `launch` lays a plan out, which checks it, tells it to the others, and queues this rank's part. No tensor travels
   with a plan: each rank lays out its own inputs from it.
3. `collect` waits for what this rank has queued. That ends only when the others have computed theirs, KV and all: sums
   of the last layer need every rank of a stage, and logits, or a word in their place, come back from the last stage.
4. A rank that is lost is the end of the worker (`watch`): a step without it never ends, so what waits on the device is
   given up, and `collect` raises.

`kv` has whole blocks, whatever the split, gathered from the ranks through host memory. Collectives between workers need
no such thing: each rank moves its own part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ....kvtransfer.collective.ports import RankPort
from ....kvtransfer.layout import KVSplit
from ...config_schema import ConfigError
from ...models.reference import ModelFiles
from ..fingerprint import fingerprint
from ..forward import Stage
from ..gpu.part import START_S, DeviceRanks, SharedPart
from ..parallel.followers import Followers
from ..parallel.kv import RankedKVStore
from ..parallel.kv_port import follower_ports
from ..parallel.leader import group_addresses
from ..parallel.link_kv import LinkBlocks
from ..parallel.messages import GpuSetup, Kind, Setup, encode_step
from ..parallel.rank_process import RankProcess, Recruit, children, dismiss
from ..parallel.shard import Shard
from ..plan import StepOutput, StepPlan
from .base import Device
from .cuda import CudaDevice
from .kv_memory import kv_layout


class RankedCudaDevice(Device):
    """See the module. Owned by the engine thread; `kv` may be used by transport threads."""

    name = "cuda"

    def __init__(
        self,
        files: ModelFiles,
        gpu: GpuSetup,
        *,
        dtype: str,
        block_size: int,
        tensor_parallel: int,
        pipeline_stages: int,
        kernels: str = "auto",
        gpus: Sequence[int] = (),
        stage: Stage | None = None,
        recruit: Recruit = children,
    ) -> None:
        """`gpu`: of all ranks, as `CudaDevice` takes it; where its device is `cuda`, each rank has the one of its node
        that `gpus` names, by rank, or the next one where there are none. `recruit` hands the other ranks' processes
        over.

        Raises ValueError naming the field (ModelError for the model's files; DoesNotFit with the arithmetic), RankLost,
        OSError.
        """
        shard = Shard(config=files.config, tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages)
        self.fingerprint = fingerprint(files, dtype, gpu.quantization, gpu.narrow_kv)
        self.vocab_size = files.config.vocab_size
        self._block_size = block_size
        self._device: CudaDevice | None = None
        self._ranks: DeviceRanks | None = None
        self._store: RankedKVStore | None = None
        processes = recruit(shard.num_ranks)
        try:
            devices = _devices(gpu.device, gpus, processes)
            each = [replace(gpu, device=device) for device in devices]
            setups = _setups(files, shard, each, processes, dtype=dtype, kernels=kernels, block_size=block_size)
        except BaseException:
            dismiss(processes)
            raise
        self._hosts = [None if process.is_local else process.host for process in processes]
        self._followers = Followers(processes, setups, [None] * len(processes))
        try:
            self._followers.gather()
            self._followers.connect()
            meeting = self._followers.meeting
            stage_host, pipeline_host = group_addresses(processes, tensor_parallel)[0]
            where = torch.device(devices[0])
            ranks = DeviceRanks(
                meeting, shard, where, stage_host=stage_host, pipeline_host=pipeline_host, timeout_s=START_S
            )
            self._ranks = ranks
            self._followers.watch(lambda error: ranks.abort())  # who is lost now is waited for on the device, too
            ranks.meet()
            part = SharedPart(shard, meeting, ranks)
            own = CudaDevice(
                files,
                dtype=dtype,
                block_size=block_size,
                kernels=kernels,
                stage=stage,
                part=part,
                **each[0].arguments(),
            )
            self._device = own
            self._followers.ready()
            part.tell = self._tell
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError):
                self._followers.check()  # who was lost, and why
            raise
        self.picked, self.num_blocks = own.picked, own.num_blocks
        self.plans_ahead, self.looks_ahead = own.plans_ahead, own.looks_ahead
        split = KVSplit(
            layout=kv_layout(files.config, dtype if gpu.narrow_kv is None else gpu.narrow_kv.dtype, block_size),
            tensor_parallel=tensor_parallel,
            pipeline_stages=pipeline_stages,
        )
        others = {
            rank: LinkBlocks(self._followers, rank, split.rank_layout(rank).block_bytes)
            for rank in range(1, split.num_ranks)
        }
        self.kv = self._store = RankedKVStore(split, own.num_blocks, others, own=own.kv)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the other ranks' processes."""
        return self._followers.pids

    def launch(self, plan: StepPlan) -> None:
        if self._device is None:
            raise RuntimeError("the device is closed")
        self._device.launch(plan)

    def collect(self) -> StepOutput:
        if self._device is None:
            raise RuntimeError("the device is closed")
        output = self._device.collect()
        self._followers.check()  # what was waited for may have been given up
        return output

    def wait(self, wake: threading.Event) -> bool:
        return self._device is None or self._device.wait(wake)

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:
        def lost(error: BaseException) -> None:
            try:
                on_lost(error)
            finally:
                if self._ranks is not None:
                    self._ranks.abort()

        self._followers.watch(lost)

    def other_ranks(self) -> Sequence[RankPort]:
        return follower_ports(self._followers, self._hosts)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        self._followers.close()
        if self._device is not None:
            self._device.close()
            self._device = None
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    def _tell(self, plan: StepPlan) -> None:
        self._followers.say(Kind.PLAN, encode_step(plan, self._block_size))


def _devices(device: str, gpus: Sequence[int], processes: Sequence[RankProcess]) -> list[str]:
    """Each rank's, as PyTorch on its node names it. ConfigError where two ranks of one node have the same GPU: no
    collective runs between them.
    """
    if torch.device(device).type != "cuda":
        return [device] * (1 + len(processes))
    hosts = ["", *(process.host for process in processes)]
    if gpus and len(gpus) != len(hosts):
        raise ConfigError("gpus", list(gpus), f"{len(hosts)}, one for each rank")
    found = list(gpus) or [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    if len(set(zip(hosts, found, strict=True))) < len(hosts):
        raise ConfigError("gpus", found, "another GPU for each rank of a node")
    return [f"cuda:{index}" for index in found]


def _setups(
    files: ModelFiles,
    shard: Shard,
    gpus: Sequence[GpuSetup],
    processes: Sequence[RankProcess],
    *,
    dtype: str,
    kernels: str,
    block_size: int,
) -> list[Setup]:
    """Of ranks 1 … n - 1. `gpus`: of all ranks."""
    hosts = group_addresses(processes, shard.tensor_parallel)
    found_by = "" if all(process.is_local for process in processes) else fingerprint(files, dtype)
    return [
        Setup(
            files=files,
            tensor_parallel=shard.tensor_parallel,
            pipeline_stages=shard.pipeline_stages,
            rank=rank,
            dtype=dtype,
            kernels=kernels,
            block_size=block_size,
            num_blocks=0,
            nonce=b"",
            threads=1,
            cpus=(),
            stage_host=hosts[rank][0],
            pipeline_host=hosts[rank][1],
            fingerprint=found_by,
            timeout_s=START_S,
            gpu=gpus[rank],
        )
        for rank in range(1, shard.num_ranks)
    ]
