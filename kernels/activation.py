"""The MLP's nonlinearity, plain (OPT) or gated (SwiGLU, Shazeer 2020, eq. 6).

Shapes: plain [T, F] -> [T, F]; gated [T, 2F] (gate, then up) -> [T, F]. float32.
"""
# ruff: noqa: N812

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
}


def activation_reference(x: torch.Tensor, name: str, *, gated: bool) -> torch.Tensor:
    """The formulas: silu x*sigmoid(x), relu max(x, 0), gelu x*Phi(x); a gate multiplies the up projection."""
    gate, up = x.float().chunk(2, dim=-1) if gated else (x.float(), None)
    if name == "silu":
        y = gate / (1 + torch.exp(-gate))
    elif name == "relu":
        y = torch.where(gate > 0, gate, 0.0)
    elif name == "gelu":
        y = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    else:
        raise ValueError(f"activation: {name!r} is not one of {sorted(_FUNCTIONS)}")
    return y if up is None else y * up


def activation_cpu(x: torch.Tensor, name: str, *, gated: bool) -> torch.Tensor:
    """torch's vectorized kernels, the gate multiplied in place. ValueError for an unknown name."""
    function = _FUNCTIONS.get(name)
    if function is None:
        raise ValueError(f"activation: {name!r} is not one of {sorted(_FUNCTIONS)}")
    if not gated:
        return function(x)
    gate, up = x.chunk(2, dim=-1)
    return function(gate).mul_(up)
