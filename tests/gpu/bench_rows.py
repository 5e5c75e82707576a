"""What stands between a layer's products: norms, activations, rotary and KV writes, copies of KV blocks, against
torch (its own kernels, or several of them where it has none that is fused, and what it compiles of those) and
FlashInfer. Llama-3.1-8B's widths, bf16. All of it is bound by memory: `of copy` is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import flashinfer_rival
import torch
from measure import LAST, LATE, Case, compiled, library
from tandem.kernels.gpu.activation import activation, activation_int8, quantize_rows
from tandem.kernels.gpu.kv_blocks import copy_blocks, gather_blocks, repack, scatter_blocks
from tandem.kernels.gpu.kv_write import kv_write
from tandem.kernels.gpu.norm import layer_norm, rms_norm, rms_norm_int8
from tandem.kernels.gpu.rotary import rotary
from tandem.kernels.gpu_plans.moves import Part
from tandem.kernels.int8 import quantize_rows_reference
from tandem.kernels.rotary import rotary_cpu, rotary_tables
from torch.nn.functional import layer_norm as torch_layer_norm
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import silu

DTYPE = torch.bfloat16
TOKENS = (1, 32, 2048)
WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4096, 14336, 32, 8, 128, 32
HANDED_TOKENS = 2048


def cases(device: torch.device) -> Iterator[Callable[[], list[Case]]]:
    """One list a shape and operation; what a Llama's step needs comes first."""
    for tokens in TOKENS:
        for make in (_norm, _activation, _kv_write):
            yield partial(make, tokens, device)
    for make in (_gather, _scatter, _repack, _copy):
        yield partial(make, device)
    for tokens in TOKENS[1:]:
        for make in (_quantize, _layer_norm, _rotary):
            yield partial(make, tokens, device)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.02, atol=0.02)


def _norm(tokens: int, device: torch.device) -> list[Case]:
    x, residual = (torch.randn(tokens, WIDTH, device=device, dtype=DTYPE) for _ in range(2))
    weight = torch.randn(WIDTH, device=device, dtype=DTYPE)
    _close(rms_norm(x, weight, 1e-5, residual.clone()), torch_rms_norm(x + residual, (WIDTH,), weight, 1e-5))

    def two_kernels() -> torch.Tensor:
        residual.add_(x)
        return torch_rms_norm(residual, (WIDTH,), weight, 1e-5)

    what = f"RMS norm + residual, {tokens} x {WIDTH}"
    found = [
        Case(
            what=what,
            who="tandem",
            run=lambda: rms_norm(x, weight, 1e-5, residual),
            moved_bytes=4 * x.nbytes,
        ),
        Case(what=what, who="torch", run=two_kernels, moved_bytes=4 * x.nbytes, note="not fused"),
    ]
    found += _of_flashinfer(what, partial(flashinfer_rival.add_norm, x, residual, weight), 4 * x.nbytes)
    what, moved = f"RMS norm to int8, {tokens} x {WIDTH}", x.nbytes * 3 // 2
    in_torch = lambda: quantize_rows_reference(torch_rms_norm(x, (WIDTH,), weight, 1e-5))  # noqa: E731
    run_int8 = lambda: rms_norm_int8(x, weight, 1e-5)  # noqa: E731
    return [
        *found,
        Case(what=what, who="tandem", run=run_int8, moved_bytes=moved),
        *_of_torch(what, in_torch, moved, tokens),
    ]


def _of_flashinfer(what: str, make: Callable[[], Callable[[], object]], moved_bytes: int) -> list[Case]:
    if not flashinfer_rival.is_here():
        return []
    return [Case(what=what, who="FlashInfer", run=library(make), moved_bytes=moved_bytes, late=LATE)]


def _of_torch(what: str, run: Callable[[], object], moved_bytes: int, tokens: int) -> list[Case]:
    """Operations one after another, and what torch compiles of them on a GPU: for some seconds each, so at one size."""
    found = [Case(what=what, who="torch", run=run, moved_bytes=moved_bytes, note="not fused")]
    if tokens == TOKENS[-1] and torch.cuda.is_available():
        theirs = compiled(run)
        found.append(Case(what=what, who="torch, compiled", run=theirs, moved_bytes=moved_bytes, late=LAST))
    return found


def _activation(tokens: int, device: torch.device) -> list[Case]:
    x = torch.randn(tokens, 2 * MLP, device=device, dtype=DTYPE)
    _close(activation(x, "silu", gated=True), silu(x[:, :MLP]) * x[:, MLP:])
    what, moved = f"SiLU x up, {tokens} x {MLP}", x.nbytes * 3 // 2
    found = [
        Case(what=what, who="tandem", run=lambda: activation(x, "silu", gated=True), moved_bytes=moved),
        Case(
            what=what,
            who="torch",
            run=lambda: silu(x[:, :MLP]) * x[:, MLP:],
            moved_bytes=moved,
            note="not fused",
        ),
    ]
    found += _of_flashinfer(what, partial(flashinfer_rival.silu_mul, x), moved)
    what, moved = f"SiLU x up to int8, {tokens} x {MLP}", x.nbytes * 5 // 4
    run_int8 = lambda: activation_int8(x, "silu", gated=True)  # noqa: E731
    in_torch = lambda: quantize_rows_reference(silu(x[:, :MLP]) * x[:, MLP:])  # noqa: E731
    return [
        *found,
        Case(what=what, who="tandem", run=run_int8, moved_bytes=moved),
        *_of_torch(what, in_torch, moved, tokens),
    ]


def _kv_write(tokens: int, device: torch.device) -> list[Case]:
    x = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device, dtype=DTYPE)
    q, k, v = x[:, :HEADS], x[:, HEADS : HEADS + KV_HEADS], x[:, HEADS + KV_HEADS :]
    frequencies = 10_000.0 ** -(torch.arange(HEAD_DIM // 2, device=device) / (HEAD_DIM // 2))
    cos, sin = rotary_tables(torch.arange(tokens, device=device), frequencies)
    count = -(-tokens // 16)
    layer = torch.zeros(count + 8, 2, KV_HEADS, 16, HEAD_DIM, device=device, dtype=DTYPE)
    table = torch.randperm(count, device=device)
    blocks = table.repeat_interleave(16)[:tokens]
    slots = torch.arange(tokens, device=device) % 16

    def in_torch() -> torch.Tensor:
        layer.permute(0, 3, 1, 2, 4).index_put_((blocks, slots), torch.stack((rotary_cpu(k, cos, sin).to(DTYPE), v), 1))
        return rotary_cpu(q, cos, sin).to(DTYPE)

    expected = in_torch()
    written = layer.clone()
    layer.zero_()
    _close(kv_write(q, k, v, (cos, sin), layer, blocks, slots), expected)
    _close(layer, written)
    what, moved = f"rotary + KV write, {tokens} tokens", 2 * x.nbytes + cos.nbytes + sin.nbytes

    def of_flashinfer() -> Callable[[], object]:
        angles = torch.arange(tokens, device=device)[:, None] * frequencies
        wide_q, wide_k = q.clone(), k.clone()  # rotated where they are
        run = flashinfer_rival.rotary_and_write(wide_q, wide_k, v, angles, layer.zero_(), table)
        run()
        _close(wide_q, expected)
        _close(layer, written)
        return run

    return [
        Case(
            what=what,
            who="tandem",
            run=lambda: kv_write(q, k, v, (cos, sin), layer, blocks, slots),
            moved_bytes=moved,
        ),
        Case(what=what, who="torch", run=in_torch, moved_bytes=moved, note="not fused"),
        *_of_flashinfer(what, of_flashinfer, moved),
    ]


def _gather(device: torch.device) -> list[Case]:
    count = HANDED_TOKENS // 16
    kv = torch.randn(2 * count, LAYERS, 2, KV_HEADS, 16, HEAD_DIM, device=device, dtype=DTYPE)
    ids = torch.randperm(2 * count, device=device)[:count]
    packed = gather_blocks(kv, ids)
    assert torch.equal(packed, kv[ids])
    what, moved = f"gather of KV, {HANDED_TOKENS} tokens of {LAYERS} layers", 2 * packed.nbytes
    return [
        Case(what=what, who="tandem", run=lambda: gather_blocks(kv, ids, packed), moved_bytes=moved),
        Case(what=what, who="torch", run=lambda: torch.index_select(kv, 0, ids, out=packed), moved_bytes=moved),
    ]


def _scatter(device: torch.device) -> list[Case]:
    count = HANDED_TOKENS // 16
    packed = torch.randn(count, LAYERS, 2, KV_HEADS, 16, HEAD_DIM, device=device, dtype=DTYPE)
    kv = torch.zeros(2 * count, *packed.shape[1:], device=device, dtype=DTYPE)
    ids = torch.randperm(2 * count, device=device)[:count]
    scatter_blocks(packed, kv, ids)
    assert torch.equal(kv[ids], packed)
    what, moved = f"scatter of KV, {HANDED_TOKENS} tokens of {LAYERS} layers", 2 * packed.nbytes
    return [
        Case(what=what, who="tandem", run=lambda: scatter_blocks(packed, kv, ids), moved_bytes=moved),
        Case(what=what, who="torch", run=lambda: kv.index_copy_(0, ids, packed), moved_bytes=moved),
    ]


def _copy(device: torch.device) -> list[Case]:
    count = HANDED_TOKENS // 16
    source = torch.randn(count, LAYERS, 2, KV_HEADS, 16, HEAD_DIM, device=device, dtype=DTYPE)
    target = torch.zeros_like(source)
    source_ids, target_ids = (torch.randperm(count, device=device) for _ in range(2))
    copy_blocks(source, target, source_ids, target_ids)
    assert torch.equal(target[target_ids], source[source_ids])
    what, moved = f"copy of KV blocks, {HANDED_TOKENS} tokens of {LAYERS} layers", 2 * source.nbytes
    run = lambda: copy_blocks(source, target, source_ids, target_ids)  # noqa: E731
    in_torch = lambda: target.index_copy_(0, target_ids, source.index_select(0, source_ids))  # noqa: E731
    return [
        Case(what=what, who="tandem", run=run, moved_bytes=moved),
        Case(what=what, who="torch", run=in_torch, moved_bytes=moved, note="not fused"),
    ]


def _repack(device: torch.device) -> list[Case]:
    """From a worker that has half of the heads in blocks of 16 to one that has all of them in blocks of 32."""
    count = HANDED_TOKENS // 16
    source = torch.randn(count, LAYERS, 2, KV_HEADS // 2, 16, HEAD_DIM, device=device, dtype=DTYPE)
    target = torch.zeros(count // 2, LAYERS, 2, KV_HEADS, 32, HEAD_DIM, device=device, dtype=DTYPE)
    ids = torch.arange(count, device=device)
    part = Part(num_layers=LAYERS, num_heads=KV_HEADS // 2, target_head=KV_HEADS // 2, num_tokens=HANDED_TOKENS)

    def in_torch() -> None:
        pairs = source.view(count // 2, 2, LAYERS, 2, KV_HEADS // 2, 16, HEAD_DIM).permute(0, 2, 3, 4, 1, 5, 6)
        half = target[:, :, :, KV_HEADS // 2 :].view(count // 2, LAYERS, 2, KV_HEADS // 2, 2, 16, HEAD_DIM)
        half.copy_(pairs)

    in_torch()
    expected = target.clone()
    repack(source, target.zero_(), ids, ids, part)
    assert torch.equal(target, expected)
    what = f"repack TP 2 -> 1, blocks of 16 -> 32, {HANDED_TOKENS} tokens"
    run = lambda: repack(source, target, ids, ids, part)  # noqa: E731
    return [
        Case(what=what, who="tandem", run=run, moved_bytes=2 * source.nbytes),
        Case(what=what, who="torch", run=in_torch, moved_bytes=2 * source.nbytes, note="a strided copy"),
    ]


def _quantize(tokens: int, device: torch.device) -> list[Case]:
    x = torch.randn(tokens, WIDTH, device=device, dtype=DTYPE)
    for mine, theirs in zip(quantize_rows(x), quantize_rows_reference(x), strict=True):
        assert torch.equal(mine, theirs)
    what, moved = f"rows to int8, {tokens} x {WIDTH}", x.nbytes * 3 // 2
    in_torch = lambda: quantize_rows_reference(x)  # noqa: E731
    run = lambda: quantize_rows(x)  # noqa: E731
    return [
        Case(what=what, who="tandem", run=run, moved_bytes=moved),
        *_of_torch(what, in_torch, moved, tokens),
    ]


def _layer_norm(tokens: int, device: torch.device) -> list[Case]:
    x, residual = (torch.randn(tokens, WIDTH, device=device, dtype=DTYPE) for _ in range(2))
    weight, bias = (torch.randn(WIDTH, device=device, dtype=DTYPE) for _ in range(2))
    in_torch = lambda: torch_layer_norm(x, (WIDTH,), weight, bias)  # noqa: E731
    _close(layer_norm(x, weight, bias, 1e-5), in_torch())
    plain, fused = f"layer norm, {tokens} x {WIDTH}", f"layer norm + residual, {tokens} x {WIDTH}"
    two_kernels = lambda: torch_layer_norm(residual.add_(x), (WIDTH,), weight, bias)  # noqa: E731
    return [
        Case(what=plain, who="tandem", run=lambda: layer_norm(x, weight, bias, 1e-5), moved_bytes=2 * x.nbytes),
        Case(what=plain, who="torch", run=in_torch, moved_bytes=2 * x.nbytes),
        Case(
            what=fused,
            who="tandem",
            run=lambda: layer_norm(x, weight, bias, 1e-5, residual),
            moved_bytes=4 * x.nbytes,
        ),
        *_of_torch(fused, two_kernels, 4 * x.nbytes, tokens),
    ]


def _rotary(tokens: int, device: torch.device) -> list[Case]:
    """Of queries and keys, each a launch."""
    q, k = (torch.randn(tokens, heads, HEAD_DIM, device=device, dtype=DTYPE) for heads in (HEADS, KV_HEADS))
    frequencies = 10_000.0 ** -(torch.arange(HEAD_DIM // 2, device=device) / (HEAD_DIM // 2))
    positions = torch.arange(tokens, device=device)
    cos, sin = rotary_tables(positions, frequencies)
    run = lambda: (rotary(q, cos, sin), rotary(k, cos, sin))  # noqa: E731
    in_torch = lambda: [rotary_cpu(x, cos, sin).to(DTYPE) for x in (q, k)]  # noqa: E731
    expected = in_torch()
    for mine, theirs in zip(run(), expected, strict=True):
        _close(mine, theirs)
    what, moved = f"rotary of q and k, {tokens} tokens", 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    found = [
        Case(what=what, who="tandem", run=run, moved_bytes=moved),
        Case(what=what, who="torch", run=in_torch, moved_bytes=moved, note="not fused"),
    ]

    def of_flashinfer() -> Callable[[], object]:
        theirs = flashinfer_rival.rotary(q, k, positions, positions[:, None] * frequencies)
        for rotated, known in zip(theirs(), expected, strict=True):
            _close(rotated.view_as(known), known)
        return theirs

    return [*found, *_of_flashinfer(what, of_flashinfer, moved)]
