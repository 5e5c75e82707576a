"""Register tiles: a few rows of x times a few panels of packed weights, sums in vector registers from start to end.

A panel holds the weights of NR = 2W outputs, step after step of the sum over inputs; a tile is one LLVM loop over the
steps. Every element of the product is summed over its inputs in ascending order from zero, whatever the tile's shape:
a result does not depend on how rows and panels were cut.

    form        one step of a panel (NR outputs)          x operand of a row and step   sum
    FLOAT32     NR float32                                float32                       fma
    BF16        W x 2 bfloat16: outputs j and j + W       float32                       fma, weights widened
    BF16_DOT    NR x 2 bfloat16: inputs 2s and 2s + 1     2 bfloat16                    vdpbf16ps
    INT8        2 x NR x 4 int8: inputs 8s … 8s + 7       8 uint8, 128 added            vpmaddubsw, exact (below)
    INT8_DOT    NR x 4 int8: inputs 4s … 4s + 3           4 uint8, 128 added            vpdpbusd, exact

INT8 adds four products of inputs 8s + {0, 1, 4, 5}, and of {2, 3, 6, 7}, in 16 bits: two thirds of the instructions
that sums in 32 bits take. Nothing saturates because packing keeps what weights of one sign in such a group add up to
within `GROUP_LIMIT`: 255 times that fits.

Where the processor lacks a form's instruction, LLVM's generic operations stand in for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
from llvmlite.binding import get_process_triple
from numba import types

from .emit import (
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
    load_as,
    operation,
    shuffle,
    splat,
    spread,
    store_as,
    widen_bf16_pairs,
)
from .target import TARGET

NR = 2 * W
"""Outputs of a panel."""
FLOAT32, BF16, BF16_DOT, INT8, INT8_DOT = range(5)
FORMS = ("float32", "bf16", "bf16_dot", "int8", "int8_dot")
USED_FORMS = (FLOAT32, BF16_DOT, INT8_DOT) if TARGET.isa == "avx512_bf16" else (FLOAT32, BF16, INT8)
"""The forms in which this processor's weights are packed: one per kind of weight."""
STEP_BYTES = (4 * NR, 2 * NR, 4 * NR, 8 * NR, 4 * NR)
"""Bytes of one step of a panel, by form."""
STEP_INPUTS = (1, 1, 2, 8, 4)
"""Inputs that one step covers, by form."""
X_STEP_BYTES = (4, 4, 4, 8, 4)
"""Bytes of x for one row and step, by form."""
GROUP_LIMIT = 128
"""INT8: what the positive weights of a group of four add up to at most, and the negative ones."""
FULL_ROWS = 6 if TARGET.registers == 16 else 12
"""Rows at which a tile's sums, one step's weights and one operand fill the registers."""
MAX_ROWS = FULL_ROWS if TARGET.native else 3
"""Rows of the highest tile. Emulated code is for tests: long enough as it is."""
PANELS_AT_ONCE = (0, 4, 2, 1, 1, 1, 1) if TARGET.registers == 16 else (0, 4, 4, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1)
"""By the rows of a tile: panels side by side, so that a few rows have enough sums under way to hide fma's latency."""
_LINE_BYTES = 64
_MULTIPLY_BYTES = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
_ADD_PAIRS = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def _lanes_of(b: ir.IRBuilder, value: Any, first: int, of: int) -> Any:
    """Every `of`-th lane from `first`."""
    return shuffle(b, value, ir.Constant(value.type, ir.Undefined), range(first, value.type.count, of))


def dot_bf16(b: ir.IRBuilder, total: Any, x: Any, w: Any) -> Any:
    """[W] float32, [W] i32 of bfloat16 pairs twice -> total + x1 w1 + x0 w0, as vdpbf16ps does it."""
    if TARGET.isa == "avx512_bf16" and TARGET.native:  # LLVM 16 and later bring these operands to its bfloat by itself
        return call(b, f"llvm.x86.avx512bf16.dpbf16ps.{32 * W}", F32_VECTOR, total, x, w)
    x_low, x_high = widen_bf16_pairs(b, x)
    w_low, w_high = widen_bf16_pairs(b, w)
    return emit_fma(b, x_low, w_low, emit_fma(b, x_high, w_high, total))


def dot_groups(b: ir.IRBuilder, total: Any, xs: Sequence[Any], ws: Sequence[Any]) -> Any:
    """[W] i32, two of [W] i32 of 4 uint8, two of [W] i32 of 4 int8 -> total + their eight products."""
    if not (TARGET.native and W in _MULTIPLY_BYTES and get_process_triple().startswith("x86_64")):
        return dot_int8(b, dot_int8(b, total, xs[0], ws[0]), xs[1], ws[1])
    bytes_of, words = ir.VectorType(I8, 4 * W), ir.VectorType(I16, 2 * W)
    low, high = (
        call(b, _MULTIPLY_BYTES[W], words, b.bitcast(x, bytes_of), b.bitcast(w, bytes_of))
        for x, w in zip(xs, ws, strict=True)
    )
    return b.add(total, call(b, _ADD_PAIRS[W], I32_VECTOR, b.add(low, high), splat(words, 1)))


def dot_int8(b: ir.IRBuilder, total: Any, x: Any, w: Any) -> Any:
    """[W] i32, [W] i32 of 4 uint8, [W] i32 of 4 int8 -> total + their four products, as vpdpbusd does it."""
    if TARGET.isa == "avx512_bf16" and TARGET.native:
        return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * W}", I32_VECTOR, total, x, w)
    quads = ir.VectorType(I8, 4 * W)
    x, w = b.bitcast(x, quads), b.bitcast(w, quads)
    for part in range(4):
        left = b.zext(_lanes_of(b, x, part, 4), I32_VECTOR)
        total = b.add(total, b.mul(left, b.sext(_lanes_of(b, w, part, 4), I32_VECTOR)))
    return total


def _weights(b: ir.IRBuilder, form: int, address: Any) -> tuple[Any, Any]:
    """One step of one panel, as two vectors of operands; INT8: two pairs of them."""
    second = b.add(address, I64(STEP_BYTES[form] // 2))
    if form == FLOAT32:
        return load_as(b, address, F32_VECTOR, 4), load_as(b, second, F32_VECTOR, 4)
    if form == BF16:
        return widen_bf16_pairs(b, load_as(b, address, I32_VECTOR, 4))
    if form == INT8:
        quads = [load_as(b, b.add(address, I64(VECTOR_BYTES * i)), I32_VECTOR, 4) for i in range(4)]
        return (quads[0], quads[2]), (quads[1], quads[3])
    return load_as(b, address, I32_VECTOR, 4), load_as(b, second, I32_VECTOR, 4)


def _operand(b: ir.IRBuilder, form: int, address: Any) -> Any:
    """One row's x for one step, in every lane."""
    if form in (FLOAT32, BF16):
        return spread(b, load_as(b, address, FLOAT, 4), W)
    if form == INT8:
        return tuple(spread(b, load_as(b, b.add(address, I64(4 * i)), I32, 4), W) for i in range(2))
    return spread(b, load_as(b, address, I32, 4), W)


def accumulate(b: ir.IRBuilder, form: int, total: Any, x: Any, w: Any) -> Any:
    """total + x w."""
    if form in (FLOAT32, BF16):
        return emit_fma(b, x, w, total)
    if form == BF16_DOT:
        return dot_bf16(b, total, x, w)
    return (dot_groups if form == INT8 else dot_int8)(b, total, x, w)


def _step(b: ir.IRBuilder, form: int, xs: list[Any], ws: list[Any], totals: list[list[Any]]) -> list[list[Any]]:
    """All sums of a tile, one step on. `totals`: a list per row, two vectors per panel.

    The order bounds the live registers: a lone panel's weights stay while rows pass; else rows stay while weights pass.
    """
    if len(ws) == 1:
        weights = _weights(b, form, ws[0])
        moved = []
        for address, row in zip(xs, totals, strict=True):
            x = _operand(b, form, address)
            moved.append([accumulate(b, form, total, x, w) for total, w in zip(row, weights, strict=True)])
        return moved
    rows = [_operand(b, form, address) for address in xs]
    columns = []
    for panel, address in enumerate(ws):
        for half, w in enumerate(_weights(b, form, address)):
            columns.append(
                [accumulate(b, form, row[2 * panel + half], x, w) for x, row in zip(rows, totals, strict=True)]
            )
    return [list(row) for row in zip(*columns, strict=True)]


def _finish(b: ir.IRBuilder, form: int, rows: int, totals: list[list[Any]], args: _Arguments) -> None:
    """Scale what is integer, add the bias, add what y holds if asked to, write y."""
    # Without a bias, or without a sum to add to, y is read in its place and masked to 0: neither branch nor variant.
    has_bias = b.icmp_unsigned("!=", args.bias, I64(0))
    bias_mask = spread(b, b.sext(has_bias, I32), W)
    old_mask = spread(b, b.sext(b.icmp_unsigned("!=", args.accumulate, I64(0)), I32), W)
    for r in range(rows):
        y = b.add(args.y, b.mul(args.ldy, I64(r)))
        bias_row = b.select(has_bias, args.bias, y)
        if form in (INT8, INT8_DOT):
            x_scale = spread(b, load_as(b, b.add(args.x_scale, I64(4 * r)), FLOAT, 4), W)
        for j, total in enumerate(totals[r]):
            there = I64(VECTOR_BYTES * j)
            if form in (INT8, INT8_DOT):
                scale = b.fmul(x_scale, load_as(b, b.add(args.w_scale, there), F32_VECTOR, 4))
                total = b.fmul(b.sitofp(total, F32_VECTOR), scale)
            for address, mask in ((bias_row, bias_mask), (y, old_mask)):
                bits = b.and_(load_as(b, b.add(address, there), I32_VECTOR, 4), mask)
                total = b.fadd(total, b.bitcast(bits, F32_VECTOR))
            store_as(b, b.add(y, there), total, 4)


class _Arguments:
    """The arguments of a tile, all int64, strides in bytes."""

    COUNT = 15

    def __init__(self, *values: Any) -> None:
        (
            self.steps,  # of the sum
            self.x,  # first row, first step
            self.x_row,  # from row to row
            self.x_step,  # from step to step
            self.w,  # first panel
            self.w_panel,  # from panel to panel
            self.y,
            self.ldy,  # from row to row
            self.accumulate,  # not 0: add to y
            self.bias,  # of the first column, or 0
            self.x_scale,  # integers: of the first row
            self.w_scale,  # integers: of the first column
            self.compensation,  # integers: 128 times the sum of each column's weights
            self.ahead,  # weights to be needed later: fetched meanwhile
            self.ahead_step,  # from step to step
        ) = values


def _emit_tile(b: ir.IRBuilder, form: int, rows: int, panels: int, args: _Arguments) -> None:
    """The body of a tile's function."""
    vector = F32_VECTOR if form in (FLOAT32, BF16, BF16_DOT) else I32_VECTOR
    start = [splat(vector, 0)] * (2 * panels)
    if form in (INT8, INT8_DOT):
        places = [b.add(args.compensation, I64(VECTOR_BYTES * j)) for j in range(2 * panels)]
        start = [b.sub(splat(vector, 0), load_as(b, place, vector, 4)) for place in places]
    before, loop, done = b.block, b.append_basic_block("steps"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    moving = [
        (I64(0), I64(1)),
        (args.x, args.x_step),
        (args.w, I64(STEP_BYTES[form])),
        (args.ahead, args.ahead_step),
    ]
    counters = [b.phi(I64) for _ in moving]
    totals = [[b.phi(vector) for _ in start] for _ in range(rows)]
    xs = [b.add(counters[1], b.mul(args.x_row, I64(r))) for r in range(rows)]
    ws = [b.add(counters[2], b.mul(args.w_panel, I64(p))) for p in range(panels)]
    lines = max(1, STEP_BYTES[form] // _LINE_BYTES)
    for p in range(panels):
        for line in range(lines):
            place = b.add(counters[3], b.sdiv(b.mul(args.ahead_step, I64(line)), I64(lines)))
            emit_prefetch(b, b.add(place, b.mul(args.w_panel, I64(p))))
    moved = _step(b, form, xs, ws, totals)
    for phi, (first, stride) in zip(counters, moving, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(b.add(phi, stride), loop)
    for row, values in zip(totals, moved, strict=True):
        for phi, first, value in zip(row, start, values, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", b.add(counters[0], I64(1)), args.steps), loop, done)
    b.position_at_end(done)
    _finish(b, form, rows, moved, args)
    b.ret_void()


def tile_function(module: ir.Module, form: int, rows: int, panels: int) -> ir.Function:
    """The function of one tile in a module, written there once: y[rows, panels * NR] = (or +=) the tile's product."""
    name = f"tile_{FORMS[form]}_{rows}x{panels}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * _Arguments.COUNT), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    _emit_tile(ir.IRBuilder(function.append_basic_block()), form, rows, panels, _Arguments(*function.args))
    return function


def _run_tile(b, form, rows, panels, *arguments):
    shapes = [(r, p) for r in range(1, MAX_ROWS + 1) for p in sorted({1, PANELS_AT_ONCE[r]})]
    done = b.append_basic_block("tiles_done")
    switch = b.switch(b.add(b.mul(b.add(b.mul(form, I64(64)), rows), I64(64)), panels), done)
    for f in USED_FORMS:
        for r, p in shapes:
            block = b.append_basic_block(f"tile_{FORMS[f]}_{r}x{p}")
            switch.add_case(I64((f * 64 + r) * 64 + p), block)
            with b.goto_block(block):
                b.call(tile_function(b.module, f, r, p), arguments)
                b.branch(done)
    b.position_at_end(done)


@operation(types.void, *[types.int64] * (3 + _Arguments.COUNT))
def run_tile(
    b,
    form,
    rows,
    panels,
    steps,
    x,
    x_row,
    x_step,
    w,
    w_panel,
    y,
    ldy,
    accumulate,
    bias,
    x_scale,
    w_scale,
    compensation,
    ahead,
    ahead_step,
):
    """y[rows, panels * NR] = (or +=) x W^T + b: the tile of a form and shape; the arguments are `_Arguments`.

    `panels` is 1 or PANELS_AT_ONCE[rows], rows at most MAX_ROWS, the form one of USED_FORMS.
    """
    _run_tile(
        b, form, rows, panels, steps, x, x_row, x_step, w, w_panel, y, ldy, accumulate, bias, x_scale, w_scale,
        compensation, ahead, ahead_step,
    )  # fmt: skip
