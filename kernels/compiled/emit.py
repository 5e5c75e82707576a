"""How vector patterns are written in LLVM's IR: types, and the pieces that `simd`, `tile` and `attention_tile` share.

Here values are LLVM's, seen while a kernel is compiled; `operation` makes a pattern callable from `@kernel` code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from .target import TARGET

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
