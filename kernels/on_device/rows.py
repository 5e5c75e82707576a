"""Norms, activations and KV writes as `kernels.gpu` has them: results in the inputs' dtype, computed in float32."""

# ruff: noqa: N812

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..kv_write import narrowed
from ..operations import Operations


def rms_norm(
    by: Operations, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, C] -> [T, C] in x's dtype. A `residual` [T, C] becomes x + residual."""
    return by.rms_norm(_summed(x, residual), weight, eps).to(x.dtype)


def layer_norm(
    by: Operations,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, C] -> [T, C] in x's dtype. A `residual` [T, C] becomes x + residual."""
    return by.layer_norm(_summed(x, residual), weight, bias, eps).to(x.dtype)


def activation(by: Operations, x: torch.Tensor, name: str, *, gated: bool) -> torch.Tensor:
    """[T, F], or [T, 2F] where it is gated, -> [T, F] in x's dtype."""
    return by.activation(x.float(), name, gated=gated).to(x.dtype)


def kv_write(
    by: Operations,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    layer: torch.Tensor,
    blocks: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes keys and values into `layer`, by `scales` [2, K] where it is narrow, but of tokens whose block is
    negative; returns the queries, turned, [T, H, D] in q's dtype.
    """
    turned_q, turned_k = q.float(), k.float()
    if tables is not None:
        turned_q, turned_k = by.rotary(turned_q, *tables), by.rotary(turned_k, *tables)
    theirs = (blocks >= 0).nonzero().squeeze(1)
    written = torch.stack((turned_k, v.float()), dim=1).index_select(0, theirs)
    if scales is not None:
        written = narrowed(written, scales[:, :, None], layer.dtype)
        layer = layer.view(written.dtype)
    by.kv_write(layer, written, blocks[theirs].long(), slots[theirs].long())
    return turned_q.to(q.dtype).contiguous()


def fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own kernel, as `kernels.rms_norm.rms_norm_cpu`, whose four calls are for processors."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _summed(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """What is normalized, float32."""
    return x.float() if residual is None else residual.add_(x).float()
