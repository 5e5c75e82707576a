"""From measured steps to a `StepProfile`: least squares on relative errors, no term below zero. Pure.

Each sample says Σ_j x_j·t_j ≈ y; divided by y this is a linear least-squares problem in the terms t >= 0 (Lawson and
Hanson's NNLS). Two things about a profile are not linear and are searched for: a mixed step pays the larger of the two
fixed costs, so the fit is repeated with the side that the last one says; and decode may follow other terms from some
batch on (DistServe, OSDI '24, appendix A, fits them apart), so every break that leaves enough samples on both sides is
tried, and taken only if it explains the samples much better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from .interface import StepCosts
from .profile import DecodeTerms, StepProfile

Array = NDArray[np.float64]
HELD_OUT_EVERY = 5
MIN_SAMPLES = 4
"""Of prompts, and of decode: as many as there are terms, and one more."""
MIN_BREAK_SAMPLES = 6
BREAK_GAIN = 0.5
"""A break must leave at most this share of the squared error …"""
GOOD_ENOUGH = 0.01
"""… and is not looked for where the relative error (root mean square) is below this without one."""
_ROUNDS = 4
_PREFILL, _SMALL, _LARGE = slice(0, 3), slice(3, 6), slice(6, 9)


@dataclass(frozen=True, slots=True)
class StepSample:
    """One measured step: its shape as `cluster.engine.step_shape` counts it, and how long it took."""

    prefill_tokens: int
    prefill_squares: int
    decode_rows: int
    context_tokens: int
    seconds: float

    def __post_init__(self) -> None:
        sizes = (self.prefill_tokens, self.prefill_squares, self.decode_rows, self.context_tokens)
        if min(sizes) < 0 or self.prefill_tokens + self.decode_rows == 0:
            raise ValueError(f"sample: sizes {sizes} are not allowed; allowed: at least 0, and a token to compute")
        if not (math.isfinite(self.seconds) and self.seconds > 0.0):
            raise ValueError(f"sample: seconds {self.seconds!r} is not allowed; allowed: above 0")


@dataclass(frozen=True, slots=True)
class RelativeErrors:
    """Of predicted against measured: |predicted / measured - 1|."""

    median: float
    p90: float
    worst: float
    points: int


@dataclass(frozen=True, slots=True)
class FitReport:
    """How well a profile says what was measured."""

    held_out: RelativeErrors
    """On every fifth sample, by a fit of the others."""
    fitted: RelativeErrors
    """On all samples, by the profile, which is fitted to all of them."""
    large_batch_rows: int | None
    """Where decode's other terms begin; None: one set is enough."""


def fit_profile(
    samples: Sequence[StepSample], *, pipeline_stages: int = 1, source: str = ""
) -> tuple[StepProfile, FitReport]:
    """The profile that says the samples best, and its errors; `samples` are whole steps, in any order.

    ValueError if there are fewer than MIN_SAMPLES of prompts or of decode steps, beside what is held out.
    """
    kept, held_out = _without(samples, HELD_OUT_EVERY - 1)
    _check_enough(kept)
    judged = _profile(*_best(kept), pipeline_stages, source)
    terms, large_batch_rows = _best(samples)
    profile = _profile(terms, large_batch_rows, pipeline_stages, source)
    report = FitReport(relative_errors(judged, held_out), relative_errors(profile, samples), large_batch_rows)
    return profile, report


def predictions_held_out(samples: Sequence[StepSample]) -> list[float]:
    """Seconds of each sample by a fit that has not seen it: every fifth is left out, five times, [N]. ValueError as
    `fit_profile`.
    """
    predicted = [0.0] * len(samples)
    for fold in range(HELD_OUT_EVERY):
        kept, held_out = _without(samples, fold)
        _check_enough(kept)
        judged = _profile(*_best(kept), 1, "")
        for number, sample in zip(range(fold, len(samples), HELD_OUT_EVERY), held_out, strict=True):
            predicted[number] = judged.step_time_s(*astuple(sample)[:4])
    return predicted


def _without(samples: Sequence[StepSample], fold: int) -> tuple[list[StepSample], list[StepSample]]:
    """(those that a fold keeps, every fifth from `fold` on)."""
    held_out = list(samples[fold::HELD_OUT_EVERY])
    return [sample for number, sample in enumerate(samples) if number % HELD_OUT_EVERY != fold], held_out


def _check_enough(kept: Sequence[StepSample]) -> None:
    for kind, count in (
        ("prompts", sum(sample.prefill_tokens > 0 for sample in kept)),
        ("decode steps", sum(sample.decode_rows > 0 for sample in kept)),
    ):
        if count < MIN_SAMPLES:
            raise ValueError(f"samples: {count} of {kind} are too few; allowed: {MIN_SAMPLES} beside every fifth")


def profile_of(
    costs: StepCosts, *, max_tokens: int = 8192, max_rows: int = 512, max_context: int = 4096, source: str = ""
) -> tuple[StepProfile, FitReport]:
    """A profile that stands for other costs where a file is wanted (the paced device's): fitted to their steps up to
    these sizes. The report says how much is lost.
    """
    lengths, rows = _sizes_to(max_tokens), _sizes_to(max_rows)
    contexts = [context for context in _sizes_to(max_context)[::2] if context > 1]
    shapes = [(length, length**2, 0, 0) for length in lengths]
    shapes += [(tokens, tokens * 128, 0, 0) for tokens in lengths if tokens > 128]  # of prompts of 128 tokens each
    shapes += [(0, 0, count, count * context) for count in rows for context in contexts]
    mixed = [(length, count) for length in lengths[::3] for count in rows[::3]]
    shapes += [(length, length**2, count, count * contexts[-1]) for length, count in mixed]
    samples = [StepSample(*shape, seconds=costs.step_time_s(*shape)) for shape in shapes]
    return fit_profile(samples, pipeline_stages=costs.pipeline_stages, source=source)


def _sizes_to(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 … up to `most`, which is the last one."""
    sizes = sorted({2**power * factor // 2 for power in range(most.bit_length() + 1) for factor in (2, 3)} | {most})
    return [size for size in sizes if 1 <= size <= most]


def relative_errors(profile: StepProfile, samples: Sequence[StepSample]) -> RelativeErrors:
    """A profile's errors on samples; at least one."""
    error = np.array([abs(profile.step_time_s(*astuple(s)[:4]) / s.seconds - 1.0) for s in samples])
    p90 = float(np.quantile(error, 0.9))
    return RelativeErrors(float(np.median(error)), p90, float(error.max()), len(samples))


def _best(samples: Sequence[StepSample]) -> tuple[Array, int | None]:
    """(terms [9], where large batches begin, if they do)."""
    data = np.array([astuple(sample) for sample in samples], dtype=np.float64)
    terms, cost = _fit(data, None)
    best: tuple[Array, int | None] = (terms, None)
    bound = cost * BREAK_GAIN
    for rows in _breaks(data) if cost > len(data) * GOOD_ENOUGH**2 else []:
        terms, cost = _fit(data, rows)
        if cost < bound:
            best, bound = (terms, rows), cost
    return best


def _breaks(data: Array) -> list[int]:
    """Numbers of decode rows that leave enough samples, of different batches, below and from there on."""
    rows = data[data[:, 2] > 0, 2]
    found = []
    for start in np.unique(rows)[1:]:
        sides = rows[rows < start], rows[rows >= start]
        if all(len(side) >= MIN_BREAK_SAMPLES and len(np.unique(side)) > 1 for side in sides):
            found.append(int(start))
    return found


def _fit(data: Array, large_batch_rows: int | None) -> tuple[Array, float]:
    """(terms [9], sum of squared relative errors) of samples [N, 5]."""
    from scipy.optimize import nnls  # half a second to load: only who fits waits for it

    prefill, squares, rows, context, seconds = data.T
    large = rows >= (math.inf if large_batch_rows is None else large_batch_rows)
    decode = np.stack([rows > 0, rows, context], axis=1).astype(np.float64)
    mixed = (prefill > 0) & (rows > 0)
    prompt_is_larger = np.ones_like(mixed)
    terms, cost = np.zeros(9), math.inf
    for _ in range(_ROUNDS):
        x = np.zeros((len(data), 9))
        x[:, _PREFILL] = np.stack([prefill > 0, prefill, squares], axis=1)
        x[~large, _SMALL], x[large, _LARGE] = decode[~large], decode[large]
        x[mixed & ~prompt_is_larger, 0] = 0.0
        x[np.ix_(mixed & prompt_is_larger, [3, 6])] = 0.0
        x /= seconds[:, None]
        scale = np.abs(x).max(axis=0)
        scale[scale == 0.0] = 1.0
        terms, residual = nnls(x / scale, np.ones(len(data)))
        terms, cost = terms / scale, residual**2
        larger = terms[0] >= np.where(large, terms[6], terms[3])
        if np.array_equal(larger[mixed], prompt_is_larger[mixed]):
            break
        prompt_is_larger = larger
    return terms, cost


def _profile(terms: Array, large_batch_rows: int | None, pipeline_stages: int, source: str) -> StepProfile:
    def decode(values: Array) -> DecodeTerms:
        step_s, row_s, context_token_s = values.tolist()
        return DecodeTerms(step_s=step_s, row_s=row_s, context_token_s=context_token_s)

    step_s, token_s, square_s = terms[_PREFILL].tolist()
    return StepProfile(
        prefill_step_s=step_s,
        prefill_token_s=token_s,
        prefill_square_s=square_s,
        decode=decode(terms[_SMALL]),
        large_decode=decode(terms[_SMALL if large_batch_rows is None else _LARGE]),
        large_batch_rows=large_batch_rows or 1,
        pipeline_stages=pipeline_stages,
        source=source,
    )
