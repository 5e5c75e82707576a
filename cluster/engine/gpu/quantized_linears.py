"""Linear layers of int8 and 4-bit weights on a GPU, over Triton's kernels: loaded where a model is quantized."""

from __future__ import annotations

import torch

from ....kernels.gpu.activation import quantize_rows
from ....kernels.gpu.tuning import Tuner
from ....kernels.gpu.w4a16 import w4a16_linear
from ....kernels.gpu.w8a8 import w8a8_linear
from .linears import DeviceLinear, Rows


class Int8Linear(DeviceLinear):
    """W8A8: int8 weights with a scale an output channel."""

    takes_int8 = True

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        tuner: Tuner | None = None,
    ) -> None:
        """`weight` int8 [O, I], `scales` float32 [O]; `dtype`: of the model."""
        super().__init__(weight, bias)
        self.resident_bytes += scales.nbytes
        self._scales = scales
        self._dtype = dtype
        self._tuner = tuner

    def of(self, x: Rows, dtype: torch.dtype | None = None) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            if self.observer is not None:
                self.observer(x)
            x = quantize_rows(x)
        integers, scales = x
        return w8a8_linear(
            integers, scales, self._weight, self._scales, self._bias, dtype=dtype or self._dtype, tuner=self._tuner
        )

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.of(x)

    def logits(self, x: Rows) -> torch.Tensor:
        return self.of(x, torch.float32)


class Int4Linear(DeviceLinear):
    """W4A16: 4-bit weights with a scale for each group of inputs."""

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, tuner: Tuner | None = None
    ) -> None:
        """`packed` uint8 [O, I / 2], `scales` float32 [O, groups] (`kernels.int4`)."""
        super().__init__(packed, bias)
        self.in_features = 2 * packed.shape[1]
        self.resident_bytes += scales.nbytes
        self._scales = scales
        self._tuner = tuner

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return w4a16_linear(x, self._weight, self._scales, self._bias, tuner=self._tuner)
