"""How fast the linear layers run on one core, beside what its arithmetic and its memory allow.

Weights are swept through in copies that no cache holds, as a model's step does. Times are the thread's own CPU time,
the best of several sweeps: what other processes take is left out as far as that goes.

`python -m tandem.kernels.compiled.measure` prints the layers of a 135M-parameter model; about a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from . import emit, linear, packed, simd
from .target import TARGET, kernel
from .tile import FORMS, INT8, INT8_DOT, STEP_INPUTS, USED_FORMS, accumulate

SWEPT_BYTES = 96 << 20
"""Weights of one sweep: several last-level caches."""
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))
"""[outputs, inputs] of SmolLM2-135M: q k v, o, gate and up, down, head."""
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 96)
_CHAINS = 12
_ROUNDS = 200_000


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one core can do at best, measured."""

    read_gb_s: float
    gflop_s: dict[str, float]
    """By kind of weight; two operations per multiply-add."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One product, as measured."""

    kind: str
    out_features: int
    in_features: int
    rows: int
    seconds: float
    gflop_s: float
    gb_s: float
    """Weights read per second."""
    share: float
    """Of the speed that `Bounds` allows."""


def _peak(form: int) -> Any:
    """A kernel operation: so many rounds of independent multiply-adds in registers."""

    def peak(b, rounds, operands, to):
        vector = emit.I32_VECTOR if form in (INT8, INT8_DOT) else emit.F32_VECTOR
        x, w = (emit.load_as(b, b.add(operands, emit.I64(at)), emit.I32_VECTOR, 4) for at in (0, simd.VECTOR_BYTES))
        if form == INT8:
            w = (w, x)
        elif STEP_INPUTS[form] == 1:
            x, w = b.bitcast(x, emit.F32_VECTOR), b.bitcast(w, emit.F32_VECTOR)
        before, loop, done = b.block, b.append_basic_block("rounds"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        count = b.phi(emit.I64)
        totals = [b.phi(vector) for _ in range(_CHAINS)]
        # The integers' product is apart from its sum: of one operand twice it would be computed once for all rounds.
        xs = [(total, total) if form == INT8 else x for total in totals]
        moved = [accumulate(b, form, total, x, w) for total, x in zip(totals, xs, strict=True)]
        following = b.add(count, emit.I64(1))
        count.add_incoming(emit.I64(0), before)
        count.add_incoming(following, loop)
        for i, (total, value) in enumerate(zip(totals, moved, strict=True)):
            total.add_incoming(emit.splat(vector, i), before)  # different, or they would be one
            total.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, rounds), loop, done)
        b.position_at_end(done)
        for i, value in enumerate(moved):
            emit.store_as(b, b.add(to, emit.I64(simd.VECTOR_BYTES * i)), value, 4)

    peak.__name__ = f"peak_{FORMS[form]}"
    return emit.operation(types.void, *[types.int64] * 3)(peak)


_peak_float32, _peak_bfloat16, _peak_w8a8 = (_peak(form) for form in USED_FORMS)


@kernel
def _run_peak(which, rounds, operands, to):
    if which == 0:
        _peak_float32(rounds, operands, to)
    elif which == 1:
        _peak_bfloat16(rounds, operands, to)
    else:
        _peak_w8a8(rounds, operands, to)


@kernel
def _read(first, nbytes, to):
    """Sum a buffer, in four streams as a matrix-vector product reads its panels."""
    quarter = nbytes // 4 // simd.VECTOR_BYTES * simd.VECTOR_BYTES
    a = b = c = d = simd.full_i32(0)
    for at in range(first, first + quarter, simd.VECTOR_BYTES):
        a = simd.add_i32(a, simd.load_i32(at))
        b = simd.add_i32(b, simd.load_i32(at + quarter))
        c = simd.add_i32(c, simd.load_i32(at + 2 * quarter))
        d = simd.add_i32(d, simd.load_i32(at + 3 * quarter))
    simd.store_i32(to, simd.add_i32(simd.add_i32(a, b), simd.add_i32(c, d)))


@kernel
def _sweep(descriptors, copies, x, ldx, rows, y, ldy, scratch):
    for i in range(copies):
        linear.linear(descriptors + 8 * packed.FIELDS * i, x, ldx, rows, y, ldy, 0, 0, 1, scratch)


def best_s(run: Callable[[], object], repeats: int) -> float:
    """The shortest CPU time of several runs, after one that compiles and warms."""
    run()
    times = []
    for _ in range(repeats):
        begun_s = time.thread_time()
        run()
        times.append(time.thread_time() - begun_s)
    return min(times)


def measure_bounds(repeats: int = 7) -> Bounds:
    """The machine's bounds for one core."""
    out, operands = np.zeros(_CHAINS * simd.W, np.float32), np.ones(2 * simd.W, np.float32)
    peaks = {}
    for which, (kind, form) in enumerate(zip(packed.KINDS, USED_FORMS, strict=True)):
        arguments = (which, _ROUNDS, operands.ctypes.data, out.ctypes.data)
        operations = 2 * STEP_INPUTS[form] * simd.W * _CHAINS * _ROUNDS
        peaks[kind] = operations / best_s(lambda a=arguments: _run_peak(*a), repeats) / 1e9  # type: ignore[misc]
    buffer = np.ones(SWEPT_BYTES, np.uint8)
    seconds = best_s(lambda: _read(buffer.ctypes.data, buffer.size, out.ctypes.data), repeats)
    return Bounds(buffer.size / seconds / 1e9, peaks)


def measure_linear(
    kind: str, out_features: int, in_features: int, rows: Sequence[int], bounds: Bounds, repeats: int = 7
) -> list[Speed]:
    """One weight's products with so many rows each."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((out_features, in_features), np.float32)
    first = packed.pack_weight(weight, kind)
    copies = [packed.PackedWeight.from_arrays(kind, in_features, out_features, first.arrays())]
    while len(copies) * first.nbytes < SWEPT_BYTES:
        arrays = {**first.arrays(), "data": packed.aligned_empty(first.data.nbytes)}
        arrays["data"][:] = first.data
        copies.append(packed.PackedWeight.from_arrays(kind, in_features, out_features, arrays))
    words = np.concatenate([packed.describe(copy) for copy in copies])
    speeds = []
    for count in rows:
        x = generator.standard_normal((count, in_features), np.float32)
        y = np.zeros((count, packed.padded(out_features)), np.float32)
        scratch = np.zeros(linear.scratch_bytes(kind, in_features, count), np.uint8)
        operations = 2 * count * out_features * in_features
        # A sweep of many rows is long enough, and bound by arithmetic, without all copies.
        used = max(1, min(len(copies), int(2e9 / operations) + 1))
        arguments = (words.ctypes.data, used, x.ctypes.data, in_features, count, y.ctypes.data, y.shape[1])
        seconds = best_s(lambda a=arguments, s=scratch: _sweep(*a, s.ctypes.data), repeats) / used  # type: ignore[misc]
        bound_s = max(first.nbytes / bounds.read_gb_s, operations / bounds.gflop_s[kind]) / 1e9
        rates = (operations / seconds / 1e9, first.nbytes / seconds / 1e9)
        speeds.append(Speed(kind, out_features, in_features, count, seconds, *rates, bound_s / seconds))
    return speeds


def table(speeds: Sequence[Speed], bounds: Bounds) -> str:
    """What was measured, for a person to read."""
    peaks = ", ".join(f"{kind} {value:.0f}" for kind, value in bounds.gflop_s.items())
    lines = [f"{TARGET.cpu}, {TARGET.isa}: one core reads {bounds.read_gb_s:.1f} GB/s; GFLOP/s at most: {peaks}"]
    lines.append(f"{'kind':9} {'weight':>12} {'rows':>5} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'of bound':>8}")
    for s in speeds:
        shape = f"{s.out_features}x{s.in_features}"
        numbers = f"{s.seconds * 1e6:9.1f} {s.gflop_s:8.1f} {s.gb_s:6.1f} {s.share:8.0%}"
        lines.append(f"{s.kind:9} {shape:>12} {s.rows:5} {numbers}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print `SHAPES` times `ROWS`, in every kind."""
    bounds = measure_bounds()
    speeds = [
        speed for kind in packed.KINDS for shape in SHAPES for speed in measure_linear(kind, *shape, ROWS, bounds)
    ]
    print(table(speeds, bounds))


if __name__ == "__main__":
    main()
