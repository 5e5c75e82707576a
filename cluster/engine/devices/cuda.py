"""The CUDA device: a model replica on one GPU.

1. The constructor loads the weights onto the GPU, sizes the KV memory, captures decode steps (`engine.gpu`).
2. `launch` checks a plan, gathers its inputs in pinned memory and queues, on the device's own stream: their copy, the
   forward pass, the draws, and the copy of what was drawn to the host. It returns before any of that is done.
3. `collect` waits for the event behind the oldest plan's last copy, and reads its tokens. Rows whose logits are no
   numbers come back with an error; the others are not affected.

Two plans may be under way: while one is computed the next is laid out, so that the GPU never waits for the host. A row
of the second may go on from the token that the first is drawing: it finds it on the device.

Of a worker of several GPUs (`devices.cuda_ranks`) each rank has one such device for its `part` of the model, all are
given the same plans, and the first draws for all (`engine.gpu.part`).

Who computes between the products (`kernels.dispatch`): Triton's kernels, or torch's operations or the plain formulas,
which wait for the device in `launch` and are never captured.

`device="cpu"` computes the same on CPU tensors, in Triton's interpreter: the tests' way, and nobody else's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ....kernels.dispatch import gpu_operations
from ....kernels.gpu_plans.tiling import form_of
from ...models.reference import ModelFiles
from ...types import SampledToken
from ..fingerprint import fingerprint
from ..forward import Stage
from ..gpu.graphs import DecodeGraphs, DecodeShape, decode_shapes
from ..gpu.inputs import LaidOut, Limits, StepInputs
from ..gpu.kv_store import DeviceKVStore
from ..gpu.memory import CAPTURING, KV, LOADING, STEPS, DeviceShare, fitting
from ..gpu.model import GpuModel, picked_for
from ..gpu.part import Part, whole
from ..gpu.sampling import DeviceSampler, Draws
from ..gpu.shared_linears import join_part
from ..gpu.sizing import blocks_to_profile, check_model, measure_room, own_share
from ..gpu.staging import Staging
from ..gpu.step_clock import StepClock, at_rest
from ..gpu.warm_up import warm_up_plans
from ..gpu.weights import build_on, expected_bytes
from ..model import Model
from ..narrow_kv import NarrowKV
from ..plan import RowOutput, StepOutput, StepPlan
from ..weight_source import WeightSource
from ..weights import DTYPES, open_weights
from .base import Device
from .kv_memory import kv_layout

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 256
"""That a step may sample beyond `max_running`: of what times steps before it serves."""
REST_S = 10.0
"""For what is under way to end when the device is closed."""
_LOOK_S = 0.0001
"""Between two looks at a step's end, where something else may end the wait."""


@dataclass(slots=True)
class _UnderWay:
    """A launched plan."""

    plan: StepPlan
    clock: StepClock
    draws: Draws | None
    """None: made when it is collected, or elsewhere."""


class CudaDevice(Device):
    """A model on a GPU. Owned by the engine thread; `kv` may be used by transport threads."""

    name = "cuda"

    def __init__(
        self,
        files: ModelFiles,
        *,
        dtype: str,
        block_size: int,
        kv_cache_bytes: int = 0,
        max_batched_tokens: int = 512,
        max_running: int = 64,
        max_model_len: int | None = None,
        quantization: str | None = None,
        kernels: str = "auto",
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        device: str = "cuda",
        source: WeightSource | None = None,
        stage: Stage | None = None,
        part: Part | None = None,
        narrow_kv: NarrowKV | None = None,
    ) -> None:
        """Loads `files` (from `source` instead, where one is given: benchmarks).

        `dtype`: `bfloat16` or `float32`, of weights, and of KV without `narrow_kv`; `kv_cache_bytes`: 0 for what
        `gpu_memory_utilization` leaves; `quantization`: `w8a8`, `w4a16` or None; `max_running`: rows of the largest
        captured decode step; `stage`: follows the start; `part`: of a worker of several GPUs, whose `kv_cache_bytes`
        are those of all ranks.

        Raises ValueError naming the field (ModelError for the model's files; DoesNotFit with the arithmetic), OSError.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not allowed; allowed: one of {', '.join(sorted(DTYPES))}")
        self._where = torch.device(device)
        self.picked = picked_for(files.config, self._where, kernels, quantization)
        logger.info("kernels: %s (%s)", self.picked.kernels, self.picked.reason)
        self._operations = gpu_operations(self.picked.kernels)
        self._enforce_eager = enforce_eager or self.picked.kernels != "triton"
        self._say = stage or (lambda what, share: None)
        self._config, self._name = files.config, files.name
        self._part = part = part or whole(files.config)
        self.plans_ahead, self.looks_ahead = part.plans_ahead, part.looks_ahead
        self._make_streams()
        longest = min(max_model_len or files.config.max_model_len, files.config.max_model_len)
        self._limits = Limits(max_running, max_batched_tokens, -(-longest // block_size))
        self.fingerprint = fingerprint(files, dtype, quantization, narrow_kv)
        self.vocab_size = files.config.vocab_size
        held_as = dtype if narrow_kv is None else narrow_kv.dtype
        self._layout = kv_layout(part.shard.local, held_as, block_size)
        block_bytes = kv_layout(files.config, held_as, block_size).block_bytes
        self._under_way: deque[_UnderWay] = deque()
        self._drawn_at: dict[str, int] = {}
        """Where among the newest plan's draws each sequence's is."""
        with self._on_stream():
            share = None if kv_cache_bytes else own_share(self._where, gpu_memory_utilization, self.picked.kernels)
            blocks = self._first_blocks(kv_cache_bytes, block_bytes, profiles=share is not None)
            check_model(
                self._where,
                share,
                model=files.name,
                weight_bytes=expected_bytes(part.shard, dtype, quantization),
                blocks=blocks,
                block_bytes=self._layout.block_bytes,
            )
            weights = self._load(files, source, dtype, quantization)
            self.kv: DeviceKVStore = self._kv_store(blocks, shared=share is None)
            scales = None if narrow_kv is None else torch.from_numpy(narrow_kv.part(part.shard)).to(self._where)
            self._model: GpuModel | None = GpuModel(weights, self.kv.tensor, DTYPES[dtype], self._operations, scales)
            with fitting(files.name, STEPS):
                self._make_buffers(DTYPES[dtype], blocks)
                self._warm_up(blocks, tunes=quantization is not None)
                if share is not None:
                    self._grow_kv(share)
            self.num_blocks = self.kv.num_blocks
            self._inputs.clear()
            if self._stream is not None:
                self.kv.warm_up()
                self._stream.synchronize()  # what other streams find was filled on this one
            with fitting(files.name, CAPTURING):
                self._graphs.capture(lambda done: self._say("capturing decode steps", done))

    def _make_streams(self) -> None:
        on_gpu = self._where.type == "cuda"
        self._stream = torch.cuda.Stream(self._where) if on_gpu else None
        self._draw_stream = torch.cuda.Stream(self._where) if on_gpu and not self._part.looks_ahead else None
        """Of a pipeline's leader, whose first stage is at the next plan when logits come back."""

    def _load(self, files: ModelFiles, source: WeightSource | None, dtype: str, quantization: str | None) -> Model:
        with fitting(files.name, LOADING):
            weights = build_on(
                self._where,
                files.config,
                source or open_weights(files),
                dtype,
                quantization,
                shard=self._part.shard,
                progress=lambda done: self._say("loading weights", done),
            )
        join_part(weights, self._part)
        return weights

    def _first_blocks(self, kv_cache_bytes: int, block_bytes: int, *, profiles: bool) -> int:
        """Of the KV memory to serve from, or of one to profile with. `block_bytes`: of a block on all ranks."""
        if profiles:
            return blocks_to_profile(self._limits, self._layout.block_size)
        if kv_cache_bytes < block_bytes:
            raise ValueError(f"kv_cache_bytes: {kv_cache_bytes} do not hold one block ({block_bytes} bytes)")
        return kv_cache_bytes // block_bytes

    def _make_buffers(self, dtype: torch.dtype, num_blocks: int) -> None:
        """All that has one address for as long as the device is there."""
        assert self._model is not None
        rows, where = self._limits.rows, self._where
        self._inputs = StepInputs(
            self._config,
            self._model.shape,
            dtype,
            where,
            self._limits,
            num_blocks=num_blocks,
            turns=self.plans_ahead,
            form=form_of(self._model.kv, dtype),
        )
        self._most_sampled = max(rows, min(self._limits.tokens, _SAMPLED_ROWS))
        self._drawn = torch.zeros(self._most_sampled, dtype=torch.int32, device=where)
        """What the newest plan drew, in the order of its rows that sample."""
        if self._part.leads:
            self._make_sampler()
        shard = self._part.shard
        self._residual = torch.zeros(0 if shard.is_first else rows, self._config.hidden_size, device=where)
        """From the stage before, of a captured step."""
        width = self.vocab_size if shard.is_last else self._config.hidden_size
        self._out = torch.zeros(rows, width, device=where)
        """What a captured step ends with: logits, or the residual stream for the next stage."""
        shapes = decode_shapes(rows, self._inputs.most_pieces)
        self._num_graphs = 0 if self._enforce_eager else len(shapes)
        self._graphs = DecodeGraphs(self._decode, shapes, where, enforce_eager=self._enforce_eager)

    def _make_sampler(self) -> None:
        self._sampler = DeviceSampler(
            self.vocab_size, self._most_sampled, self._where, self._operations, depth=self.plans_ahead
        )
        self._wishes = Staging(self._where, self._sampler.input_bytes, self.plans_ahead)
        """What is wanted of the draws."""
        self._wishes.begin()
        place, _ = self._wishes.room((self._sampler.input_bytes,), np.uint8)
        self._sampler.bind(self._wishes.tensor(place))

    def _warm_up(self, num_blocks: int, *, tunes: bool) -> None:
        """Runs steps over KV that is nobody's yet, so that no request waits for kernels to be compiled or, where
        products are quantized, for the best way to compute them at each size to be found.
        """
        if self._where.type != "cuda" or self.picked.kernels != "triton":
            return
        plans = warm_up_plans(self._limits, self._layout.block_size, num_blocks, self._most_sampled, tunes=tunes)
        for done, plan in enumerate(plans):
            self._say("warming up", done / len(plans))
            self._run_alone(plan)

    def _grow_kv(self, share: DeviceShare) -> None:
        """Puts all that fits beside what is loaded in the place of the memory to profile with."""
        self._say("profiling a step", None)
        room = measure_room(
            self._where,
            share,
            self._layout,
            self._limits,
            model=self._name,
            most_sampled=self._most_sampled,
            temporary_bytes=self.kv.tensor.nbytes,
            graphs=self._num_graphs,
            run=self._run_alone,
        )
        logger.info("KV memory: %s", room.arithmetic)
        blocks = self._part.smallest("blocks", room.blocks)
        assert self._model is not None
        self._model.kv = torch.empty(0)
        self.kv.close()
        del self.kv
        self.kv = self._kv_store(blocks, shared=True)
        self._model.kv, self._inputs.num_blocks = self.kv.tensor, blocks

    def _kv_store(self, blocks: int, *, shared: bool) -> DeviceKVStore:
        if self._where.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for later is the driver's to give
        # What is made under inference mode may not be written to outside of it.
        with torch.inference_mode(False), fitting(self._name, KV):
            return DeviceKVStore(self._layout, blocks, device=self._where, shared=shared)

    def _run_alone(self, plan: StepPlan) -> None:
        self.launch(plan)
        self.collect()

    def launch(self, plan: StepPlan) -> None:
        if self._model is None:
            raise RuntimeError("the device is closed")
        assert len(self._under_way) < self.plans_ahead, f"collect comes before plan {self.plans_ahead + 1}"
        sampling = [row.seq_id for row in plan.rows if row.sample is not None]
        if len(sampling) > self._most_sampled:
            raise ValueError(f"plan: {len(sampling)} rows sample, allowed: {self._most_sampled} (max_running)")
        clock, draws, part = StepClock(self._where.type == "cuda"), None, self._part
        draws_now = part.leads and part.shard.is_last
        with self._on_stream():
            laid_out = self._inputs.lay_out(plan, self._drawn_at, lambda rows: self._graphs.shape_for(rows).rows)
            part.tell(plan)
            if draws_now:
                draws = self._pack(plan)
            clock.begin()
            out = self._compute(laid_out)
            if draws is not None:
                self._drawn[: len(sampling)].copy_(self._sampler.draw(draws, out))
            if part.shard.tensor_parallel > 1 and part.looks_ahead:
                part.ranks.share_drawn(self._drawn[: len(sampling)])
            if part.shard.is_last and not part.shard.is_first and part.shard.place == 0:
                part.ranks.give_back(out[: len(sampling)])
            clock.end()
        self._under_way.append(_UnderWay(plan, clock, draws))
        self._drawn_at = {seq_id: place for place, seq_id in enumerate(sampling)}

    def collect(self) -> StepOutput:
        if not self._under_way:
            raise RuntimeError("collect: no launched plan is outstanding")
        step = self._under_way.popleft()
        if self._part.leads and step.draws is None:
            self._draw_what_comes_back(step)
        duration_s = step.clock.wait_s()
        drawn = iter(() if step.draws is None else self._sampler.read(step.draws))
        rows = []
        for row in step.plan.rows:
            token = next(drawn, None) if row.sample is not None else None
            if token is None:
                rows.append(RowOutput(row.seq_id))
            elif isinstance(token, SampledToken):
                rows.append(RowOutput(row.seq_id, (token,)))
            else:
                rows.append(RowOutput(row.seq_id, error=token.reason))
        return StepOutput(step.plan.plan_id, tuple(rows), duration_s)

    def wait(self, wake: threading.Event) -> bool:
        """As `Device.wait`: what comes meanwhile is launched behind the step. `done` stays False: a plan that is ready
        is launched first, and then the one before it is collected. Logits that are still to come back tell no end.
        """
        if not self._under_way:
            return False
        step = self._under_way[0]
        if self._part.leads and step.draws is None:
            return True
        while not step.clock.ended():
            if wake.wait(_LOOK_S):
                return step.clock.ended()
        return True

    def _compute(self, laid_out: LaidOut) -> torch.Tensor:
        """Logits [R or more, V], or the residual stream [T, C] that the next stage goes on from."""
        assert self._model is not None
        part, batch, residual = self._part, laid_out.batch, None
        if not part.shard.is_first:
            padded = laid_out.padded_rows
            shape = (len(batch.tokens_T), self._config.hidden_size)
            residual = torch.empty(shape, device=self._where) if padded is None else self._residual[:padded]
            part.ranks.take_over(residual)
        if laid_out.padded_rows is None:
            out = self._model.forward(batch, self._drawn, residual)
        else:
            out = self._graphs.replay(self._graphs.shape_for(laid_out.padded_rows))
        if not part.shard.is_last:
            part.ranks.pass_on(out)
        return out

    def _pack(self, plan: StepPlan) -> Draws:
        """A plan's wishes, on their way to the device."""
        self._wishes.begin()
        _, wishes = self._wishes.room((self._sampler.input_bytes,), np.uint8)
        draws = self._sampler.pack([(row.seq_id, row.sample) for row in plan.rows if row.sample is not None], wishes)
        self._wishes.upload()
        return draws

    def _draw_what_comes_back(self, step: _UnderWay) -> None:
        """From the last stage, which has computed all that a step is when it answers."""
        with self._on_stream(self._draw_stream):
            step.draws = self._pack(step.plan)
            self._sampler.draw(step.draws, self._part.ranks.get_back(step.draws.rows))
            step.clock.end()

    def close(self) -> None:
        if self._model is None:
            return
        self._part.give_up()
        ended = at_rest([stream for stream in (self._stream, self._draw_stream) if stream is not None], REST_S)
        self._graphs.close()
        self._part.close()
        if ended:
            self.kv.close()
        else:
            logger.error("a step has not ended within %g s: its memory is kept until this process ends", REST_S)
        self._model = None
        self._under_way.clear()

    def _decode(self, shape: DecodeShape) -> torch.Tensor:
        """A decode step of whatever the static buffers hold."""
        assert self._model is not None
        residual = None if self._part.shard.is_first else self._residual[: shape.rows]
        out = self._model.forward(self._inputs.static_batch(shape.rows), self._drawn, residual)
        return self._out[: shape.rows].copy_(out)

    @contextlib.contextmanager
    def _on_stream(self, other: torch.cuda.Stream | None = None) -> Iterator[None]:
        """What is queued meanwhile is queued on the device's stream, or on another."""
        with torch.inference_mode():
            if self._stream is None:
                yield
            else:
                with torch.cuda.stream(other or self._stream):
                    yield
