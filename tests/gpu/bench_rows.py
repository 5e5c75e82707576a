"""What stands between a layer's products: norms, activations, rotary and KV writes, copies of KV blocks, against
torch (its own kernels, or several of them where it has none that is fused) and FlashInfer. Llama-3.1-8B's widths,
bf16. All of it is bound by memory: `of copy` is what counts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Case
from tandem.kernels.gpu.activation import activation, activation_int8
from tandem.kernels.gpu.kv_blocks import Part, gather_blocks, repack
from tandem.kernels.gpu.kv_write import kv_write
from tandem.kernels.gpu.norm import rms_norm, rms_norm_int8
from tandem.kernels.int8 import quantize_rows_reference
from tandem.kernels.rotary import rotary_cpu, rotary_tables
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import silu

DTYPE = torch.bfloat16
TOKENS = (1, 32, 2048)
WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4096, 14336, 32, 8, 128, 32
HANDED_TOKENS = 2048


def cases(device: torch.device) -> Iterator[Callable[[], list[Case]]]:
    """One list a shape and operation."""
    for tokens in TOKENS:
        for make in (_norm, _activation, _kv_write):
            yield partial(make, tokens, device)
    yield partial(_gather, device)
    yield partial(_repack, device)


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
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        y = x.clone()
        found.append(
            Case(
                what=what,
                who="FlashInfer",
                run=lambda: flashinfer.norm.fused_add_rmsnorm(y, residual, weight, 1e-5),
                moved_bytes=4 * x.nbytes,
            )
        )
    what = f"RMS norm to int8, {tokens} x {WIDTH}"
    found += [
        Case(what=what, who="tandem", run=lambda: rms_norm_int8(x, weight, 1e-5), moved_bytes=x.nbytes + x.nbytes // 2),
        Case(
            what=what,
            who="torch",
            run=lambda: quantize_rows_reference(torch_rms_norm(x, (WIDTH,), weight, 1e-5)),
            moved_bytes=x.nbytes + x.nbytes // 2,
            note="not fused",
        ),
    ]
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
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        run = lambda: flashinfer.activation.silu_and_mul(x)  # noqa: E731
        found.append(Case(what=what, who="FlashInfer", run=run, moved_bytes=moved))
    what = f"SiLU x up to int8, {tokens} x {MLP}"
    run_int8 = lambda: activation_int8(x, "silu", gated=True)  # noqa: E731
    found.append(Case(what=what, who="tandem", run=run_int8, moved_bytes=x.nbytes * 5 // 4))
    return found


def _kv_write(tokens: int, device: torch.device) -> list[Case]:
    x = torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device, dtype=DTYPE)
    q, k, v = x[:, :HEADS], x[:, HEADS : HEADS + KV_HEADS], x[:, HEADS + KV_HEADS :]
    frequencies = 10_000.0 ** -(torch.arange(HEAD_DIM // 2, device=device) / (HEAD_DIM // 2))
    cos, sin = rotary_tables(torch.arange(tokens, device=device), frequencies)
    count = -(-tokens // 16)
    layer = torch.zeros(count + 8, 2, KV_HEADS, 16, HEAD_DIM, device=device, dtype=DTYPE)
    blocks = torch.randperm(count, device=device).repeat_interleave(16)[:tokens]
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
    return [
        Case(
            what=what,
            who="tandem",
            run=lambda: kv_write(q, k, v, (cos, sin), layer, blocks, slots),
            moved_bytes=moved,
        ),
        Case(what=what, who="torch", run=in_torch, moved_bytes=moved, note="not fused"),
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
