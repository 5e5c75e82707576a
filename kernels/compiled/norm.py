"""RMS and layer normalization of rows (the formulas: `kernels.rms_norm`, `kernels.layer_norm`).

    x, y      addresses of float32 rows, `*_stride` bytes apart; y may be x
    weight    address of float32 [channels], padded with zeros as the rows are
    channels  elements that count. Rows are padded with zeros to a multiple of 2 W elements, and stay so.

A row's sum runs through its vectors in order, in four interleaved sums, whatever else is in the batch.
"""

from __future__ import annotations

import math

import numpy as np

from .simd import (
    VECTOR_BYTES,
    W,
    add,
    fma,
    full,
    load,
    load_float,
    load_part,
    multiply,
    store,
    store_part,
    subtract,
    sum_lanes,
    zeros,
)
from .target import kernel


@kernel
def _sum_of_squares(x: int, vectors: int) -> float:
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    quads = vectors // 4
    for i in range(quads):
        at = x + 4 * i * VECTOR_BYTES
        x0, x1 = load(at), load(at + VECTOR_BYTES)
        x2, x3 = load(at + 2 * VECTOR_BYTES), load(at + 3 * VECTOR_BYTES)
        a, b, c, d = fma(x0, x0, a), fma(x1, x1, b), fma(x2, x2, c), fma(x3, x3, d)
    for i in range(4 * quads, vectors):
        x0 = load(x + i * VECTOR_BYTES)
        a = fma(x0, x0, a)
    return sum_lanes(add(add(a, b), add(c, d)))


@kernel
def rms_norm(
    x: int, x_stride: int, y: int, y_stride: int, first: int, last: int, weight: int, channels: int, eps: float
) -> None:
    """Rows first … last-1 of y: x / sqrt(mean(x^2) + eps) * weight."""
    vectors = (channels + W - 1) // W
    for row in range(first, last):
        source, target = x + row * x_stride, y + row * y_stride
        mean = _sum_of_squares(source, vectors) / np.float32(channels)
        factor = full(np.float32(1.0) / math.sqrt(mean + np.float32(eps)))
        for i in range(vectors):
            at = i * VECTOR_BYTES
            store(target + at, multiply(multiply(load(source + at), factor), load(weight + at)))


@kernel
def layer_norm(
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    first: int,
    last: int,
    weight: int,
    bias: int,
    channels: int,
    eps: float,
) -> None:
    """Rows first … last-1 of y: (x - mean) / sqrt(variance + eps) * weight + bias, with the biased variance."""
    vectors = (channels + W - 1) // W
    for row in range(first, last):
        source, target = x + row * x_stride, y + row * y_stride
        total = zeros()
        for i in range(vectors):
            total = add(total, load(source + i * VECTOR_BYTES))
        mean = sum_lanes(total) / np.float32(channels)
        squares = zeros()
        for i in range(channels // W):
            centered = subtract(load(source + i * VECTOR_BYTES), full(mean))
            squares = fma(centered, centered, squares)
        variance = sum_lanes(squares)
        for i in range(channels // W * W, channels):
            rest = load_float(source + 4 * i) - mean
            variance += rest * rest
        variance /= np.float32(channels)
        factor = full(np.float32(1.0) / math.sqrt(variance + np.float32(eps)))
        for i in range(vectors):
            at = i * VECTOR_BYTES
            scaled = multiply(subtract(load(source + at), full(mean)), factor)
            store(target + at, fma(scaled, load(weight + at), load(bias + at)))


@kernel
def head_norm(x: int, heads: int, head_dim: int, weight: int, eps: float) -> None:
    """RMS norm of each of `heads` neighbouring vectors of `head_dim` at x, in place (Qwen3's q and k)."""
    for head in range(heads):
        at = x + head * head_dim * 4
        squares = zeros()
        for i in range(0, head_dim, W):
            part = load_part(at + 4 * i, min(W, head_dim - i))
            squares = fma(part, part, squares)
        mean = sum_lanes(squares) / np.float32(head_dim)
        factor = full(np.float32(1.0) / math.sqrt(mean + np.float32(eps)))
        for i in range(0, head_dim, W):
            count = min(W, head_dim - i)
            part = multiply(multiply(load_part(at + 4 * i, count), factor), load_part(weight + 4 * i, count))
            store_part(at + 4 * i, part, count)
