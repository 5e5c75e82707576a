"""All draws of a step on the device: from the plan's `SampleSpec`s to tokens, logprobs and failures, as
`cluster.engine.sampler` makes them (its steps, its order, its words), without a row of logits leaving the device
where Triton's kernels draw.

Life of a step's draws:

1. `pack` writes what every row wants into the host buffer whose copy `bind` named on the device (a fixed number of
   bytes, `input_bytes`), and what few rows ask for beside (biases, bans, penalties, logprobs) into staging of its own.
2. `draw` launches: rows that ask are changed in place (`kernels.gpu.penalties`), all rows are drawn, changed rows are
   put back where logprobs are asked of them, logprobs are taken, results copied to the host. It waits for nothing
   (other operations than Triton's do).
3. `read`, once the device has passed an event recorded behind `draw`: the tokens.

Between `draw` and `read` of a step, `depth` - 1 others may be packed and drawn. A row whose token is still being drawn
by the step before can be packed: its draw's index is known; only penalties want the tokens themselves, and such rows
wait in the scheduler (`plan.DRAWN`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import starmap

import numpy as np
import torch
from numpy.typing import NDArray

from ....kernels.gpu_plans.draws import INFINITE, NOT_A_NUMBER, NOTHING, Penalties, Wants
from ....kernels.operations import GpuOperations
from ...types import SampledToken, SamplingParams
from ..plan import SampleSpec
from ..sampler import SampleFailure, bad_peak, is_greedy
from ..sampler_penalties import bias_problem, is_plain
from .contexts import Contexts, penalizes

_ALIGNED_BYTES = 16
"""Triton compiles a kernel anew for pointers that are not."""
_ALIGNED_WORDS = _ALIGNED_BYTES // 4
_COLUMNS = (
    ("temperature", np.float32, torch.float32),
    ("top_k", np.int32, torch.int32),
    ("min_p_log", np.float32, torch.float32),
    ("top_p", np.float64, torch.float64),
    ("seed", np.uint64, torch.int64),
    ("choice", np.uint32, torch.int32),
    ("index", np.uint32, torch.int32),
)
"""Of `Wants`, in its order: name, on the host, on the device."""
_PEAKS = {NOTHING: -math.inf, INFINITE: math.inf, NOT_A_NUMBER: math.nan}
DEMANDING = SampleSpec(SamplingParams(top_k=40, top_p=0.9, top_logprobs=0), 0, (), ())
"""A row whose draw takes as much memory as any: for a profiling step."""


@dataclass(slots=True)
class Draws:
    """One step's, between `pack` and `read`."""

    rows: int
    slot: int
    """Of the staging that is in use."""
    cuts: bool
    """Whether a row asks for top-k, min-p or top-p."""
    failures: dict[int, str] = field(default_factory=dict)
    """Rows that cannot be drawn, whatever their logits are."""
    asking: list[int] = field(default_factory=list)
    """Rows that want logprobs."""
    most: int = 0
    """The likeliest tokens that any of them wants."""
    counts: list[int] = field(default_factory=list)
    """How many each of them wants."""
    parts: list[slice] = field(default_factory=list)
    """Words of the staging: rows and counts of `asking`, then `Penalties`' tensors but the last."""
    restores: bool = False
    """Whether a row that is changed wants logprobs."""


class DeviceSampler:
    """One thread."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: torch.device,
        operations: GpuOperations,
        *,
        depth: int = 2,
        tile: int | None = None,
    ) -> None:
        """`max_rows`: that a step samples at most; `depth`: steps that may be between `draw` and `read`."""
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._device = device
        self._operations = operations
        self._tile = {} if tile is None else {"tile": tile}
        self._offsets: dict[str, int] = {}
        used = 0
        for name, host, _ in _COLUMNS:
            self._offsets[name] = used
            used += _aligned(max_rows * np.dtype(host).itemsize, _ALIGNED_BYTES)
        self.input_bytes = used
        """What `pack` writes; its place in the device's buffer begins at a multiple of 16."""
        self._wants: Wants | None = None
        self._contexts = Contexts(vocab_size, max_rows)
        self._staging = [_Staging(device) for _ in range(depth)]
        self._results = [_Staging(device) for _ in range(depth)]
        self._drawn = 0
        self._read = 0

    def bind(self, columns: torch.Tensor) -> None:
        """Names the device memory ([`input_bytes`] uint8) that the caller copies `pack`'s bytes to, ahead of `draw` and
        on its stream. Once.
        """
        assert columns.numel() == self.input_bytes
        assert columns.data_ptr() % _ALIGNED_BYTES == 0
        views = []
        for name, host, on_device in _COLUMNS:
            begin = self._offsets[name]
            size = self._max_rows * np.dtype(host).itemsize
            views.append(columns[begin : begin + size].view(on_device))
        self._wants = Wants(*views)

    def pack(self, rows: Sequence[tuple[str, SampleSpec]], buffer: NDArray[np.uint8]) -> Draws:
        """A step's sampled rows (sequence id, what to draw), in the order of their logits. `buffer`: [`input_bytes`],
        where to write to. Touches the host only; the specs are not kept. What is packed and never drawn is forgotten.
        """
        assert len(rows) <= self._max_rows
        assert self._drawn - self._read < len(self._staging), "an older step is still to be read"
        params = [spec.params for _, spec in rows]
        self._fill(params, [spec.output_index for _, spec in rows], buffer)
        cuts = any(not is_greedy(p) and (p.top_k > 0 or p.min_p > 0.0 or p.top_p < 1.0) for p in params)
        draws = Draws(len(rows), self._drawn % len(self._staging), cuts)
        draws.asking = [r for r, p in enumerate(params) if p.top_logprobs is not None]
        draws.counts = [min(params[r].top_logprobs or 0, self._vocab_size) for r in draws.asking]
        draws.most = max(draws.counts, default=0)
        changed = [r for r, (_, spec) in enumerate(rows) if not is_plain(spec)]
        if draws.asking or changed:
            self._stage(draws, rows, changed)
        return draws

    def draw(self, draws: Draws, logits: torch.Tensor) -> torch.Tensor:
        """Launches everything on the current stream. `logits`: [R or more, V] float32, changed on the way.

        Returns:
            [R] int32 on the device: the tokens; below 0 where a row has none.
        """
        assert self._wants is not None, "bind comes first"
        logits, operations = logits[: draws.rows], self._operations
        staged = self._staging[draws.slot].on_device(draws.parts)
        asked = None
        if staged:
            rows, repetitions, spans, ids, values = staged[2:]
            floats = (repetitions.view(torch.float32), ids, values.view(torch.float32))
            asked = Penalties(rows, spans.view(-1, 3), *floats, torch.empty_like(floats[2]))
            operations.penalize(logits, asked, **self._tile)
        tokens = operations.sample(logits, self._wants, **self._tile, cuts=draws.cuts)
        if asked is not None and draws.restores:
            operations.restore(logits, asked, **self._tile)
        results = [tokens]
        if draws.asking:
            found = operations.logprobs(logits, tokens, staged[0], staged[1], draws.most, **self._tile)
            results += [found.normalizers_Q, found.chosen_Q, found.ids_QM, found.values_QM]
        self._results[draws.slot].keep(results)
        self._drawn += 1
        return tokens

    def read(self, draws: Draws) -> list[SampledToken | SampleFailure]:
        """A token or a failure of each row, in order; in the order of `pack`. The device must be done with `draw`."""
        self._read += 1
        tokens, *found = self._results[draws.slot].kept()
        drawn: list[SampledToken | SampleFailure] = [
            bad_peak(_PEAKS[token]) if token < 0 else SampledToken(token) for token in tokens.tolist()
        ]
        if found:
            for r, token in zip(draws.asking, starmap(_with_logprobs, _of_rows(draws, tokens, found)), strict=True):
                if isinstance(drawn[r], SampledToken):
                    drawn[r] = token
        for r, reason in draws.failures.items():
            if isinstance(drawn[r], SampledToken):
                drawn[r] = SampleFailure(reason)
        return drawn

    def _fill(self, params: Sequence[SamplingParams], indices: Sequence[int], buffer: NDArray[np.uint8]) -> None:
        """The columns of `Wants`."""
        columns: dict[str, Iterable[float]] = {
            "temperature": (0.0 if is_greedy(p) else p.temperature for p in params),
            "top_k": (p.top_k for p in params),
            "min_p_log": (math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params),
            "top_p": (p.top_p for p in params),
            "seed": (p.seed for p in params),
            "choice": (p.choice for p in params),
            "index": indices,
        }
        for name, host, _ in _COLUMNS:
            begin = self._offsets[name]
            size = len(params) * np.dtype(host).itemsize
            buffer[begin : begin + size].view(host)[:] = np.fromiter(columns[name], host, len(params))

    def _stage(self, draws: Draws, rows: Sequence[tuple[str, SampleSpec]], changed: Sequence[int]) -> None:
        """What few rows ask for, into staging."""
        touched: list[int] = []
        repetitions: list[float] = []
        spans: list[int] = []
        ids: list[NDArray[np.int32]] = []
        values: list[NDArray[np.float32]] = []
        used = 0
        for r in changed:
            seq_id, spec = rows[r]
            problem = bias_problem(spec.params.logit_bias, self._vocab_size)
            if problem is not None:
                draws.failures[r] = problem
                continue
            added = self._added(spec)
            ids.append(np.fromiter(added, np.int32, len(added)))
            values.append(np.fromiter(added.values(), np.float32, len(added)))
            middle = used + len(added)
            end = middle
            if penalizes(spec):
                context = self._contexts.of(seq_id, spec)
                ids.append(context.ids)
                values.append(context.penalties)
                end += len(context.ids)
            touched.append(r)
            repetitions.append(spec.params.repetition_penalty)
            spans += (used, middle, end)
            used = end
        asking = set(draws.asking)
        draws.restores = any(r in asking for r in touched)
        lists: list[list[NDArray]] = [
            [np.array(draws.asking, np.int32)],
            [np.array(draws.counts, np.int32)],
            [np.array(touched, np.int32)],
            [np.array(repetitions, np.float32)],
            [np.array(spans, np.int32)],
            ids,
            values,
        ]
        draws.parts = self._staging[draws.slot].fill(lists)

    def _added(self, spec: SampleSpec) -> dict[int, float]:
        """By token id: biases, and -inf where it is banned."""
        added: dict[int, float] = {}
        for token_id, value in spec.params.logit_bias:
            added[token_id] = added.get(token_id, 0.0) + value
        for token_id in spec.banned_token_ids:
            if 0 <= token_id < self._vocab_size:
                added[token_id] = -math.inf
        return added


class _Staging:
    """Host memory of 32-bit words that a GPU copies from or to without the host waiting; grows to what is needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._words = torch.empty(0, dtype=torch.int32)
        self._kept: list[tuple[slice, torch.dtype, tuple[int, ...]]] = []

    def _grow(self, words: int) -> None:
        if words > self._words.numel():
            size = max(words, 2 * self._words.numel(), 1024)
            self._words = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")

    def fill(self, lists: Sequence[Sequence[NDArray]]) -> list[slice]:
        """Writes each list's arrays one behind another; where each list lies."""
        parts, used = [], 0
        for arrays in lists:
            size = sum(array.size for array in arrays)
            parts.append(slice(used, used + size))
            used = _aligned(used + size, _ALIGNED_WORDS)
        self._grow(used)
        words = self._words.numpy()
        for part, arrays in zip(parts, lists, strict=True):
            at = part.start
            for array in arrays:
                words[at : at + array.size] = array.view(np.int32)
                at += array.size
        return parts

    def on_device(self, parts: Sequence[slice]) -> list[torch.Tensor]:
        """Copies of what `fill` wrote, int32; none for no parts."""
        if not parts:
            return []
        copy = self._words[: _aligned(parts[-1].stop, _ALIGNED_WORDS)].to(self._device, non_blocking=True)
        return [copy[part] for part in parts]

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Starts to copy results here."""
        self._kept, used = [], 0
        for tensor in tensors:
            words = tensor.numel() * tensor.element_size() // 4
            self._kept.append((slice(used, used + words), tensor.dtype, tuple(tensor.shape)))
            used = _aligned(used + words, _ALIGNED_WORDS)
        self._grow(used)
        for tensor, (part, _, _) in zip(tensors, self._kept, strict=True):
            self._words[part].copy_(tensor.contiguous().flatten().view(torch.int32), non_blocking=True)

    def kept(self) -> list[torch.Tensor]:
        """Results, as they came; valid until the next `keep`."""
        return [self._words[part].view(dtype).view(shape) for part, dtype, shape in self._kept]


def _of_rows(
    draws: Draws, tokens: torch.Tensor, found: Sequence[torch.Tensor]
) -> Iterable[tuple[int, float, float, list[int], list[float]]]:
    """Of each row that asks: token, its logit, normalizer, likeliest tokens and their logits."""
    normalizers, chosen, ids, values = (tensor.tolist() for tensor in found)
    for q, (r, count) in enumerate(zip(draws.asking, draws.counts, strict=True)):
        yield int(tokens[r]), chosen[q], normalizers[q], ids[q][:count], values[q][:count]


def _with_logprobs(
    token: int, logit: float, normalizer: float, ids: Sequence[int], values: Sequence[float]
) -> SampledToken:
    top = tuple((i, value - normalizer) for i, value in zip(ids, values, strict=True) if i >= 0)
    return SampledToken(token, logit - normalizer, top)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
