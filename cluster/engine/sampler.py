"""From logits to tokens. What happens to a row, in order:

1. raw logprobs, if asked for: of the model's own distribution, before anything below;
2. logit_bias;
3. banned ids (min_tokens) to -inf;
4. repetition penalty over prompt and output;
5. presence and frequency penalties over the output (2 to 5: `sampler_penalties`);
6. temperature below 1e-5: argmax, lowest id on ties. Otherwise divide by temperature;
7. top-k, min-p, top-p, each on what the one before left (`kernels.sampling` says how ties go);
8. one draw by inverse CDF over ascending token ids, with the Philox uniform of (seed, choice, output index, SAMPLE).

That is vLLM's order (v1 sampler); transformers' warpers agree except that they put min-p after top-p. No step looks at
another row, so a token depends on its row's logits and its own parameters, never on the batch.

A row that cannot be sampled (NaN, +inf, or nothing left to draw) gives a `SampleFailure` in its place; the other rows
are sampled as ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...kernels.philox import Purpose, uniform_batch
from ...kernels.sampling import draw, log_normalizer, most_likely, truncate
from ..types import SampledToken, SamplingParams
from .plan import SampleSpec
from .sampler_penalties import apply_processors, is_plain

GREEDY_TEMPERATURE = 1e-5
"""Below it, sampling is greedy (as vLLM's `_SAMPLING_EPS`)."""


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """Why one row of a batch has no token."""

    reason: str


class RowDraw(Protocol):
    """A faster `kernels.sampling.draw` for rows that nothing is cut from."""

    def __call__(self, z: NDArray[np.float32], temperature: float, u: float) -> int:
        """The index drawn from the logits of one row; -1: it cannot be drawn from."""
        ...


class Sampler:
    """Draws the next token of every row. One thread; no draw depends on an earlier one."""

    def __init__(self, draw_row: RowDraw | None = None) -> None:
        self._draw_row = draw_row

    def sample(self, logits: NDArray[np.float32], specs: Sequence[SampleSpec]) -> list[SampledToken | SampleFailure]:
        """One token, or one failure, per row.

        Args:
            logits: [R, V] float32, of the last position of each row. Not changed.
            specs: R specs, in row order.

        Raises:
            ValueError: `logits` is not [R, V] with R = len(specs) and V > 0.
        """
        if logits.ndim != 2 or logits.shape[0] != len(specs) or logits.shape[1] == 0:
            raise ValueError(f"logits: shape {logits.shape} is not [{len(specs)}, vocabulary]")
        if not specs:
            return []
        greedy = [r for r, spec in enumerate(specs) if is_greedy(spec.params) and is_plain(spec)]
        drawn: list[int | SampleFailure] = [SampleFailure("not sampled")] * len(specs)
        for r, token in zip(greedy, _argmax(logits, greedy), strict=True):
            drawn[r] = token
        others = sorted(set(range(len(specs))).difference(greedy))
        for r, u in zip(others, _uniforms([specs[r] for r in others]), strict=True):
            drawn[r] = _sample_row(logits[r], specs[r], u, self._draw_row)
        return [_finish(row, spec, token) for row, spec, token in zip(logits, specs, drawn, strict=True)]


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is taken, without a draw."""
    return params.temperature < GREEDY_TEMPERATURE


def _argmax(rows: NDArray[np.float32], chosen: list[int]) -> list[int | SampleFailure]:
    """Argmax of the `chosen` rows of [R, V], lowest id on ties; one pass, and no copy where all rows are chosen."""
    if not chosen:
        return []
    part = rows if len(chosen) == rows.shape[0] else rows[chosen]
    ids = part.argmax(axis=1)
    peaks = part[np.arange(len(chosen)), ids]
    return [
        int(token) if math.isfinite(peak) else _bad_peak(float(peak)) for token, peak in zip(ids, peaks, strict=True)
    ]


def _uniforms(specs: Sequence[SampleSpec]) -> list[float]:
    """The uniform of each spec; a greedy one's is never looked at."""
    seeds = [spec.params.seed for spec in specs]
    choices = [spec.params.choice for spec in specs]
    indices = [spec.output_index for spec in specs]
    uniforms: list[float] = uniform_batch(seeds, choices, indices, Purpose.SAMPLE)[:, 0].tolist()
    return uniforms


def _sample_row(
    logits: NDArray[np.float32], spec: SampleSpec, u: float, draw_row: RowDraw | None
) -> int | SampleFailure:
    """Steps 2 to 8 on one row, [V], which is not changed."""
    params, z = spec.params, logits
    if not is_plain(spec):
        z = logits.copy()
        try:
            apply_processors(z, spec)
        except ValueError as error:
            return SampleFailure(str(error))
    if draw_row is not None and not is_greedy(params) and _draws_whole(params):
        index = draw_row(z, params.temperature, u)
        if index >= 0:
            return index
    best = int(z.argmax())
    peak = float(z[best])
    if not math.isfinite(peak):
        return _bad_peak(peak)
    if is_greedy(params):
        return best
    z = z - np.float32(peak)
    if params.temperature != 1.0:
        z /= np.float32(params.temperature)
    ids, left = truncate(z, top_k=params.top_k, min_p=params.min_p, top_p=params.top_p)
    index = draw(left, u)
    return index if ids is None else int(ids[index])


def _draws_whole(params: SamplingParams) -> bool:
    """Whether no token is cut off before the draw."""
    return params.top_k <= 0 and params.min_p <= 0.0 and params.top_p >= 1.0


def _bad_peak(peak: float) -> SampleFailure:
    """What a largest logit that is not finite says about its row; NaN wins every comparison, so one NaN shows here."""
    if math.isnan(peak):
        return SampleFailure("logits: NaN in the row")
    if peak > 0:
        return SampleFailure("logits: +inf in the row")
    return SampleFailure("logits: every token is at -inf, there is nothing to draw from")


def _finish(logits: NDArray[np.float32], spec: SampleSpec, token: int | SampleFailure) -> SampledToken | SampleFailure:
    """Adds logprobs of the raw distribution where the request asks for them."""
    top_logprobs = spec.params.top_logprobs
    if isinstance(token, SampleFailure) or top_logprobs is None:
        return token if isinstance(token, SampleFailure) else SampledToken(token)
    normalizer = log_normalizer(logits)
    if not math.isfinite(normalizer):
        return SampleFailure("logits: no finite normalizer for logprobs in the row")
    top = tuple((int(i), float(logits[i]) - normalizer) for i in most_likely(logits, top_logprobs))
    return SampledToken(token, float(logits[token]) - normalizer, top)
