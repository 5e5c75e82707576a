"""The CPU device: a model replica computed by torch in the engine thread.

1. The constructor loads the weights, then sizes the KV memory: `kv_cache_bytes` divided by the bytes of a block.
2. The first `launch` binds the thread that computes: processor affinity and torch's thread count are per thread.
3. `launch` checks a plan, computes it and samples; `collect` hands the output over. A row whose logits are no numbers
   comes back with an error and without a token; the others are not affected.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from ....kvtransfer.layout import KVGroup, KVLayout
from ....kvtransfer.mapped.segment import KVSegment
from ....kvtransfer.store import KVStore
from ...models.config import ModelConfig
from ...models.reference import ModelFiles
from ...types import SampledToken
from ..plan import RowOutput, StepOutput, StepPlan
from ..runner import Runner
from ..sampler import Sampler
from ..weights import DTYPES, Progress, fingerprint, load_model
from .base import Device


class TensorKVStore(KVStore):
    """KV memory that other processes may map, seen without a copy as one torch tensor, [block, layer, 2, kv_head, slot,
    head_dim], and as bytes.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Zeroed memory for `num_blocks` blocks of a layout with one group."""
        (group,) = layout.groups
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (num_blocks, group.num_layers, 2, group.num_kv_heads, layout.block_size, group.head_dim)
        self.segment: KVSegment = KVSegment(layout, num_blocks)
        self._bytes = self.segment.blocks
        self.tensor = torch.frombuffer(self._bytes, dtype=DTYPES[group.dtype]).view(shape)

    def read_block(self, block_id: int) -> memoryview:
        return self._stretch(block_id).toreadonly()

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        view = memoryview(payload).cast("B")
        if len(view) != self.layout.block_bytes:
            raise ValueError(f"payload: {len(view)} bytes are not one block ({self.layout.block_bytes} bytes)")
        self._stretch(block_id)[:] = view

    def _stretch(self, block_id: int) -> memoryview:
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")
        size = self.layout.block_bytes
        return self._bytes[block_id * size : (block_id + 1) * size]


def kv_layout(config: ModelConfig, dtype: str, block_size: int) -> KVLayout:
    """The KV layout of a model: all layers in one group."""
    group = KVGroup(
        name="layers",
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )
    return KVLayout(block_size=block_size, groups=(group,))


def _check_processors(cpus: Sequence[int]) -> None:
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError(f"cpus: {tuple(cpus)} is not allowed; allowed: nothing, this system does not pin threads")
    allowed = sorted(os.sched_getaffinity(0))
    if not set(cpus) <= set(allowed):
        raise ValueError(f"cpus: {tuple(cpus)} are not all among this process's processors {allowed}")


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
        threads: int = 1,
        cpus: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> None:
        """Loads `files`. `dtype`: `bfloat16` or `float32`, of weights and KV; `cpus`: processors that the computing
        thread and its helpers are pinned to, empty: not pinned; `progress`: share loaded, 0 to 1.

        Raises ValueError naming the field (ModelError for the model's files).
        """
        if threads < 1:
            raise ValueError(f"threads: {threads} is not 1 or more")
        if cpus:
            _check_processors(cpus)
        layout = kv_layout(files.config, dtype, block_size)
        num_blocks = kv_cache_bytes // layout.block_bytes
        if num_blocks < 1:
            raise ValueError(f"kv_cache_bytes: {kv_cache_bytes} do not hold one block ({layout.block_bytes} bytes)")
        self._threads = threads
        self._cpus = frozenset(cpus)
        self._bound_thread: int | None = None
        torch.set_num_threads(threads)
        self.model = load_model(files, dtype, progress)
        self.fingerprint = fingerprint(files, dtype)
        self.vocab_size = files.config.vocab_size
        self.num_blocks = num_blocks
        store = TensorKVStore(layout, num_blocks)
        self.kv: KVStore = store
        self._segment = store.segment
        self._runner: Runner | None = Runner(self.model, store.tensor)
        self._sampler = Sampler()
        self._outputs: deque[StepOutput] = deque()

    def launch(self, plan: StepPlan) -> None:
        if self._runner is None:
            raise RuntimeError("the device is closed")
        self._bind_thread()
        self._runner.check(plan)
        start_s = time.monotonic()
        logits = self._runner.run(plan)
        rows = self._sample(plan, logits)
        self._outputs.append(StepOutput(plan.plan_id, rows, time.monotonic() - start_s))

    def collect(self) -> StepOutput:
        if not self._outputs:
            raise RuntimeError("collect: no launched plan is outstanding")
        return self._outputs.popleft()

    def close(self) -> None:
        self._segment.close()
        self._runner = None
        self._outputs.clear()

    def _bind_thread(self) -> None:
        """Pins the calling thread, once, before torch starts the helpers that inherit its affinity."""
        current = threading.get_ident()
        if current == self._bound_thread:
            return
        if self._cpus:
            os.sched_setaffinity(0, self._cpus)
        torch.set_num_threads(self._threads)
        self._bound_thread = current

    def _sample(self, plan: StepPlan, logits: torch.Tensor) -> tuple[RowOutput, ...]:
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
