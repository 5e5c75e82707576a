"""Vectors of the processor for `@kernel` code: `W` lanes of float32 (`f32`) or int32 (`i32`) over raw addresses.

Names are numpy's where numpy has one. Addresses are int64 bytes and need no alignment beyond an element's. Every
function is one LLVM pattern that is inlined where it is called; reductions add in one fixed tree.

    address  int64, as `array.ctypes.data` or a kernel's address arithmetic gives it
    f32, i32 vectors of W lanes; an index or a count is int64; a scalar is numba's float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from .emit import (
    ADDRESS,
    F32_VECTOR,
    FLOAT,
    I8,
    I16,
    I32,
    I32_VECTOR,
    I64,
    VECTOR_BYTES,
    W,
    call,
    emit_fma,
    emit_prefetch,
    f32,
    i32,
    load_as,
    operation,
    pointer,
    round_to_bf16,
    shuffle,
    splat,
    spread,
    store_as,
    widen_bf16_pairs,
)
from .target import kernel

__all__ = ["VECTOR_BYTES", "W"]  # of `emit`; the rest is defined here

# Memory.


@operation(f32, ADDRESS)
def load(b, address):
    """address -> W float32."""
    return load_as(b, address, F32_VECTOR, 4)


@operation(types.void, ADDRESS, f32)
def store(b, address, value):
    """Write W float32."""
    store_as(b, address, value, 4)


def _first_lanes(b: ir.IRBuilder, count: Any) -> Any:
    lanes = ir.Constant(I32_VECTOR, list(range(W)))
    return b.icmp_signed("<", lanes, spread(b, b.trunc(count, I32), W))


@operation(f32, ADDRESS, types.int64)
def load_first(b, address, count):
    """address, n -> W lanes of which the first n are read, the others 0; memory behind them is not touched."""
    kind = ir.FunctionType(F32_VECTOR, [F32_VECTOR.as_pointer(), I32, ir.VectorType(ir.IntType(1), W), F32_VECTOR])
    function = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.load.v{W}f32.p0")
    return b.call(function, [pointer(b, address, F32_VECTOR), I32(4), _first_lanes(b, count), splat(F32_VECTOR, 0.0)])


@operation(types.void, ADDRESS, f32, types.int64)
def store_first(b, address, value, count):
    """Write the first n lanes."""
    kind = ir.FunctionType(ir.VoidType(), [F32_VECTOR, F32_VECTOR.as_pointer(), I32, ir.VectorType(ir.IntType(1), W)])
    function = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.store.v{W}f32.p0")
    b.call(function, [value, pointer(b, address, F32_VECTOR), I32(4), _first_lanes(b, count)])


@operation(f32, ADDRESS)
def broadcast(b, address):
    """One float32 in memory -> all lanes."""
    return spread(b, load_as(b, address, FLOAT, 4), W)


@operation(types.float32, ADDRESS)
def load_float(b, address):
    """One float32."""
    return load_as(b, address, FLOAT, 4)


@operation(types.void, ADDRESS, types.float32)
def store_float(b, address, value):
    """Write one float32."""
    store_as(b, address, value, 4)


@operation(types.int64, ADDRESS)
def load_int64(b, address):
    """One int64: descriptors, tables."""
    return load_as(b, address, I64, 8)


@operation(types.void, ADDRESS, types.int64)
def store_int64(b, address, value):
    """Write one int64."""
    store_as(b, address, value, 8)


@operation(types.int32, ADDRESS)
def load_int8_scalar(b, address):
    """One int8."""
    return b.sext(load_as(b, address, I8, 1), I32)


@operation(i32, ADDRESS)
def load_i32(b, address):
    """address -> W int32."""
    return load_as(b, address, I32_VECTOR, 4)


@operation(types.void, ADDRESS, i32)
def store_i32(b, address, value):
    """Write W int32."""
    store_as(b, address, value, 4)


@operation(f32, ADDRESS)
def load_bf16(b, address):
    """W bfloat16 in a row -> float32."""
    halves = load_as(b, address, ir.VectorType(I16, W), 2)
    return b.bitcast(b.shl(b.zext(halves, I32_VECTOR), splat(I32_VECTOR, 16)), F32_VECTOR)


@operation(types.void, ADDRESS, f32)
def store_bf16(b, address, value):
    """Write W bfloat16 in a row, rounded to nearest, ties to even."""
    high = b.lshr(round_to_bf16(b, value), splat(I32_VECTOR, 16))
    store_as(b, address, b.trunc(high, ir.VectorType(I16, W)), 2)


@operation(types.UniTuple(f32, 2), ADDRESS)
def load_bf16_pairs(b, address):
    """2W bfloat16 in a row -> those at even places, those at odd places (cheaper than two `load_bf16`)."""
    return widen_bf16_pairs(b, load_as(b, address, I32_VECTOR, 2))


@operation(types.void, ADDRESS, f32, f32)
def store_bf16_pairs(b, address, even, odd):
    """Write 2W bfloat16 in a row: `even` to the even places, `odd` to the odd ones; rounded as `store_bf16`."""
    low = b.lshr(round_to_bf16(b, even), splat(I32_VECTOR, 16))
    high = b.and_(round_to_bf16(b, odd), splat(I32_VECTOR, 0xFFFF0000))
    store_as(b, address, b.or_(low, high), 2)


@operation(types.float32, ADDRESS)
def load_bf16_float(b, address):
    """One bfloat16 -> float32."""
    return b.bitcast(b.shl(b.zext(load_as(b, address, I16, 2), I32), I32(16)), FLOAT)


@operation(types.void, ADDRESS, types.float32)
def store_bf16_float(b, address, value):
    """Write one bfloat16, rounded as `store_bf16`."""
    lane = b.extract_element(round_to_bf16(b, spread(b, value, W)), I32(0))
    store_as(b, address, b.trunc(b.lshr(lane, I32(16)), I16), 2)


@operation(i32, ADDRESS)
def load_int8(b, address):
    """W int8 in a row -> int32."""
    return b.sext(load_as(b, address, ir.VectorType(I8, W), 1), I32_VECTOR)


@operation(types.void, ADDRESS, i32)
def store_int8(b, address, value):
    """Write the low 8 bits of each lane."""
    store_as(b, address, b.trunc(value, ir.VectorType(I8, W)), 1)


@operation(types.void, ADDRESS)
def prefetch(b, address):
    """Ask for the cache line of an address, to be read once soon. Any address is allowed."""
    emit_prefetch(b, address)


# Values.


@operation(f32)
def zeros(b):
    """0 in every lane."""
    return splat(F32_VECTOR, 0.0)


@operation(f32, types.float32)
def full(b, value):
    """A scalar in every lane."""
    return spread(b, value, W)


@operation(i32, types.int32)
def full_i32(b, value):
    """A scalar in every lane."""
    return spread(b, value, W)


# Arithmetic, lane by lane.


@operation(f32, f32, f32)
def add(b, x, y):
    """x + y."""
    return b.fadd(x, y)


@operation(f32, f32, f32)
def subtract(b, x, y):
    """x - y."""
    return b.fsub(x, y)


@operation(f32, f32, f32)
def multiply(b, x, y):
    """x * y."""
    return b.fmul(x, y)


@operation(f32, f32, f32)
def divide(b, x, y):
    """x / y, rounded correctly."""
    return b.fdiv(x, y)


@operation(f32, f32, f32, f32)
def fma(b, x, y, z):
    """x * y + z, rounded once."""
    return emit_fma(b, x, y, z)


@operation(f32, f32, f32)
def maximum(b, x, y):
    """The larger; y where x is not a number."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@operation(f32, f32, f32)
def minimum(b, x, y):
    """The smaller; y where x is not a number."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@operation(f32, f32)
def absolute(b, x):
    """|x|."""
    return b.bitcast(b.and_(b.bitcast(x, I32_VECTOR), splat(I32_VECTOR, 0x7FFFFFFF)), F32_VECTOR)


@operation(f32, f32)
def negative(b, x):
    """-x."""
    return b.bitcast(b.xor(b.bitcast(x, I32_VECTOR), splat(I32_VECTOR, 0x80000000)), F32_VECTOR)


@operation(f32, f32)
def sqrt(b, x):
    """Square root, rounded correctly."""
    return call(b, f"llvm.sqrt.v{W}f32", F32_VECTOR, x)


@operation(f32, f32)
def rint(b, x):
    """The nearest whole number, ties to even."""
    return call(b, f"llvm.rint.v{W}f32", F32_VECTOR, x)


@operation(f32, f32, f32, f32, f32)
def where_less(b, a, limit, x, y):
    """x where a < limit, else y."""
    return b.select(b.fcmp_ordered("<", a, limit), x, y)


@operation(f32, f32, f32)
def copysign(b, magnitude, sign):
    """|magnitude| with the sign of `sign`."""
    positive = b.and_(b.bitcast(magnitude, I32_VECTOR), splat(I32_VECTOR, 0x7FFFFFFF))
    bit = b.and_(b.bitcast(sign, I32_VECTOR), splat(I32_VECTOR, 0x80000000))
    return b.bitcast(b.or_(positive, bit), F32_VECTOR)


@operation(i32, i32, i32)
def add_i32(b, x, y):
    """x + y, modulo 2^32."""
    return b.add(x, y)


@operation(i32, f32)
def to_int(b, x):
    """float32 within int32's range -> int32, to nearest, ties to even."""
    return b.fptosi(call(b, f"llvm.rint.v{W}f32", F32_VECTOR, x), I32_VECTOR)


@operation(f32, i32)
def to_float(b, x):
    """int32 -> float32, to nearest."""
    return b.sitofp(x, F32_VECTOR)


@operation(f32, i32)
def power_of_two(b, exponent):
    """2 ** exponent for -126 <= exponent <= 127."""
    return b.bitcast(b.shl(b.add(exponent, splat(I32_VECTOR, 127)), splat(I32_VECTOR, 23)), F32_VECTOR)


# Across lanes.


def _tree(b: ir.IRBuilder, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Lane i with lane i + n/2, then the halves of that, down to one."""
    lanes = W
    while lanes > 1:
        half = lanes // 2
        undefined = ir.Constant(value.type, ir.Undefined)
        left = shuffle(b, value, undefined, range(half))
        right = shuffle(b, value, undefined, range(half, lanes))
        value, lanes = combine(left, right), half
    return b.extract_element(value, I32(0))


@operation(types.float32, f32)
def sum_lanes(b, x):
    """The sum of all lanes, always in the same tree: lane i + lane i + W/2, and so on down."""
    return _tree(b, x, b.fadd)


@operation(types.float32, f32)
def max_lanes(b, x):
    """The largest lane."""
    return _tree(b, x, lambda left, right: b.select(b.fcmp_ordered(">", left, right), left, right))


# Both ends of a row whose length is no multiple of W.


@kernel(inline=True)
def load_part(address, count):
    """`load` of W lanes, `load_first` of fewer."""
    if count == W:
        return load(address)
    return load_first(address, count)


@kernel(inline=True)
def store_part(address, value, count):
    """`store` of W lanes, `store_first` of fewer."""
    if count == W:
        store(address, value)
    else:
        store_first(address, value, count)
