"""The MLP's nonlinearity, plain (OPT) or gated (SwiGLU); formulas and references: `kernels.activation`.

Rows of x are what the up projection wrote. Gated: gate and up stand in panels of `PANEL` outputs in turn (gate panel
0, up panel 0, gate panel 1, …): both factors of an output lie near each other. y has the panels' products in order.
"""

from __future__ import annotations

from typing import Any

from .functions import erf, exp
from .simd import VECTOR_BYTES, W, add, divide, full, load, maximum, multiply, negative, store, zeros
from .target import kernel

PANEL = 2 * W
"""Outputs of one panel of a packed weight."""
SILU, RELU, GELU = range(3)
ACTIVATIONS = {"silu": SILU, "relu": RELU, "gelu": GELU}


@kernel(inline=True)
def _silu(x: Any) -> Any:
    return divide(x, add(full(1.0), exp(negative(x))))


@kernel(inline=True)
def _gelu(x: Any) -> Any:
    return multiply(multiply(x, full(0.5)), add(full(1.0), erf(multiply(x, full(0.7071067811865476)))))


@kernel
def activate(
    kind: int, gated: int, x: int, x_stride: int, y: int, y_stride: int, rows: int, first: int, last: int
) -> None:
    """Panels first … last-1 of y's rows."""
    step = 2 if gated else 1
    for row in range(rows):
        for panel in range(first, last):
            for half in range(2):
                source = x + row * x_stride + (2 * step * panel + half) * VECTOR_BYTES
                gate = load(source)
                if kind == SILU:
                    value = _silu(gate)
                elif kind == RELU:
                    value = maximum(zeros(), gate)  # in this order, NaN stays
                else:
                    value = _gelu(gate)
                if gated:
                    value = multiply(value, load(source + 2 * VECTOR_BYTES))
                store(y + row * y_stride + (2 * panel + half) * VECTOR_BYTES, value)
