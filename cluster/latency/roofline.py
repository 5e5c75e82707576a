"""Step times of a model that was never measured, from its sizes and a hardware file: a `StepCosts` (see `interface`).

A decoder layer on one of `tensor_parallel` ranks, for T tokens of which P are prompts' and R decode rows':

    norm · QKV product · rotary · attention of the P and of the R · output product · all-reduce · residual
    norm · feed-forward up (and gate) · activation · down · all-reduce · residual

with two all-reduces of T·hidden where there are several ranks (Shoeybi et al., Megatron-LM, 2019, §3). Before the first
layer stands the embedding, after the last one the output head over the rows that are sampled: every decode row, and one
prompt. A pipeline has `pipeline_stages` such ranks one after the other; activations of T·hidden pass between them. The
whole is the stages, the passages and one step overhead; the slowest stage is the one with most layers and the head.

What it leaves out: bubbles of a pipeline (the caller's business: it knows what follows what), prompts beyond the first
in the head, memory traffic of a paged layout, and whatever an engine does between kernels but for `step_overhead_us`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .hardware import Hardware
from .interface import StepRun
from .links import Link
from .model_facts import ModelFacts
from .operators import (
    all_reduce_s,
    decode_attention_s,
    elementwise_s,
    gemm_s,
    prefill_attention_s,
    sizes,
)

Array = NDArray[np.float64]
TABLE_TOKENS = 8192
"""Up to this many tokens a step's linear part is looked up; beyond, it goes on as the last tokens' does."""
TABLE_ROWS = 2048
"""The same for rows that are sampled."""
_SAMPLE_PASSES, _LOGIT_BYTES = 3, 4
"""The sampler reads and writes the float32 logits about this often."""


class Roofline:
    """Costs of one model replica on devices of one kind. Immutable; safe from any thread."""

    def __init__(
        self,
        facts: ModelFacts,
        hardware: Hardware,
        tensor_parallel: int = 1,
        pipeline_stages: int = 1,
        *,
        tensor_link: Link | None = None,
        stage_link: Link | None = None,
    ) -> None:
        """`tensor_link`: what all-reduces go over, None: the hardware's own all-reduce inside a node, its link between
        nodes where one node has fewer devices. `stage_link`: between stages, None: the link inside a node where all
        ranks fit into one, else the one between nodes. ValueError for a split that the model does not allow, or a dtype
        that the hardware has no peak for.
        """
        facts.check_parallel(tensor_parallel, pipeline_stages)
        self.facts = facts
        self.hardware = hardware
        self.tensor_parallel = tensor_parallel
        self._stages = pipeline_stages
        self._peaks = hardware.peaks(facts.dtype)
        fits = tensor_parallel <= hardware.devices_per_node and hardware.terms.all_reduce is not None
        self._tensor_link = tensor_link or (None if fits else hardware.link(inside_node=False))
        together = tensor_parallel * pipeline_stages <= hardware.devices_per_node
        self._stage_link = stage_link or hardware.link(inside_node=together)
        self._tabulate()

    @property
    def pipeline_stages(self) -> int:
        """Stages that a step passes through."""
        return self._stages

    def step_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """Seconds of the whole step, through all stages."""
        return self._time_s(self._whole, self._layers, prefill_tokens, prefill_squares, decode_rows, context_tokens)

    def stage_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """Seconds that the slowest stage is taken: the one with most layers, and the head."""
        table, layers = self._stage, self._stage_layers
        return self._time_s(table, layers, prefill_tokens, prefill_squares, decode_rows, context_tokens)

    def _time_s(
        self, table: list[float], layers: int, prefill_tokens: int, prefill_squares: int, rows: int, context_tokens: int
    ) -> float:
        """`table`: the linear part by tokens; `layers`: those whose attention counts."""
        tokens = prefill_tokens + rows
        seconds = table[tokens] if tokens <= TABLE_TOKENS else _beyond(table, tokens)
        if rows:
            context_s = self._decode_row_s * rows + self._decode_context_s * context_tokens
            seconds += layers * (self._decode_s + context_s)
        if prefill_tokens:
            length_s = self._prefill_root_s * math.sqrt(prefill_squares) + self._prefill_square_s * prefill_squares
            seconds += layers * (self._prefill_s + self._prefill_token_s * prefill_tokens + length_s)
            rows += 1
        return seconds + (self._head[rows] if rows <= TABLE_ROWS else _beyond(self._head, rows))

    def decode_steps(self, rows: int, context_tokens: int, steps: int) -> StepRun:
        """Ends of consecutive decode steps of the same rows, [steps]; see `StepCosts.decode_steps`."""
        growth_s = self._layers * self._decode_context_s * rows
        return StepRun(self.step_time_s(0, 0, rows, context_tokens), growth_s, steps)

    def _tabulate(self) -> None:
        """Reduces the operators to numbers: tables of what depends on tokens or rows, coefficients of the rest."""
        counts = self.facts.stage_layers(self._stages)
        tokens = sizes(0, TABLE_TOKENS)
        layer, embedding, passage = self._layer_s(tokens), self._embedding_s(tokens), self._passage_s(tokens)
        overhead_s = self.hardware.step_overhead_us * 1e-6
        self._layers, self._stage_layers = sum(counts), max(counts)
        whole = self._layers * layer + embedding + (self._stages - 1) * passage + overhead_s
        stage = self._stage_layers * layer + passage + overhead_s / self._stages
        self._whole: list[float] = whole.tolist()
        self._stage: list[float] = (whole if self._stages == 1 else stage).tolist()
        self._head: list[float] = self._head_s(sizes(0, TABLE_ROWS)).tolist()
        self._head[0] = 0.0
        self._attention()

    def _attention(self) -> None:
        """Coefficients of attention in one layer: differences of the operators, which are linear but for the root."""
        c, terms, peaks = self.facts.config, self.hardware.terms, self._peaks
        heads, kv_heads = c.num_heads // self.tensor_parallel, -(-c.num_kv_heads // self.tensor_parallel)
        token_bytes = 2 * (heads + kv_heads) * c.head_dim * self.facts.activation_bytes

        def prefill(squares: float, moved: float) -> float:
            return float(prefill_attention_s(terms.prefill_attention, peaks, squares, moved, heads, c.head_dim))

        def decode(rows: float, kv_bytes: float) -> float:
            return float(decode_attention_s(terms.decode_attention, peaks, rows, kv_heads, kv_bytes))

        self._prefill_s = prefill(0.0, 0.0)
        self._prefill_token_s = prefill(0.0, token_bytes) - self._prefill_s
        self._prefill_root_s = terms.prefill_attention.length_ns * 1e-9
        self._prefill_square_s = prefill(1.0, 0.0) - self._prefill_s - self._prefill_root_s
        self._decode_s = decode(0.0, 0.0)
        self._decode_row_s = decode(1.0, 0.0) - self._decode_s
        kv_bytes = 2 * kv_heads * c.head_dim * self.facts.kv_dtype_bytes
        self._decode_context_s = decode(0.0, kv_bytes) - self._decode_s

    def _layer_s(self, tokens: Array) -> Array:
        """One layer without its attention, [tokens]."""
        c, ranks, element = self.facts.config, self.tensor_parallel, self.facts.activation_bytes
        hidden, heads = c.hidden_size, c.num_heads * c.head_dim / ranks
        kv_width = -(-c.num_kv_heads // ranks) * c.head_dim
        ffn, into = -(-c.intermediate_size // ranks), 2 if c.gated_mlp else 1
        linears = [(heads + 2 * kv_width, hidden), (hidden, heads), (into * ffn, hidden), (hidden, ffn)]
        seconds: Array = sum((self._gemm_s(tokens, n, k) for n, k in linears), np.zeros_like(tokens))
        terms = self.hardware.terms.elementwise
        seconds += self._pass_s(terms.norm_share, tokens * (2 * 2 * hidden * element), kernels=2)
        seconds += self._pass_s(terms.add_share, tokens * (2 * 3 * hidden * element), kernels=2)
        seconds += self._pass_s(terms.activation_share, tokens * ((into + 1) * ffn * element))
        if not c.learned_positions:
            seconds += self._pass_s(terms.activation_share, tokens * (2 * (heads + kv_width) * element))
        if ranks > 1:
            seconds += 2 * self._all_reduce_s(tokens * (hidden * element))
        return seconds

    def _embedding_s(self, tokens: Array) -> Array:
        width = self.facts.config.hidden_size * self.facts.activation_bytes
        return self._pass_s(self.hardware.terms.elementwise.activation_share, tokens * (2 * width))

    def _passage_s(self, tokens: Array) -> Array:
        """Activations from one stage to the next, [tokens]."""
        if self._stages == 1:
            return np.zeros_like(tokens)
        moved = tokens * (self.facts.config.hidden_size * self.facts.activation_bytes)
        return self._stage_link.latency_s + moved / self._stage_link.bytes_per_s

    def _head_s(self, rows: Array) -> Array:
        """Final norm, output head, gathering of the logits, sampling, [rows]."""
        c, ranks = self.facts.config, self.tensor_parallel
        vocabulary = -(-c.vocab_size // ranks)
        terms = self.hardware.terms.elementwise
        logits = rows * (c.vocab_size * _LOGIT_BYTES)
        seconds = self._gemm_s(rows, vocabulary, c.hidden_size)
        seconds += self._pass_s(terms.norm_share, rows * (2 * c.hidden_size * self.facts.activation_bytes))
        seconds += self._pass_s(terms.activation_share, _SAMPLE_PASSES * logits, kernels=_SAMPLE_PASSES)
        if ranks > 1:
            seconds += 0.5 * self._all_reduce_s(logits)  # an all-gather is the second half of a ring
        return seconds

    def _gemm_s(self, tokens: Array, n: float, k: float) -> Array:
        weight, element = self.facts.weight_dtype_bytes, self.facts.activation_bytes
        terms = (self.hardware.terms.gemm_8bit if weight == 1 else None) or self.hardware.terms.gemm
        seconds: Array = gemm_s(terms, self._peaks, tokens, n, k, weight, element)
        return seconds

    def _pass_s(self, share: float, moved_bytes: Array, kernels: int = 1) -> Array:
        launch_us = self.hardware.terms.elementwise.launch_us
        seconds: Array = elementwise_s(launch_us, share, self._peaks, moved_bytes, kernels)
        return seconds

    def _all_reduce_s(self, size_bytes: Array) -> Array:
        terms, link, ranks = self.hardware.terms.all_reduce, self._tensor_link, self.tensor_parallel
        if link is None:
            assert terms is not None  # else __init__ has taken a link
            seconds: Array = all_reduce_s(terms, ranks, size_bytes)
            return seconds
        ring = 2.0 * (ranks - 1) / ranks * size_bytes / link.bytes_per_s
        return ring + 2 * (ranks - 1) * link.latency_s


def _beyond(table: list[float], size: int) -> float:
    """A table's value beyond its end: on with the slope of its last half."""
    last = len(table) - 1
    slope = (table[last] - table[last // 2]) / (last - last // 2)
    return table[last] + slope * (size - last)
