"""What a step's draws are told and what they answer, on the device: wants, penalties, logprobs.

Shapes: R rows of logits; P rows that ask for penalties, E entries of all their lists; Q rows that ask for logprobs, M
likeliest tokens of each.
"""
# ruff: noqa: N815

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GREEDY_TEMPERATURE = 1e-5
"""Below it, the likeliest token is taken (as vLLM's `_SAMPLING_EPS`)."""
NOTHING, INFINITE, NOT_A_NUMBER = -1, -2, -3
"""In place of the token of a row that is no distribution: every logit is -inf; one is +inf; one is NaN."""
TILE = 1024
"""Tokens that Triton's kernels look at together, if nothing else is said."""
WIDE_TILE = 4096
"""The same where one program reads a whole row and computes little: enough loads to wait for at a time."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What is wanted of each of R rows, on the device. Kept by the caller and written anew, so that a captured graph
    reads it.
    """

    temperature: torch.Tensor
    """float32; below `GREEDY_TEMPERATURE`: the likeliest token."""
    top_k: torch.Tensor
    """int32; 0 cuts nothing off."""
    min_p_log: torch.Tensor
    """float32, log(min_p); -inf cuts nothing off."""
    top_p: torch.Tensor
    """float64; 1 cuts nothing off."""
    seed: torch.Tensor
    """int64, the bits of an unsigned one."""
    choice: torch.Tensor
    """int32, the bits of an unsigned one."""
    index: torch.Tensor
    """int32, the bits of an unsigned one: the output index."""

    @classmethod
    def of(
        cls,
        *,
        temperature: Sequence[float],
        seed: Sequence[int],
        index: Sequence[int],
        choice: Sequence[int] | None = None,
        top_k: Sequence[int] | None = None,
        min_p: Sequence[float] | None = None,
        top_p: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> Wants:
        """From numbers that the request's door has checked; what is left out cuts nothing off."""
        rows = len(temperature)
        logs = [math.log(p) if p > 0 else -math.inf for p in min_p or [0.0] * rows]
        columns = (
            (temperature, torch.float32),
            (top_k or [0] * rows, torch.int32),
            (logs, torch.float32),
            (top_p or [1.0] * rows, torch.float64),
            ([_signed(value, 64) for value in seed], torch.int64),
            ([_signed(value, 32) for value in choice or [0] * rows], torch.int32),
            ([_signed(value, 32) for value in index], torch.int32),
        )
        return cls(*(torch.tensor(values, dtype=dtype, device=device) for values, dtype in columns))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order in which kernels take them."""
        return (self.temperature, self.top_k, self.min_p_log, self.top_p, self.seed, self.choice, self.index)


@dataclass(frozen=True, slots=True)
class Penalties:
    """What P rows of a step ask for, on the device."""

    rows_P: torch.Tensor
    """int32: which rows of the logits."""
    spans_P3: torch.Tensor
    """int32: its first entry, the first of its context, the one behind the last."""
    repetitions_P: torch.Tensor
    """float32: repetition penalties; 1: none."""
    ids_E: torch.Tensor
    """int32, all within the vocabulary."""
    values_E: torch.Tensor
    """float32: what is added, of the context what is subtracted."""
    saved_E: torch.Tensor
    """float32: scratch for the way back."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of Q rows, on the device."""

    normalizers_Q: torch.Tensor
    """float64; NaN: the row has NaN, +inf or nothing that is finite."""
    chosen_Q: torch.Tensor
    """float32: the logit of the token that was drawn; NaN where none was."""
    ids_QM: torch.Tensor
    """int32: the likeliest tokens, largest first, equal ones by lower id; -1 where fewer are finite. Of row q, its
    count's first ones; the rest is not written."""
    values_QM: torch.Tensor
    """float32: their logits."""


def _signed(value: int, bits: int) -> int:
    return value - 2**bits if value >= 2 ** (bits - 1) else value
