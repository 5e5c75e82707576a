"""A model of random weights with its step inputs and KV memory, and whole engines run to their end: what the engine's
benchmark measures, and what its dry run on a CPU holds against the CPU's engine.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.devices.base import Device
from tandem.cluster.engine.gpu.inputs import Limits, StepInputs
from tandem.cluster.engine.gpu.model import GpuModel
from tandem.cluster.engine.gpu.weights import DeviceDummyWeights, build_on
from tandem.cluster.engine.model import Model
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.engine.policies import MixedPolicy
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import TokensEmitted
from tandem.cluster.models.config import ModelConfig
from tandem.cluster.types import Handoff, SamplingParams, SequenceSpec
from tandem.kernels.dispatch import gpu_operations
from tandem.kernels.gpu.sampling import sample
from tandem.kernels.gpu_plans.draws import Wants
from tandem.kernels.gpu_plans.tiling import form_of

BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0.0)
DTYPE = "bfloat16"


class Rig:
    """A loaded model, ready for steps of one's choice."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        *,
        kv_tokens: int,
        limits: Limits,
        quantization: str | None = None,
    ) -> None:
        """`kv_tokens`: that the KV memory holds; sequences that need more share blocks (`shares`)."""
        self.config = config
        self.device = device
        self.num_blocks = kv_tokens // BLOCK_SIZE
        with torch.inference_mode():
            source = DeviceDummyWeights(config, device, torch.bfloat16)
            weights = build_on(device, config, source, DTYPE, quantization)
            shape = (self.num_blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
            kv = torch.empty(shape, dtype=torch.bfloat16, device=device)
            for block in kv.split(max(1, self.num_blocks // 64)):
                block.normal_()
            self._limits = limits
            self._hold(weights, kv)
            self.drawn = torch.zeros(max(limits.rows, limits.tokens), dtype=torch.int32, device=device)
        self.weight_bytes = sum(linear.resident_bytes for linear in weights.linears().values())
        if config.tie_word_embeddings and quantization is None:
            self.weight_bytes += config.vocab_size * config.hidden_size * 2
        """That a decode step reads: all products, not the table that it embeds from."""

    def narrow_kv(self, dtype: torch.dtype) -> None:
        """From here on the same memory holds KV in a byte a number, twice the tokens."""
        with torch.inference_mode():
            bits = self.model.kv.view(torch.uint8).view(2 * self.num_blocks, *self.model.kv.shape[1:])
            bits.random_(0, 127)  # no NaN
            self._hold(self.model.weights, bits.view(dtype))

    def _hold(self, weights: Model, kv: torch.Tensor) -> None:
        self.num_blocks, layers, sides, heads = kv.shape[:4]
        narrow = kv.dtype != torch.bfloat16
        scales = torch.full((layers, sides, heads), 0.01, device=kv.device) if narrow else None
        self.model = GpuModel(weights, kv, torch.bfloat16, gpu_operations("triton"), scales)
        self.inputs = StepInputs(
            self.config,
            self.model.shape,
            torch.bfloat16,
            self.device,
            self._limits,
            num_blocks=self.num_blocks,
            turns=1,
            form=form_of(kv, torch.bfloat16),
        )

    def shares(self, batch: int, context: int) -> bool:
        """Whether a batch needs more blocks than there are."""
        return batch * -(-context // BLOCK_SIZE) > self.num_blocks

    def decode(self, batch: int, context: int) -> Callable[[], torch.Tensor]:
        """A step of `batch` rows at the end of contexts of `context` tokens: forward and greedy draws, captured or
        not; returns the tokens.
        """
        count = -(-context // BLOCK_SIZE)
        rows = tuple(
            StepRow(str(r), context - 1, [r + 1], self._blocks(r * count, count), SampleSpec(GREEDY, 0, (), ()))
            for r in range(batch)
        )
        with torch.inference_mode():
            laid_out = self.inputs.lay_out(StepPlan(0, rows), {}, lambda padded: padded)
        wants = Wants.of(temperature=[0.0] * batch, seed=[0] * batch, index=[0] * batch, device=self.device)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            return sample(self.model.forward(laid_out.batch, self.drawn), wants, cuts=False)

        return run

    def prefill(self, tokens: int) -> Callable[[], torch.Tensor]:
        """A step of one whole prompt, which returns its logits [1, V]."""
        ids = [1 + index % (self.config.vocab_size - 1) for index in range(tokens)]
        blocks = self._blocks(0, -(-tokens // BLOCK_SIZE))
        row = StepRow("prompt", 0, ids, blocks, SampleSpec(GREEDY, 0, (), ()))
        with torch.inference_mode():
            laid_out = self.inputs.lay_out(StepPlan(0, (row,)), {}, lambda padded: padded)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            return self.model.forward(laid_out.batch, self.drawn)

        return run

    def _blocks(self, first: int, count: int) -> list[int]:
        return [(first + index) % self.num_blocks for index in range(count)]


def kv_token_bytes(config: ModelConfig, element_bytes: int = 2) -> int:
    """Of one token, all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes


def products(config: ModelConfig) -> int:
    """Weights of the layers that each token is multiplied with."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + (3 if c.gated_mlp else 2) * c.hidden_size * c.intermediate_size)


def prefill_operations(config: ModelConfig, tokens: int) -> int:
    """Multiplications and additions of a prompt: products, causal attention, the last token's logits."""
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    return 2 * products(config) * tokens + attention + 2 * config.vocab_size * config.hidden_size


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """A load that an engine computed."""

    tokens: dict[str, list[int]]
    taken_s: float

    @property
    def output_tokens_per_s(self) -> float:
        """Of all sequences together."""
        return sum(map(len, self.tokens.values())) / self.taken_s

    def of_length(self, output_tokens: int) -> Ran:
        """Itself, once all sequences have so many tokens; RuntimeError: some have not."""
        lengths = {name: len(ids) for name, ids in self.tokens.items() if len(ids) != output_tokens}
        if lengths:
            raise RuntimeError(f"{len(lengths)} of {len(self.tokens)} sequences do not have {output_tokens} tokens")
        return self


def serve_all(
    device: Device, prompts: Sequence[Sequence[int]], output_tokens: int, *, budget: int, running: int, longest: int
) -> Ran:
    """All prompts at once through the scheduler and the device, with as many plans under way as it takes; greedy, and
    to the last token.
    """
    pool = BlockPool(device.kv.num_blocks, device.kv.layout.block_size)
    scheduler = Scheduler(
        block_pool=pool,
        prefix_cache=PrefixCache(pool, enabled=False),
        policy=MixedPolicy(),
        clock=MonotonicClock(),
        max_batched_tokens=budget,
        max_running=running,
        max_waiting=len(prompts),
        max_model_len=longest,
        eos_token_ids=(),
        max_outstanding_plans=device.plans_ahead,
        looks_ahead=device.looks_ahead,
        decode_parts=1 if device.looks_ahead else device.plans_ahead,
    )
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    begin_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        scheduler.add(
            SequenceSpec(
                seq_id=str(index),
                prompt_token_ids=tuple(prompt),
                sampling=params,
                handoff=Handoff.NONE,
                arrival_s=time.monotonic(),
            )
        )
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    under_way: deque[StepPlan] = deque()
    while scheduler.has_work or under_way:
        plan = scheduler.schedule() if len(under_way) < device.plans_ahead else None
        if plan is not None:
            device.launch(plan)
            under_way.append(plan)
            if len(under_way) < device.plans_ahead:
                continue
        under_way.popleft()
        scheduler.complete(device.collect())
        for event in scheduler.take_events():
            if isinstance(event, TokensEmitted):
                tokens[event.seq_id] += [token.token_id for token in event.tokens]
    taken_s = time.perf_counter() - begin_s
    scheduler.check_integrity()
    return Ran(tokens, taken_s).of_length(output_tokens)
