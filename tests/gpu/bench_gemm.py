"""Quantized products against torch's: bf16, its own int8 product (cuBLAS, without scales, and compiled with them), its
own product of 4-bit weights with groups; FlashInfer has neither. Llama-3.1-8B's layers. Few rows are bound by the bytes
of the weights, many by arithmetic; `of peak` is of the measured bf16 peak, which int8 may exceed. Cuts are tuned first,
and kept where tuning keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import LAST, Case, compiled, library
from tandem.kernels.gpu.tuning import Tuner
from tandem.kernels.gpu.w4a16 import w4a16_linear
from tandem.kernels.gpu.w8a8 import w8a8_linear
from tandem.kernels.int4 import quantize_int4, unpack_int4
from tandem.kernels.int8 import quantize_rows_reference, w8a8_linear_reference

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""[outputs, inputs] of q k v, o, gate and up, down."""
ROWS = (1, 16, 128, 2048)
GROUP = 128
COMPILED_AT = ((28672, 16), (28672, 2048))
"""[outputs, rows] at which torch compiles a product with scales: some seconds each."""
_FEWEST_ROWS = 32
"""Of torch's int8 product, which refuses 16."""


def cases(device: torch.device) -> Iterator[Callable[[], list[Case]]]:
    """One list a shape."""
    tuner = Tuner.of_device(device) if device.type == "cuda" else None
    for n, k in SHAPES:
        dense = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        for m in ROWS:
            yield partial(_products, m, dense, tuner)


def _products(m: int, dense: torch.Tensor, tuner: Tuner | None) -> list[Case]:
    n, k = dense.shape
    x = torch.randn(m, k, device=dense.device, dtype=torch.bfloat16)
    moved = x.nbytes + m * n * 2
    what, operations = f"{m} x {k} -> {n}", 2 * m * n * k
    return [
        *_of_int8(what, x, dense, tuner, operations, moved),
        *_of_int4(what, x, dense, tuner, operations, moved),
    ]


def _of_int8(
    what: str, x: torch.Tensor, dense: torch.Tensor, tuner: Tuner | None, operations: int, moved: int
) -> list[Case]:
    weight, weight_scales = quantize_rows_reference(dense)
    quantized, scales = quantize_rows_reference(x)
    run = lambda: w8a8_linear(quantized, scales, weight, weight_scales, tuner=tuner)  # noqa: E731
    few = slice(0, 4)
    expected = w8a8_linear_reference(quantized[few], scales[few], weight, weight_scales)
    torch.testing.assert_close(run()[few].float(), expected, rtol=0.01, atol=0.01)
    moved_bytes = moved - x.nbytes // 2 + weight.nbytes
    found = [Case(what=f"{what}, W8A8", who="tandem", run=run, moved_bytes=moved_bytes, operations=operations)]
    rows = max(len(quantized), _FEWEST_ROWS)
    padded = torch.zeros(rows, quantized.shape[1], dtype=torch.int8, device=x.device)
    padded[: len(quantized)] = quantized
    theirs = lambda: torch._int_mm(padded, weight.t())  # noqa: E731
    note = f"padded to {rows} rows" if rows > len(quantized) else ""
    common = {"what": f"{what}, W8A8", "moved_bytes": moved_bytes, "operations": operations}
    found.append(Case(who="torch int8", run=theirs, note=f"int32 sums only; {note}".rstrip("; "), **common))
    if x.is_cuda and (len(dense), len(x)) in COMPILED_AT:
        all_scales = torch.ones(rows, device=x.device)
        all_scales[: len(scales)] = scales

        def scaled() -> torch.Tensor:
            return (torch._int_mm(padded, weight.t()) * all_scales[:, None] * weight_scales).to(torch.bfloat16)

        found.append(Case(who="torch int8, compiled with scales", run=compiled(scaled), note=note, late=LAST, **common))
    bf16 = lambda: x @ dense.t()  # noqa: E731
    found.append(
        Case(what=f"{what}, W8A8", who="torch bf16", run=bf16, moved_bytes=moved + dense.nbytes, operations=operations)
    )
    return found


def _of_int4(
    what: str, x: torch.Tensor, dense: torch.Tensor, tuner: Tuner | None, operations: int, moved: int
) -> list[Case]:
    packed, scales = quantize_int4(dense, GROUP)
    run = lambda: w4a16_linear(x, packed, scales, tuner=tuner)  # noqa: E731
    wide = (unpack_int4(packed, GROUP).float() * scales.repeat_interleave(GROUP, 1)).to(x.dtype)
    torch.testing.assert_close(run().float(), (x @ wide.t()).float(), rtol=0.05, atol=1.0)

    def theirs() -> Callable[[], torch.Tensor]:
        made = _int4_of_torch(x, packed, scales)
        torch.testing.assert_close(made().float(), (x @ wide.t()).float(), rtol=0.05, atol=1.0)
        return made

    narrow_bytes = moved + packed.nbytes + scales.nbytes
    return [
        Case(what=f"{what}, W4A16", who=who, run=product, moved_bytes=moved_bytes, operations=operations)
        for who, product, moved_bytes in (
            ("tandem", run, narrow_bytes),
            ("torch int4", library(theirs), narrow_bytes),
            ("torch bf16", lambda: x @ dense.t(), moved + dense.nbytes),
        )
    ]


def _int4_of_torch(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> Callable[[], torch.Tensor]:
    """It wants neighbors in a byte, the first in the high bits, and scales and zeros [groups, N, 2] in x's dtype."""
    nibbles = (unpack_int4(packed, GROUP) + 8).to(torch.uint8)
    weight = torch._convert_weight_to_int4pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], 8)
    both = torch.stack((scales, torch.zeros_like(scales)), 2).transpose(0, 1).contiguous().to(x.dtype)
    return lambda: torch._weight_int4pack_mm(x, weight, GROUP, both)
