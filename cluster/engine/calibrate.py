"""Measures how large a model's keys and values become: has texts computed by a device with plain KV, reads its blocks.

Texts are prompts, or what the model writes itself, token by token at temperature 1 from single tokens: its own
distribution, without data, whatever the model (LLM-QAT, Liu et al. 2023, section 3.1).

Shapes: L layers, K KV heads, S slots, D head dim.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...kvtransfer.store import KVStore
from ..models.config import ModelConfig
from ..types import SamplingParams
from .devices.base import Device
from .kv_scales import LARGEST_STORED, SIDES, KVScales
from .plan import SampleSpec, StepPlan, StepRow

TEXT_TOKENS = 512
"""Of a text that the model writes."""
ROUND_TEXTS = 16
"""Whose KV is in memory at a time, and which decode together."""
STEP_TOKENS = 512
MAX_TOKENS = 2**20
_E4M3_LOWEST, _E4M3_MANTISSA = -6, 3
"""Exponent of the smallest normal number, bits behind its point (OCP FP8, section 5)."""


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence: tokens that are given, and how many the model writes behind them."""

    token_ids: tuple[int, ...]
    written: int = 0

    @property
    def length(self) -> int:
        """Tokens whose KV there will be."""
        return len(self.token_ids) + self.written


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was measured."""

    largest: NDArray[np.float32]
    """[L, 2, K], as `KVScales` has it: of keys at any position."""
    tokens: int
    errors: dict[str, NDArray[np.float64]]
    """By narrow type: what its rounding loses, [L, 2, K] as the root of mean squares over that of the numbers
    themselves; of the last `ROUND_TEXTS` texts.
    """


def own_texts(config: ModelConfig, tokens: int, seed: int) -> tuple[Text, ...]:
    """Texts of `tokens` together that the model writes: every second one from its beginning-of-sequence token, where it
    has one, the others from a token drawn evenly from the vocabulary.
    """
    length, draw = min(TEXT_TOKENS, config.max_model_len), random.Random(seed)
    texts = []
    for index, first in enumerate(range(0, tokens, length)):
        bos = config.bos_token_id
        start = draw.randrange(config.vocab_size) if index % 2 or bos is None else bos
        texts.append(Text((start,), min(length, tokens - first) - 1))
    return tuple(texts)


def given_texts(config: ModelConfig, prompts: Iterable[Sequence[int]], tokens: int) -> tuple[Text, ...]:
    """Prompts as they are, cut to the model's context, and `tokens` together at most. ValueError for a token that the
    model does not have, or where nothing is left.
    """
    texts: list[Text] = []
    for prompt in prompts:
        if not tokens:
            break
        ids = tuple(prompt[: min(config.max_model_len, tokens)])
        if any(not 0 <= token < config.vocab_size for token in ids):
            raise ValueError(f"prompts: a token of {ids[:8]}… is not in the model's vocabulary of {config.vocab_size}")
        tokens -= len(ids)
        texts += [Text(ids)] if ids else []
    if not texts:
        raise ValueError("prompts: no token in them; allowed: texts with at least one")
    return tuple(texts)


def blocks_needed(texts: Sequence[Text], block_size: int) -> int:
    """KV blocks of the largest round."""
    return max(sum(-(-text.length // block_size) for text in turn) for turn in _rounds(texts))


def measure(
    device: Device,
    texts: Sequence[Text],
    *,
    rotary: bool,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Seen:
    """Has the texts computed by a device with room for `blocks_needed`. `rotary`: keys were turned by their positions;
    they count as if turned to where they are largest, since positions beyond these texts will come. RuntimeError where
    a row fails or KV is not finite: such a model cannot be served either.
    """
    total = sum(text.length for text in texts)
    runs = _Runs(device, seed, lambda done: on_progress(done / total))
    largest = np.zeros((1, 1, 1), dtype=np.float32)
    sequences: list[_Sequence] = []
    for turn in _rounds(texts):
        sequences = runs.compute(turn)
        for block in _blocks(device.kv, sequences):
            largest = np.maximum(largest, _magnitudes(block, rotary))
    if not np.isfinite(largest).all():
        layer, side, head = np.argwhere(~np.isfinite(largest))[0]
        raise RuntimeError(f"{SIDES[side]} of layer {layer}, KV head {head} are not finite numbers")
    return Seen(largest=largest, tokens=total, errors=_errors(device.kv, sequences, largest))


def narrowed(values: NDArray[np.float32], scales: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """What narrow memory gives back of finite `values`: nearest, halves to even, beyond the largest the largest."""
    end = np.float32(LARGEST_STORED[dtype])
    scaled = np.clip(values / scales, -end, end)
    if dtype == "int8":
        stored = np.rint(scaled)
    else:
        exponent = np.maximum(np.frexp(scaled)[1] - 1, _E4M3_LOWEST)
        step = np.ldexp(np.float32(1), exponent - _E4M3_MANTISSA)
        stored = np.rint(scaled / step) * step
    return np.asarray(stored * scales, dtype=np.float32)


def _rounds(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    for first in range(0, len(texts), ROUND_TEXTS):
        yield texts[first : first + ROUND_TEXTS]


@dataclass(slots=True)
class _Sequence:
    """A text under way."""

    number: int
    """Among all texts."""
    text: Text
    blocks: range
    computed: int = 0
    """Tokens whose KV is there."""
    output: list[int] = field(default_factory=list)

    def row(self, seed: int) -> StepRow:
        """The next stretch of what is given, then token by token; draws one where the text goes on behind it."""
        given = self.text.token_ids
        ids = given[self.computed : self.computed + STEP_TOKENS] or self.output[-1:]
        goes_on = len(given) <= self.computed + len(ids) < self.text.length
        params = SamplingParams(temperature=1.0, seed=seed, choice=self.number)
        spec = SampleSpec(params, len(self.output), given, self.output)
        return StepRow(str(self.number), self.computed, tuple(ids), self.blocks, spec if goes_on else None)


class _Runs:
    """Steps of one device, one at a time."""

    def __init__(self, device: Device, seed: int, on_progress: Callable[[int], None]) -> None:
        self._device = device
        self._seed = seed
        self._on_progress = on_progress
        self._steps = self._texts = self._tokens = 0

    def compute(self, texts: Sequence[Text]) -> list[_Sequence]:
        """Where their KV is, until the next call."""
        sequences, free = [], 0
        for text in texts:
            blocks = range(free, free := free + self._device.kv.layout.blocks_for(text.length))
            sequences.append(_Sequence(self._texts, text, blocks))
            self._texts += 1
        for sequence in sequences:
            while sequence.computed < len(sequence.text.token_ids):
                self._step([sequence])
        while going := [sequence for sequence in sequences if sequence.computed < sequence.text.length]:
            self._step(going)
        return sequences

    def _step(self, sequences: Sequence[_Sequence]) -> None:
        self._steps += 1
        plan = StepPlan(self._steps, tuple(sequence.row(self._seed) for sequence in sequences))
        self._device.launch(plan)
        output = self._device.collect()
        for sequence, row, result in zip(sequences, plan.rows, output.rows, strict=True):
            if result.error:
                raise RuntimeError(f"the model cannot be computed: {result.error}")
            sequence.computed += len(row.token_ids)
            sequence.output += [token.token_id for token in result.tokens]
        self._tokens += plan.num_tokens
        self._on_progress(self._tokens)


def _blocks(kv: KVStore, sequences: Sequence[_Sequence]) -> Iterator[NDArray[np.float32]]:
    """[L, 2, K, S, D] of each block that was written, without the slots that were not."""
    (group,) = kv.layout.groups
    size = kv.layout.block_size
    shape = (group.num_layers, 2, group.num_kv_heads, size, group.head_dim)
    for sequence in sequences:
        for block, first in zip(sequence.blocks, range(0, sequence.computed, size), strict=True):
            values = _as_float32(kv.read_block(block), group.dtype).reshape(shape)
            yield values[:, :, :, : sequence.computed - first]


def _magnitudes(block: NDArray[np.float32], rotary: bool) -> NDArray[np.float32]:
    """[L, 2, K]. Rotary turns a key's two halves as pairs and keeps each pair's length (RoFormer, Su et al. 2021,
    section 3.2.2), which is thus the largest that either of the two becomes at any position.
    """
    largest: NDArray[np.float32] = np.abs(block).max(axis=(3, 4))
    if rotary:
        first, second = np.split(block[:, 0], 2, axis=-1)
        largest[:, 0] = np.hypot(first, second).max(axis=(2, 3))
    return largest


def _as_float32(payload: memoryview, dtype: str) -> NDArray[np.float32]:
    if dtype == "float32":
        return np.frombuffer(payload, dtype="<f4")
    assert dtype == "bfloat16", dtype
    return (np.frombuffer(payload, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def _errors(
    kv: KVStore, sequences: Sequence[_Sequence], largest: NDArray[np.float32]
) -> dict[str, NDArray[np.float64]]:
    scales = {dtype: KVScales(largest=largest).scales(dtype)[..., None, None] for dtype in LARGEST_STORED}
    squares = np.zeros(largest.shape)
    lost = {dtype: np.zeros(largest.shape) for dtype in scales}
    for block in _blocks(kv, sequences):
        squares += _squares(block)
        for dtype, scale in scales.items():
            lost[dtype] += _squares(block - narrowed(block, scale, dtype))
    there = np.where(squares > 0, squares, 1)
    return {dtype: np.sqrt(sums / there) for dtype, sums in lost.items()}


def _squares(block: NDArray[np.float32]) -> NDArray[np.float64]:
    """[L, 2, K] sums."""
    return np.asarray(np.einsum("lskbd,lskbd->lsk", block, block, dtype=np.float64))
