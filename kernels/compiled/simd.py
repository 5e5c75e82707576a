"""Vectors of the processor for `@kernel` code: `W` lanes of float32 (`f32`) or int32 (`i32`) over raw addresses.

Names are numpy's where numpy has one. Addresses are int64 bytes and need no alignment beyond an element's. Every
function is one LLVM pattern that is inlined where it is called; reductions add in one fixed tree.

    address  int64, as `array.ctypes.data` or a kernel's address arithmetic gives it
    f32, i32 vectors of W lanes; an index or a count is int64; a scalar is numba's float32
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .target import TARGET, kernel

W = TARGET.width
"""float32 lanes of a vector."""
VECTOR_BYTES = 4 * W

FLOAT = ir.FloatType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32_VECTOR = ir.VectorType(FLOAT, W)
I32_VECTOR = ir.VectorType(I32, W)


class _Vector(types.Type):
    """numba's type of a vector."""

    def __init__(self, name: str, vector: ir.VectorType) -> None:
        self.vector = vector
        super().__init__(name=f"{name}x{W}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.vector)


f32 = _Vector("f32", F32_VECTOR)
i32 = _Vector("i32", I32_VECTOR)
ADDRESS = types.int64

Emit = Callable[..., Any]


def operation(result: types.Type, *arguments: types.Type) -> Callable[[Emit], Any]:
    """Decorator: a function of a builder and LLVM values becomes callable from kernels, with this signature."""

    def wrap(emit: Emit) -> Any:
        def definition(_typing: Any, *_given: Any) -> Any:
            def generate(context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[Any]) -> Any:
                value = emit(builder, *values)
                if result == types.void:
                    return context.get_dummy_value()
                if isinstance(result, types.BaseTuple):
                    return context.make_tuple(builder, result, value)
                return value

            return result(*arguments), generate

        # numba asks for the arity; the first argument (a typing context there, the builder here) has no part in it.
        definition.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        definition.__name__ = definition.__qualname__ = emit.__name__
        definition.__doc__ = emit.__doc__
        definition.__module__ = emit.__module__
        return intrinsic(definition)

    return wrap


# How patterns are written: shared with `tile`.


def splat(vector: ir.VectorType, value: int | float) -> ir.Constant:
    """A constant vector."""
    return ir.Constant(vector, [value] * vector.count)


def pointer(b: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    """An address as a pointer."""
    return b.inttoptr(address, kind.as_pointer())


def load_as(b: ir.IRBuilder, address: Any, kind: ir.Type, align: int) -> Any:
    """What lies at an address."""
    value = b.load(pointer(b, address, kind))
    value.align = align
    return value


def store_as(b: ir.IRBuilder, address: Any, value: Any, align: int) -> None:
    """Write a value to an address."""
    b.store(value, pointer(b, address, value.type)).align = align


def spread(b: ir.IRBuilder, scalar: Any, lanes: int) -> Any:
    """A scalar in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, scalar, I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def call(b: ir.IRBuilder, name: str, result: ir.Type, *values: Any) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def shuffle(b: ir.IRBuilder, left: Any, right: Any, lanes: Sequence[int]) -> Any:
    """Lanes of two vectors by number."""
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def emit_fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def emit_prefetch(b: ir.IRBuilder, address: Any) -> None:
    """Ask for the cache line of an address."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [pointer(b, address, I8), I32(0), I32(3), I32(1)])


def widen_bf16_pairs(b: ir.IRBuilder, pairs: Any) -> tuple[Any, Any]:
    """[W] i32, each two bfloat16 -> those in the low halves, those in the high halves, as float32."""
    low = b.bitcast(b.shl(pairs, splat(I32_VECTOR, 16)), F32_VECTOR)
    high = b.bitcast(b.and_(pairs, splat(I32_VECTOR, 0xFFFF0000)), F32_VECTOR)
    return low, high


def round_to_bf16(b: ir.IRBuilder, value: Any) -> Any:
    """float32 -> its bits, rounded to the nearest bfloat16 (ties to even) in the high half; NaN stays NaN."""
    bits = b.bitcast(value, I32_VECTOR)
    odd = b.and_(b.lshr(bits, splat(I32_VECTOR, 16)), splat(I32_VECTOR, 1))
    rounded = b.add(bits, b.add(odd, splat(I32_VECTOR, 0x7FFF)))
    return b.select(b.fcmp_unordered("uno", value, value), splat(I32_VECTOR, 0x7FC00000), rounded)


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
def load_int32(b, address):
    """One int32."""
    return load_as(b, address, I32, 4)


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


@operation(f32, ADDRESS)
def broadcast_bf16(b, address):
    """One bfloat16 in memory -> all lanes, as float32."""
    return spread(b, b.bitcast(b.shl(b.zext(load_as(b, address, I16, 2), I32), I32(16)), FLOAT), W)


@operation(i32, ADDRESS)
def load_int8(b, address):
    """W int8 in a row -> int32."""
    return b.sext(load_as(b, address, ir.VectorType(I8, W), 1), I32_VECTOR)


@operation(types.void, ADDRESS, i32)
def store_int8(b, address, value):
    """Write the low 8 bits of each lane."""
    store_as(b, address, b.trunc(value, ir.VectorType(I8, W)), 1)


@operation(types.void, ADDRESS, i32)
def store_int16(b, address, value):
    """Write the low 16 bits of each lane."""
    store_as(b, address, b.trunc(value, ir.VectorType(I16, W)), 2)


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


# Functions, from the above.

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_LOWEST, _EXP_HIGHEST = -87.33654, 88.72283
"""Below, exp is subnormal and becomes 0; above, infinite."""


@kernel(inline=True)
def exp(x):
    """e ** x within 2 ulp; 0 below -87.3 (and for -inf), inf above 88.7. Cephes' expf: x = n ln 2 + r."""
    clamped = minimum(maximum(x, full(_EXP_LOWEST)), full(_EXP_HIGHEST))
    n = rint(multiply(clamped, full(_LOG2_E)))
    r = fma(n, full(-_LN2_LOW), fma(n, full(-_LN2_HIGH), clamped))
    p = fma(full(1.9875691500e-4), r, full(1.3981999507e-3))
    p = fma(p, r, full(8.3334519073e-3))
    p = fma(p, r, full(4.1665795894e-2))
    p = fma(p, r, full(1.6666665459e-1))
    p = fma(p, r, full(5.0000001201e-1))
    p = add(fma(p, multiply(r, r), r), full(1.0))
    half = rint(multiply(n, full(0.5)))  # 2 ** 128 is no float32: two factors
    y = multiply(multiply(p, power_of_two(to_int(half))), power_of_two(to_int(subtract(n, half))))
    y = where_less(full(_EXP_HIGHEST), x, full(float("inf")), y)
    return where_less(x, full(_EXP_LOWEST), zeros(), y)


@kernel(inline=True)
def tanh(x):
    """Hyperbolic tangent, within 3 ulp: x + x^3 p(x^2) below 0.625 (Cephes' tanhf), 1 - 2 / (e^2|x| + 1) above."""
    a = absolute(x)
    z = multiply(x, x)
    p = fma(full(-5.70498872745e-3), z, full(2.06390887954e-2))
    p = fma(p, z, full(-5.37397155531e-2))
    p = fma(p, z, full(1.33314422036e-1))
    p = fma(p, z, full(-3.33332819422e-1))
    small = fma(multiply(p, z), x, x)
    large = subtract(full(1.0), divide(full(2.0), add(exp(add(a, a)), full(1.0))))
    return copysign(where_less(a, full(0.625), small, large), x)


@kernel(inline=True)
def erf(x):
    """The error function, absolute error below 3e-7: Abramowitz and Stegun 7.1.26, a series below 0.5."""
    a = absolute(x)
    z = multiply(x, x)
    s = fma(full(-7.5757575757e-4), z, full(4.6296296296e-3))
    s = fma(s, z, full(-2.3809523809e-2))
    s = fma(s, z, full(1.0e-1))
    s = fma(s, z, full(-3.3333333333e-1))
    small = multiply(multiply(fma(s, z, full(1.0)), x), full(1.1283791671))
    t = divide(full(1.0), fma(full(0.3275911), a, full(1.0)))
    p = fma(full(1.061405429), t, full(-1.453152027))
    p = fma(p, t, full(1.421413741))
    p = fma(p, t, full(-0.284496736))
    p = fma(p, t, full(0.254829592))
    large = subtract(full(1.0), multiply(multiply(p, t), exp(negative(z))))
    return copysign(where_less(a, full(0.5), small, large), x)


# Threads.


@operation(types.int64, ADDRESS, types.int64)
def atomic_add(b, address, value):
    """Add to the int64 at an 8-aligned address; what it held before. Sequentially consistent, as all of these."""
    return b.atomic_rmw("add", pointer(b, address, I64), value, "seq_cst")


@operation(types.int64, ADDRESS)
def atomic_load(b, address):
    """The int64 at an 8-aligned address, as another thread wrote it."""
    return b.load_atomic(pointer(b, address, I64), "seq_cst", 8)


@operation(types.void, ADDRESS, types.int64)
def atomic_store(b, address, value):
    """Write an int64 for other threads to see."""
    b.store_atomic(value, pointer(b, address, I64), "seq_cst", 8)


@operation(types.void)
def pause(b):
    """Tell the processor that this thread spins."""
    if b.module.triple.startswith(("x86_64", "i686")):
        call(b, "llvm.x86.sse2.pause", ir.VoidType())
    elif b.module.triple.startswith(("aarch64", "arm64")):
        call(b, "llvm.aarch64.hint", ir.VoidType(), I32(1))


@operation(types.void)
def sched_yield(b):
    """Let another thread run on this core (POSIX sched_yield)."""
    call(b, "sched_yield", I32)
