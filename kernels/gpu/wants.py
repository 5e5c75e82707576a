"""What is wanted of the rows of a step when they are sampled, as the kernels take it: columns on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GREEDY_TEMPERATURE = 1e-5
"""Below it, the likeliest token is taken (as vLLM's `_SAMPLING_EPS`)."""


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


def _signed(value: int, bits: int) -> int:
    return value - 2**bits if value >= 2 ** (bits - 1) else value
