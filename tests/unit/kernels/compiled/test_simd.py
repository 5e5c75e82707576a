from __future__ import annotations

import math

import numpy as np
import pytest
from tandem.kernels.compiled import atomics, functions, simd
from tandem.kernels.compiled.target import kernel

W = simd.W
F32 = np.float32


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error in units of the last place of `want` (float64)."""
    spacing = np.spacing(np.abs(want).astype(F32)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - want) / spacing))


@kernel
def map_exp(x, y, n):
    for i in range(0, n, simd.W):
        simd.store(y + 4 * i, functions.exp(simd.load(x + 4 * i)))


@kernel
def map_tanh(x, y, n):
    for i in range(0, n, simd.W):
        simd.store(y + 4 * i, functions.tanh(simd.load(x + 4 * i)))


@kernel
def map_erf(x, y, n):
    for i in range(0, n, simd.W):
        simd.store(y + 4 * i, functions.erf(simd.load(x + 4 * i)))


def apply(function, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    function(x.ctypes.data, y.ctypes.data, x.size)
    return y


def test_exp_is_within_two_ulp_and_exact_at_the_ends() -> None:
    x = np.linspace(-87, 88.7, 64 * 1024, dtype=F32)
    assert ulps(apply(map_exp, x), np.exp(x.astype(np.float64))) <= 2
    ends = np.array([-np.inf, -200, -88, 0, 89, 200, np.inf, 1] * max(1, W // 8), F32)
    assert apply(map_exp, ends)[:8].tolist() == [0, 0, 0, 1, math.inf, math.inf, math.inf, F32(math.e)]


def test_tanh_and_erf_follow_the_functions() -> None:
    x = np.linspace(-12, 12, 64 * 1024, dtype=F32)
    assert ulps(apply(map_tanh, x), np.tanh(x.astype(np.float64))) <= 3
    want = np.array([math.erf(float(v)) for v in x])
    assert np.max(np.abs(apply(map_erf, x) - want)) < 3e-7


@kernel
def bf16_round_trip(x, halves, y, pairs, z):
    simd.store_bf16(halves, simd.load(x))
    simd.store_bf16(halves + 2 * simd.W, simd.load(x + 4 * simd.W))
    simd.store(y, simd.load_bf16(halves))
    simd.store(y + 4 * simd.W, simd.load_bf16(halves + 2 * simd.W))
    even, odd = simd.load_bf16_pairs(halves)
    simd.store_bf16_pairs(pairs, even, odd)
    simd.store(z, even)
    simd.store(z + 4 * simd.W, odd)


def round_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(F32)


def test_bfloat16_rounds_to_nearest_even() -> None:
    x = np.random.default_rng(1).standard_normal(2 * W, F32)
    x[:4] = np.array([0x3F808000, 0x3F818000, 0x7F800000, 0x80000000], np.uint32).view(F32)  # two ties, inf, -0
    halves, pairs = np.zeros(2 * W, np.uint16), np.zeros(2 * W, np.uint16)
    y, z = np.zeros(2 * W, F32), np.zeros(2 * W, F32)
    bf16_round_trip(x.ctypes.data, halves.ctypes.data, y.ctypes.data, pairs.ctypes.data, z.ctypes.data)
    want = round_bf16(x)
    assert y.tobytes() == want.tobytes()
    assert z.tobytes() == np.concatenate([want[0::2], want[1::2]]).tobytes()
    assert pairs.tobytes() == halves.tobytes()


def test_a_bfloat16_nan_stays_one() -> None:
    x = np.full(2 * W, np.nan, F32)
    x.view(np.uint32)[:] = 0x7F800001  # rounding alone would make it infinite
    halves, y = np.zeros(4 * W, np.uint16), np.zeros(2 * W, F32)
    bf16_round_trip(x.ctypes.data, halves.ctypes.data, y.ctypes.data, halves.ctypes.data, y.ctypes.data)
    assert np.isnan(y).all()


@kernel
def reductions(x, out):
    v = simd.load(x)
    simd.store_float(out, simd.sum_lanes(v))
    simd.store_float(out + 4, simd.max_lanes(v))
    simd.store_first(out + 8, simd.load_first(x, 3), 2)


def test_sums_use_one_tree_and_partial_vectors_touch_only_their_lanes() -> None:
    x = np.random.default_rng(2).standard_normal(W, F32)
    out = np.full(2 + W, 7, F32)
    reductions(x.ctypes.data, out.ctypes.data)
    tree = x
    while tree.size > 1:
        tree = tree[: tree.size // 2] + tree[tree.size // 2 :]
    assert out[0] == tree[0]
    assert out[1] == x.max()
    assert out[2:].tolist() == [*x[:2].tolist(), *[7.0] * (W - 2)]


@kernel
def integers(x, small, y):
    v = simd.to_int(simd.load(x))
    simd.store_int8(small, v)
    simd.store(y, simd.to_float(simd.add_i32(simd.load_int8(small), simd.full_i32(1))))


def test_integers_round_to_even_and_keep_their_sign() -> None:
    x = np.array([0.5, 1.5, -0.5, -2.5, 127.0, -127.0, 3.4, -3.6] * max(1, W // 8), F32)
    small, y = np.zeros(x.size, np.int8), np.zeros(x.size, F32)
    integers(x.ctypes.data, small.ctypes.data, y.ctypes.data)
    assert y[:W].tolist() == (np.rint(x) + 1)[:W].tolist()


@kernel
def count_up(address):
    before = atomics.atomic_add(address, 5)
    atomics.pause()
    atomics.sched_yield()
    atomics.atomic_store(address + 8, atomics.atomic_load(address) * 10 + before)


def test_atomics() -> None:
    words = np.array([2, 0], np.int64)
    count_up(words.ctypes.data)
    assert words.tolist() == [7, 72]


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -1.5])
def test_signs(value: float) -> None:
    assert math.copysign(1, apply(map_tanh, np.full(W, value, F32))[0]) == math.copysign(1, value)
