"""How long single operators take on one device: a roofline each, with few constants. Pure; scalars or arrays.

    matrix product  launch + ((2·m·n·k / (share·peak) + k·inner)^p + (bytes / (share·bandwidth))^p)^(1/p)
    prompts' attention  launch + 2·heads·head_dim·Σ / (share·peak) + √Σ·length + bytes / (share·bandwidth)
    decode attention  launch + bytes of KV / (share·bandwidth) + rows·KV heads·row
    norms, activations  launch + bytes / (share·bandwidth)
    all-reduce, g ranks  launch + (g-1)·rank + 2·(g-1)/g·bytes / bandwidth

A product is bound by arithmetic or by traffic (Williams, Waterman, Patterson, "Roofline", CACM 2009); p says how well
the two overlap, and `inner` is what a product too small to fill the device pays for each step along k: so the achieved
share rises with m, and small batches are bound by the weights' bytes. Σ is the sum of end² - start² over the chunks:
causal attention computes half of 4·head_dim operations for each of these pairs of query and key, and never writes the
scores (Dao et al., FlashAttention, 2022); √Σ is the length of a prompt alone, along which its last queries are serial.
Decode attention reads every key and value once for each group of query heads; `row` is the padding to whole tiles.
All-reduce sends what a ring does (Shoeybi et al., Megatron-LM, 2019, has two of them in a layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from ..config_schema import Within, check

Sizes = Any
"""A number or an array of them: what these functions take and give."""
Microseconds = Annotated[float, Within(0.0, 1e6)]
Nanoseconds = Annotated[float, Within(0.0, 1e6)]
Share = Annotated[float, Within(0.0, 2.0, above=True)]
"""Of a peak. Above 1 where a cache serves part of what is counted as memory traffic."""

_US, _NS = 1e-6, 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTerms:
    """Constants of matrix products."""

    launch_us: Microseconds
    compute_share: Share
    inner_ns: Nanoseconds
    bandwidth_share: Share
    overlap_power: Annotated[float, Within(1.0, 16.0)]
    """1: compute and traffic add up; large: the longer one hides the other."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillAttentionTerms:
    """Constants of attention of prompts."""

    launch_us: Microseconds
    compute_share: Share
    length_ns: Nanoseconds
    bandwidth_share: Share

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeAttentionTerms:
    """Constants of attention of decode rows."""

    launch_us: Microseconds
    bandwidth_share: Share
    row_ns: Nanoseconds
    """For each row and KV head."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseTerms:
    """Constants of what only passes over activations."""

    launch_us: Microseconds
    norm_share: Share
    activation_share: Share
    """Rotary and the feed-forward's activation."""
    add_share: Share
    """Residuals."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceTerms:
    """Constants of all-reduces inside a node."""

    launch_us: Microseconds
    rank_us: Microseconds
    bandwidth_gb_s: Annotated[float, Within(0.0, 1e6, above=True)]

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTerms:
    """What makes a device's operators slower than its data sheet."""

    gemm: GemmTerms
    gemm_8bit: GemmTerms | None = None
    """Of fp8 and int8; None: those of `gemm`."""
    prefill_attention: PrefillAttentionTerms
    decode_attention: DecodeAttentionTerms
    elementwise: ElementwiseTerms
    all_reduce: AllReduceTerms | None = None
    """None: the device has no peers in its node."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the data sheet says: operations and bytes a second."""

    flops_s: float
    bytes_s: float


def gemm_s(terms: GemmTerms, peaks: Peaks, m: Sizes, n: Sizes, k: Sizes, weight_bytes: int, out_bytes: int) -> Sizes:
    """Seconds of [m, k] x [k, n]; bytes of an element of the weights, and of what goes in and comes out."""
    compute = 2.0 * m * n * k / (peaks.flops_s * terms.compute_share) + k * (terms.inner_ns * _NS)
    moved = weight_bytes * (1.0 * n) * k + out_bytes * (1.0 * m) * (n + k)
    traffic = moved / (peaks.bytes_s * terms.bandwidth_share)
    power = terms.overlap_power
    longer = np.maximum(compute, traffic)
    shorter = np.minimum(compute, traffic)
    return terms.launch_us * _US + longer * (1.0 + (shorter / longer) ** power) ** (1.0 / power)


def prefill_attention_s(
    terms: PrefillAttentionTerms, peaks: Peaks, squares: Sizes, moved_bytes: Sizes, heads: Sizes, head_dim: Sizes
) -> Sizes:
    """Seconds of one layer; `squares`: Σ (end² - start²) of the chunks; `moved_bytes`: queries, keys, values, out."""
    compute = 2.0 * heads * head_dim * squares / (peaks.flops_s * terms.compute_share)
    length = np.sqrt(squares) * (terms.length_ns * _NS)
    return terms.launch_us * _US + compute + length + moved_bytes / (peaks.bytes_s * terms.bandwidth_share)


def decode_attention_s(
    terms: DecodeAttentionTerms, peaks: Peaks, rows: Sizes, kv_heads: Sizes, kv_bytes: Sizes
) -> Sizes:
    """Seconds of one layer; `kv_bytes`: of all keys and values that the rows read in it."""
    padding = rows * kv_heads * (terms.row_ns * _NS)
    return terms.launch_us * _US + padding + kv_bytes / (peaks.bytes_s * terms.bandwidth_share)


def elementwise_s(launch_us: float, share: Sizes, peaks: Peaks, moved_bytes: Sizes, kernels: int = 1) -> Sizes:
    """Seconds of kernels that read and write `moved_bytes` in all."""
    return kernels * launch_us * _US + moved_bytes / (peaks.bytes_s * share)


def all_reduce_s(terms: AllReduceTerms, ranks: Sizes, size_bytes: Sizes) -> Sizes:
    """Seconds to sum `size_bytes` over `ranks`; ranks >= 2."""
    ring = 2.0 * (ranks - 1) / ranks * size_bytes / (terms.bandwidth_gb_s * 1e9)
    return (terms.launch_us + terms.rank_us * (ranks - 1)) * _US + ring


def sizes(low: int, high: int) -> NDArray[np.float64]:
    """low … high, both included."""
    return np.arange(low, high + 1, dtype=np.float64)
