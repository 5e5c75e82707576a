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

Row = NDArray[np.float32]
"""[V]."""
GREEDY_TEMPERATURE = 1e-5
"""Below it, sampling is greedy (as vLLM's `_SAMPLING_EPS`)."""


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """Why one row of a batch has no token."""

    reason: str


class RowDraws(Protocol):
    """Uniforms, steps 6 to 8 and the normalizers of logprobs, of many rows in one call: `kernels.compiled.sampling`.
    -1 and NaN stand for rows that are no distribution; no row is changed.
    """

    def uniforms(self, seeds: Sequence[int], choices: Sequence[int], indices: Sequence[int]) -> list[float]:
        """`kernels.philox.uniform_batch`'s for drawing tokens, to the bit."""
        ...

    def draw(self, rows: Sequence[Row], wants: NDArray[np.float64]) -> list[int]:
        """The index drawn from each of R rows [V]; `wants`: [R, 5] temperature, uniform, top-k, min-p, top-p."""
        ...

    def normalizers(self, rows: Sequence[Row]) -> list[float]:
        """log(sum(exp(row))) of each row [V]."""
        ...


class Sampler:
    """Draws the next token of every row. One thread; no draw depends on an earlier one."""

    def __init__(self, rows: RowDraws | None = None) -> None:
        self._rows = rows

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
        for r, token in zip(others, self._draw([(logits[r], specs[r]) for r in others]), strict=True):
            drawn[r] = token
        return self._finish(logits, specs, drawn)

    def _draw(self, rows: list[tuple[Row, SampleSpec]]) -> list[int | SampleFailure]:
        """Steps 2 to 8."""
        changed = [(_processed(row, spec), spec) for row, spec in rows]
        random = [
            (row, spec) for row, spec in changed if not isinstance(row, SampleFailure) and not is_greedy(spec.params)
        ]
        indices = iter(self._draw_random(random))
        drawn: list[int | SampleFailure] = []
        for row, spec in changed:
            if isinstance(row, SampleFailure):
                drawn.append(row)
            else:
                drawn.append(_likeliest(row) if is_greedy(spec.params) else next(indices))
        return drawn

    def _draw_random(self, rows: list[tuple[Row, SampleSpec]]) -> list[int | SampleFailure]:
        """Steps 6 to 8 on rows that are not greedy: in one call where that can be done."""
        if not rows:
            return []
        uniforms = self._uniforms([spec for _, spec in rows])
        if self._rows is None:
            return [_draw_one(row, spec.params, u) for (row, spec), u in zip(rows, uniforms, strict=True)]
        params = [spec.params for _, spec in rows]
        wants = [(p.temperature, u, p.top_k, p.min_p, p.top_p) for p, u in zip(params, uniforms, strict=True)]
        indices = self._rows.draw([row for row, _ in rows], np.array(wants, dtype=np.float64))
        return [
            index if index >= 0 else bad_peak(float(row.max())) for (row, _), index in zip(rows, indices, strict=True)
        ]

    def _uniforms(self, specs: list[SampleSpec]) -> list[float]:
        seeds = [spec.params.seed for spec in specs]
        choices = [spec.params.choice for spec in specs]
        indices = [spec.output_index for spec in specs]
        if self._rows is not None:
            return self._rows.uniforms(seeds, choices, indices)
        uniforms: list[float] = uniform_batch(seeds, choices, indices, Purpose.SAMPLE)[:, 0].tolist()
        return uniforms

    def _finish(
        self, logits: NDArray[np.float32], specs: Sequence[SampleSpec], drawn: list[int | SampleFailure]
    ) -> list[SampledToken | SampleFailure]:
        """Adds logprobs of the raw distribution where the request asks for them."""
        asked = [
            r
            for r, spec in enumerate(specs)
            if spec.params.top_logprobs is not None and not isinstance(drawn[r], SampleFailure)
        ]
        rows = [logits[r] for r in asked]
        normalizers = self._rows.normalizers(rows) if self._rows is not None and asked else map(log_normalizer, rows)
        found: dict[int, float] = dict(zip(asked, normalizers, strict=True))
        return [
            token
            if isinstance(token, SampleFailure)
            else _with_logprobs(logits[r], token, specs[r].params, found.get(r))
            for r, token in enumerate(drawn)
        ]


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
        int(token) if math.isfinite(peak) else bad_peak(float(peak)) for token, peak in zip(ids, peaks, strict=True)
    ]


def _processed(row: Row, spec: SampleSpec) -> Row | SampleFailure:
    """Steps 2 to 5: the row itself where they change nothing, else a changed copy."""
    if is_plain(spec):
        return row
    peak = float(row.max())
    if not math.isfinite(peak):  # what a ban would hide
        return bad_peak(peak)
    changed = row.copy()
    try:
        apply_processors(changed, spec)
    except ValueError as error:
        return SampleFailure(str(error))
    return changed


def _likeliest(z: Row) -> int | SampleFailure:
    """Step 6 of a greedy row."""
    best = int(z.argmax())
    return best if math.isfinite(z[best]) else bad_peak(float(z[best]))


def _draw_one(z: Row, params: SamplingParams, u: float) -> int | SampleFailure:
    """Steps 6 to 8 on a row that is not greedy."""
    peak = float(z.max())
    if not math.isfinite(peak):
        return bad_peak(peak)
    z = z - np.float32(peak)
    if params.temperature != 1.0:
        z /= np.float32(params.temperature)
    ids, left = truncate(z, top_k=params.top_k, min_p=params.min_p, top_p=params.top_p)
    index = draw(left, u)
    return index if ids is None else int(ids[index])


def bad_peak(peak: float) -> SampleFailure:
    """What a largest logit that is not finite says about its row; NaN wins every comparison, so one NaN shows here."""
    if math.isnan(peak):
        return SampleFailure("logits: NaN in the row")
    if peak > 0:
        return SampleFailure("logits: +inf in the row")
    return SampleFailure("logits: every token is at -inf, there is nothing to draw from")


def _with_logprobs(
    logits: Row, token: int, params: SamplingParams, normalizer: float | None
) -> SampledToken | SampleFailure:
    """`normalizer`: None where no logprobs are asked for."""
    if normalizer is None or params.top_logprobs is None:
        return SampledToken(token)
    if not math.isfinite(normalizer):
        return SampleFailure("logits: no finite normalizer for logprobs in the row")
    top = tuple((int(i), float(logits[i]) - normalizer) for i in most_likely(logits, params.top_logprobs))
    return SampledToken(token, float(logits[token]) - normalizer, top)
