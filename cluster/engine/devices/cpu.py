"""The CPU device: a model replica computed in the engine thread.

1. The constructor sizes the KV memory, `kv_cache_bytes` divided by the bytes of a block, and loads the weights into
   whatever `kernels.dispatch` picked: compiled kernels, or torch. Only the latter imports torch.
2. The first `launch` pins the thread that computes.
3. `launch` checks a plan and computes it, or the first stage of a pipeline does: it is free for the next plan then.
   `collect` waits for the logits, where they come from elsewhere, and samples. A row whose logits are no numbers
   comes back with an error and without a token; the others are not affected.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from ....kernels.compiled.compiling import telling
from ....kernels.dispatch import numba_problem, pick
from ....kernels.picked import Picked
from ....kvtransfer.collective.ports import RankPort
from ....kvtransfer.layout import KVSplit
from ....kvtransfer.store import KVStore
from ...models.config import ModelConfig
from ...models.reference import ModelFiles
from ...types import SampledToken
from ..fingerprint import fingerprint
from ..forward import Forward, Pending, Stage
from ..parallel.kv import RankedKVStore
from ..parallel.rank_process import RankProcess, Recruit, children, dismiss
from ..parallel.remote_kv import RemoteBlocks
from ..parallel.shard import check_split, own_processors
from ..plan import RowOutput, StepOutput, StepPlan
from ..plan_check import check_plan
from ..sampler import Sampler
from .base import Device
from .kv_memory import STORED_AS, HostKVStore, kv_layout

_TORCH = ("torch", "reference")


def _check_processors(cpus: Sequence[int]) -> None:
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError(f"cpus: {tuple(cpus)} is not allowed; allowed: nothing, this system does not pin threads")
    allowed = sorted(os.sched_getaffinity(0))
    if not set(cpus) <= set(allowed):
        raise ValueError(f"cpus: {tuple(cpus)} are not all among this process's processors {allowed}")


def _compiling(stage: Stage | None) -> AbstractContextManager[None]:
    """Inside, `stage` hears when kernels are compiled that were not kept."""
    return nullcontext() if stage is None else telling(lambda: stage("compiling kernels", None))


def _obstacle(config: ModelConfig) -> str | None:
    """Why the compiled kernels cannot run a model; None: they can."""
    problem = numba_problem()
    if problem is not None:
        return problem
    from ..compiled import decoder_shape, unsupported

    return unsupported(decoder_shape(config))


def _pick_for_ranks(kernels: str, quantization: str | None) -> Picked:
    """Who computes a worker of several ranks: torch, as the compiled kernels run a whole step in one process."""
    if quantization is not None or kernels == "compiled":
        name, value = ("kernels", kernels) if kernels == "compiled" else ("quantization", quantization)
        raise ValueError(f"{name}: {value!r} is not allowed for a worker of several ranks, which torch computes")
    return Picked("reference", "asked for") if kernels == "reference" else Picked("torch", "a worker of several ranks")


def _memory(split: KVSplit, num_blocks: int, processes: Sequence[RankProcess]) -> HostKVStore | RankedKVStore:
    """KV memory: of one rank, or in parts, of which ranks on other nodes have theirs there."""
    if split.num_ranks == 1:
        return HostKVStore(split.layout, num_blocks)
    remote = {
        process.rank: RemoteBlocks(process.kv_link, process.rank, split.rank_layout(process.rank).block_bytes)
        for process in processes
        if process.kv_link is not None
    }
    return RankedKVStore(split, num_blocks, remote)


class CpuDevice(Device):
    """A model on processors. Owned by the engine thread; `kv` may be used by transport threads."""

    name = "cpu"

    def __init__(
        self,
        files: ModelFiles,
        *,
        dtype: str,
        block_size: int,
        kv_cache_bytes: int,
        quantization: str | None = None,
        kernels: str = "auto",
        threads: int = 1,
        cpus: Sequence[int] = (),
        stage: Stage | None = None,
        tensor_parallel: int = 1,
        pipeline_stages: int = 1,
        recruit: Recruit = children,
    ) -> None:
        """Loads `files`. `dtype`: `bfloat16` or `float32`, of weights and KV; `quantization`: `w8a8` or None;
        `kernels`: as `kernels.dispatch.pick` takes it; `cpus`: processors that the computing threads are pinned to,
        empty: not pinned; `stage`: follows the start; `tensor_parallel`, `pipeline_stages`: with more than one rank,
        the others are processes (`engine.parallel`) that `recruit` hands over, and `threads` are each rank's.

        Raises ValueError naming the field (ModelError for the model's files), RankLost, OSError.
        """
        if threads < 1:
            raise ValueError(f"threads: {threads} is not 1 or more")
        if cpus:
            _check_processors(cpus)
        if dtype not in STORED_AS:
            raise ValueError(f"dtype: {dtype!r} is not allowed; allowed: one of {', '.join(sorted(STORED_AS))}")
        self._config = files.config
        layout = kv_layout(files.config, dtype, block_size)
        num_blocks = kv_cache_bytes // layout.block_bytes
        if num_blocks < 1:
            raise ValueError(f"kv_cache_bytes: {kv_cache_bytes} do not hold one block ({layout.block_bytes} bytes)")
        split = KVSplit(layout=layout, tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages)
        self._all_cpus = tuple(sorted(cpus))
        self._cpus = frozenset(own_processors(self._all_cpus, 0, split.num_ranks))
        self._bound_thread: int | None = None
        if split.num_ranks > 1:
            check_split(files.config, tensor_parallel, pipeline_stages)
            self.picked: Picked = _pick_for_ranks(kernels, quantization)
        else:
            with _compiling(stage):
                self.picked = pick(kernels, quantization, None if kernels in _TORCH else _obstacle(files.config))
        self.fingerprint = fingerprint(files, dtype, quantization)
        self.vocab_size = files.config.vocab_size
        self.num_blocks = num_blocks
        if split.num_ranks > 1 and stage is not None:
            stage("ranks", None)
        processes = recruit(split.num_ranks) if split.num_ranks > 1 else ()
        try:
            store = _memory(split, num_blocks, processes)
            self.kv: KVStore = store
            self._store = store
            store.commit()
            self._sampler = Sampler()
            with _compiling(stage):
                forward = self._load(files, dtype, quantization, store, processes, threads, stage)
            self._forward: Forward | None = forward
        except BaseException:
            dismiss(processes)
            raise
        self._launched: deque[tuple[StepPlan, float, Pending]] = deque()
        """Plans with when they were launched, monotonic seconds."""
        self.plans_ahead = self._forward.plans_ahead

    def _load(
        self,
        files: ModelFiles,
        dtype: str,
        quantization: str | None,
        store: HostKVStore | RankedKVStore,
        processes: Sequence[RankProcess],
        threads: int,
        stage: Stage | None,
    ) -> Forward:
        if isinstance(store, RankedKVStore):
            from ..parallel.leader import ParallelForward

            return ParallelForward(
                files, dtype, self.picked.kernels, store, processes, threads=threads, cpus=self._all_cpus, stage=stage
            )
        if self.picked.kernels == "compiled":
            from ....kernels.compiled.sampling import RowSampler
            from ..compiled import CompiledForward

            forward = CompiledForward(
                files,
                quantization or dtype,
                store.array,
                fingerprint=self.fingerprint,
                threads=threads,
                cpus=tuple(sorted(self._cpus)),
                stage=stage,
            )
            self._sampler = Sampler(RowSampler(self.vocab_size))  # compiles as well, in the same stage
            return forward
        from ..runner import TorchForward

        progress = None if stage is None else lambda share: stage("loading weights", share)
        return TorchForward(files, dtype, self.picked.kernels, store.array, threads=threads, progress=progress)

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:
        assert self._forward is not None
        self._forward.watch(on_lost)

    def other_ranks(self) -> Sequence[RankPort]:
        assert self._forward is not None
        return self._forward.other_ranks()

    def launch(self, plan: StepPlan) -> None:
        if self._forward is None:
            raise RuntimeError("the device is closed")
        self._bind_thread()
        check_plan(plan, self._config, self.num_blocks, self.kv.layout.block_size)
        start_s = time.monotonic()
        self._launched.append((plan, start_s, self._forward.launch(plan)))

    def collect(self) -> StepOutput:
        if not self._launched:
            raise RuntimeError("collect: no launched plan is outstanding")
        plan, start_s, pending = self._launched.popleft()
        rows = self._sample(plan, pending())
        return StepOutput(plan.plan_id, rows, time.monotonic() - start_s)

    def done(self) -> bool:
        return self._forward is not None and self._forward.done()

    def wait(self, wake: threading.Event) -> bool:
        return self._forward is None or self._forward.wait(wake)

    def close(self) -> None:
        self._store.close()
        if self._forward is not None:
            self._forward.close()
        self._forward = None
        self._launched.clear()

    def _bind_thread(self) -> None:
        """Pins the calling thread, once, before it starts helpers that inherit its affinity."""
        current = threading.get_ident()
        if current == self._bound_thread:
            return
        if self._cpus:
            os.sched_setaffinity(0, self._cpus)
        self._bound_thread = current

    def _sample(self, plan: StepPlan, logits: NDArray[np.float32]) -> tuple[RowOutput, ...]:
        specs = [row.sample for row in plan.rows if row.sample is not None]
        drawn = iter(self._sampler.sample(logits, specs) if specs else ())
        rows = []
        for row in plan.rows:
            if row.sample is None:
                rows.append(RowOutput(row.seq_id))
                continue
            token = next(drawn)
            if isinstance(token, SampledToken):
                rows.append(RowOutput(row.seq_id, (token,)))
            else:
                rows.append(RowOutput(row.seq_id, error=token.reason))
        return tuple(rows)
