from __future__ import annotations

import hashlib

import numpy as np
import pytest
from tandem.kernels.compiled import linear as op
from tandem.kernels.compiled import packed as packing
from tandem.kernels.compiled.tile import BF16_DOT, GROUP_LIMIT, INT8, MAX_ROWS, NR

F32 = np.float32
ROWS = 2 * MAX_ROWS + 3


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, F32)


def product(
    packed: packing.PackedWeight, x: np.ndarray, *, ranks: int = 1, onto: np.ndarray | None = None
) -> np.ndarray:
    """[T, O], by so many ranks one after the other; `onto` [T, O]: added to."""
    rows, inputs = x.shape
    y = np.full((rows, packing.padded(packed.out_features)), np.nan if onto is None else 0, F32)
    if onto is not None:
        y[:, : packed.out_features] = onto
    words = packing.describe(packed)
    scratch = np.full(op.scratch_bytes(packed.kind, inputs, rows) + 1, 255, np.uint8)
    for rank in range(ranks):
        op.linear(
            words.ctypes.data, x.ctypes.data, inputs, rows, y.ctypes.data, y.shape[1], onto is not None,
            rank, ranks, scratch.ctypes.data,
        )  # fmt: skip
    assert scratch[-1] == 255
    return y[:, : packed.out_features].copy()


def round_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(F32)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's integers (as float64) and scale."""
    top = np.abs(x).max(-1, keepdims=True)
    factor = np.divide(F32(127), top, out=np.zeros_like(top), where=top > 0)
    return np.rint(x * factor).astype(np.float64), (top / F32(127)).astype(np.float64)


def groups(weight: np.ndarray) -> np.ndarray:
    """[O]: what weights of one sign add up to at most, in groups that INT8 sums in 16 bits."""
    outputs, inputs = weight.shape
    parts = np.pad(weight, ((0, 0), (0, -inputs % 8))).reshape(outputs, -1, 2, 2, 2)  # O, step, quad, half, pair
    sums = []
    for signed in (np.maximum(parts, 0), np.maximum(-parts, 0)):
        four = [signed[:, :, quad, :, pair] for quad in (0, 1) for pair in (0, 1)]
        sums.append((((four[0] + four[1]) + four[2]) + four[3]).max((1, 2)))
    return np.maximum(*sums)


def quantized_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `quantized`; where sums in 16 bits must not overflow, in coarser steps."""
    integers, scale = quantized(weight)
    if not packing.layout("w8a8").startswith(f"w8a8-{INT8}x"):
        return integers, scale
    top, largest = np.abs(weight).max(-1), groups(weight)
    for o in np.flatnonzero(top):
        levels = min(F32(GROUP_LIMIT), F32(127) * largest[o] / top[o])
        while groups(np.rint(weight[o : o + 1] * (levels / largest[o])))[0] > GROUP_LIMIT:
            levels -= F32(1)
        integers[o] = np.rint(weight[o] * (levels / largest[o]))
        scale[o] = largest[o] / levels
    return integers, scale


def reference(kind: str, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[T, O] float64, of what the kind keeps of weights (and activations)."""
    if kind == "w8a8":
        (w, w_scale), (q, q_scale) = quantized_weight(weight), quantized(x)
        return q @ w.T * q_scale * w_scale.T
    weight = round_bf16(weight) if kind == "bfloat16" else weight
    if kind == "bfloat16" and packing.layout(kind).startswith(f"bfloat16-{BF16_DOT}"):
        x = round_bf16(x)
    return x.astype(np.float64) @ weight.T.astype(np.float64)


SHAPES = [(1, 1), (NR, 8), (3 * NR + 1, 77), (2 * NR - 1, 576), (5 * NR, 34)]


@pytest.mark.parametrize("kind", packing.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_bias(kind: str, shape: tuple[int, int]) -> None:
    weight, bias, x = random(*shape), random(shape[0], seed=1), random(ROWS, shape[1], seed=2)
    got = product(packing.pack_weight(weight, kind, bias), x)
    want = reference(kind, weight, x) + bias
    magnitude = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    assert np.max(np.abs(got - want) / magnitude) < 2e-6


@pytest.mark.parametrize("kind", packing.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_to_the_bit_whatever_runs_beside_it(kind: str, shape: tuple[int, int]) -> None:
    packed = packing.pack_weight(random(*shape), kind, random(shape[0], seed=1))
    x = random(ROWS, shape[1], seed=2)
    alone = np.concatenate([product(packed, x[r : r + 1]) for r in range(ROWS)])
    for rows in range(2, ROWS + 1):
        assert product(packed, x[:rows]).tobytes() == alone[:rows].tobytes(), rows
    for ranks in (2, 3, 7):
        assert product(packed, x, ranks=ranks).tobytes() == alone.tobytes(), ranks


@pytest.mark.parametrize("kind", packing.KINDS)
def test_blocks_of_rows_change_nothing(kind: str) -> None:
    inputs = op.BLOCK_BYTES // 4 // MAX_ROWS + 1  # one tile of rows fills a block
    packed, x = packing.pack_weight(random(NR, inputs), kind), random(4 * MAX_ROWS + 1, inputs, seed=1)
    alone = np.concatenate([product(packed, x[r : r + 1]) for r in range(len(x))])
    assert product(packed, x).tobytes() == alone.tobytes()


@pytest.mark.parametrize("kind", packing.KINDS)
def test_accumulating_adds_the_product_to_what_is_there(kind: str) -> None:
    packed = packing.pack_weight(random(NR + 1, 40), kind, random(NR + 1, seed=1))
    x, onto = random(MAX_ROWS + 1, 40, seed=2), random(MAX_ROWS + 1, NR + 1, seed=3)
    assert product(packed, x, onto=onto).tobytes() == (product(packed, x) + onto).tobytes()


def test_a_row_of_zeros_is_no_number_problem_for_integers() -> None:
    packed = packing.pack_weight(np.zeros((NR, 12), F32), "w8a8")
    assert product(packed, np.zeros((2, 12), F32)).tolist() == [[0.0] * NR] * 2


@pytest.mark.parametrize("kind", packing.KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 9, 40])
def test_what_is_not_a_number_spoils_its_own_row_alone(kind: str, value: float, where: int) -> None:
    packed, x = packing.pack_weight(random(NR, 41), kind), random(MAX_ROWS + 1, 41, seed=1)
    x[1, where] = value
    got = product(packed, x)
    assert not np.isfinite(got[1]).any()
    assert np.isfinite(np.delete(got, 1, 0)).all()


@pytest.mark.parametrize("kind", packing.KINDS)
def test_a_weight_that_is_not_a_number_spoils_its_output(kind: str) -> None:
    weight = random(NR, 41)
    weight[3, 17] = np.nan
    got = product(packing.pack_weight(weight, kind), random(2, 41, seed=1))
    assert np.isnan(got[:, 3]).all()
    assert np.isfinite(np.delete(got, 3, 1)).all()


def test_integers_reach_the_ends_of_their_range() -> None:
    """127 x 127 over many inputs, of either sign, is exact: no instruction saturates on the way."""
    weight = np.ones((2, 4096), F32)
    weight[1] = -1
    x = np.ones((3, 4096), F32)
    x[1] = -1
    assert product(packing.pack_weight(weight, "w8a8"), x) == pytest.approx(
        np.array([[4096, -4096], [-4096, 4096], [4096, -4096]]), rel=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_group_of_weights_overflows_sixteen_bits(seed: int) -> None:
    """Rows of the highest activations and of the lowest, over weights that fill their groups in one sign or in both."""
    weight = random(4 * NR, 70, seed=seed) ** 3
    weight[::2] = np.abs(weight[::2])
    x = np.ones((2, 70), F32)
    x[1] = -1
    got = product(packing.pack_weight(weight, "w8a8"), x)
    assert np.allclose(got, reference("w8a8", weight, x), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", packing.KINDS)
def test_arrays_make_the_same_weight_again(kind: str) -> None:
    packed = packing.pack_weight(random(NR + 3, 33), kind, random(NR + 3, seed=1))
    again = packing.PackedWeight.from_arrays(kind, 33, NR + 3, packed.arrays())
    x = random(2, 33, seed=2)
    assert product(again, x).tobytes() == product(packed, x).tobytes()
    assert again.nbytes == packed.nbytes
    assert packed.data.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="packed weight"):
        packing.PackedWeight.from_arrays(kind, 200, NR + 3, packed.arrays())


PACKED = {
    "float32-0x16v4": "64d3b58844a27507",
    "bfloat16-1x16v4": "c65f66cdf8c01dff",
    "w8a8-3x16v4": "8c52af3088106fae",
    "float32-0x8v4": "5a81bc1884dfb739",
    "bfloat16-1x8v4": "ee6b770a6f25c3f9",
    "w8a8-3x8v4": "d7929c9301d14fc9",
    "float32-0x32v4": "66a69b9eceb9d186",
    "bfloat16-1x32v4": "bcc2eb6c1fa140e8",
    "bfloat16-2x32v4": "179950b12acec0ee",
    "w8a8-3x32v4": "dba27004953b03ab",
    "w8a8-4x32v4": "04a850182242eace",
}
"""Digest of one weight under each layout. Where this differs, raise `packed.PACKING`: files hold the old one."""


@pytest.mark.parametrize("kind", packing.KINDS)
def test_a_layout_of_one_name_is_one_layout(kind: str) -> None:
    weight = (np.arange(37 * 19) % 101 - 50).reshape(37, 19).astype(F32) / 7
    packed = packing.pack_weight(weight, kind, np.arange(37, dtype=F32))
    digest = hashlib.blake2b(digest_size=8)
    for name, array in packed.arrays().items():
        digest.update(name.encode() + array.tobytes())
    assert digest.hexdigest() == PACKED[packing.layout(kind)]


@pytest.mark.parametrize("kind", packing.KINDS)
def test_arrays_of_other_types_and_places_are_refused(kind: str) -> None:
    packed = packing.pack_weight(random(NR + 3, 33), kind, random(NR + 3, seed=1))
    arrays = packed.arrays()
    moved = np.empty(packed.data.size + 65, np.uint8)
    apart = moved[1 + -moved.ctypes.data % 64 :][: packed.data.size]
    for wrong in ({"data": packed.data.view(np.int8)}, {"bias": arrays["bias"].astype(np.float64)}, {"data": apart}):
        with pytest.raises(ValueError, match="packed weight"):
            packing.PackedWeight.from_arrays(kind, 33, NR + 3, {**arrays, **wrong})


def test_an_output_of_nearly_nothing_is_nothing() -> None:
    """Its scale would leave float32's range: no NaN, and an end."""
    weight = random(NR, 32)
    for row, size in enumerate((1e-38, 3.9e-37, 1e-45, 1e-31)):
        weight[row] = np.float32(size)
    packed = packing.pack_weight(weight, "w8a8")
    assert packed.scale is not None
    assert np.isfinite(packed.scale).all()
    assert (packed.scale[:4] == 0).all()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="'int3' is not one of float32, bfloat16, w8a8"):
        packing.pack_weight(random(2, 2), "int3")
    with pytest.raises(ValueError, match="bias"):
        packing.pack_weight(random(2, 2), "float32", random(3))


@pytest.mark.parametrize("kind", packing.KINDS)
def test_weights_of_one_output_come_back_as_they_are_stored(kind: str) -> None:
    weight = random(NR + 3, 33)
    packed = packing.pack_weight(weight, kind)
    words, row = packing.describe(packed), np.zeros(34, F32)
    for output in (0, NR // 2, NR + 2):
        packing.unpack_output(words.ctypes.data, output, row.ctypes.data)
        if kind == "w8a8":
            integers, scale = quantized_weight(weight[output : output + 1])
            assert row[:33].tolist() == (integers[0].astype(F32) * F32(scale[0, 0])).tolist()
        else:
            want = weight[output] if kind == "float32" else round_bf16(weight[output])
            assert row[:33].tobytes() == want.tobytes()
    assert row[33] == 0
