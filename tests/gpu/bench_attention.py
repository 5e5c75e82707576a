"""Attention over paged KV against `scaled_dot_product_attention` (on keys and values that lie dense) and FlashInfer.

Llama-3.1-8B's layer: 32 query heads, 8 kv heads, head dim 128. Bytes are those that must move at least: keys, values,
queries and results once; prefill's note tells what its tiles move, caches included, and what standard attention would.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from measure import Case, time_s
from tandem.kernels.gpu import decode_attention as decode
from tandem.kernels.gpu import prefill_attention as prefill
from tandem.kernels.gpu.attend import PLAIN, Tiling, architecture, form_of
from tandem.kernels.paged_attention import AttentionRow, AttentionShape
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

DTYPE = torch.bfloat16
PREFILLS = [((0, 2048),), ((0, 8192),), ((0, 1024),) * 8, ((6144, 2048),), ((0, 32768),)]
DECODES = [(1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 8192), (8, 8192), (32, 8192), (128, 8192), (1, 131_072)]
_WORKSPACE_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Setting:
    """One layer of random KV with its blocks scattered, and queries."""

    shape: AttentionShape
    rows: tuple[AttentionRow, ...]
    q: torch.Tensor
    layer: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def make(cls, stretches: Sequence[tuple[int, int]], shape: AttentionShape, device: torch.device) -> Setting:
        """Rows of (start, length)."""
        counts = [-(-(start + length) // shape.block_size) for start, length in stretches]
        ids = torch.randperm(sum(counts))
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        rows, offset, used = [], 0, 0
        for index, ((start, length), count) in enumerate(zip(stretches, counts, strict=True)):
            tables[index, :count] = ids[used : used + count]
            rows.append(AttentionRow(offset, start, length, []))
            offset, used = offset + length, used + count
        extent = (sum(counts), 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
        layer = torch.randn(extent, device=device, dtype=DTYPE)
        q = torch.randn(offset, shape.num_heads, shape.head_dim, device=device, dtype=DTYPE)
        return cls(shape, tuple(rows), q, layer, tables.to(device))

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, K, context, D] of rows of one length."""
        context = self.rows[0].start + self.rows[0].length
        gathered = self.layer[self.tables.long()]  # [rows, blocks, 2, K, S, D]
        k, v = gathered.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[..., :context, :].contiguous()
        return k, v

    def narrow(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer in int8 or float8, with its scales."""
        largest = self.layer.abs().amax(dim=(0, 3, 4)).float()
        scales = largest / (127.0 if dtype == torch.int8 else 448.0)
        scaled = self.layer / scales[None, :, :, None, None].to(DTYPE)
        return (scaled.round().clamp(-127, 127) if dtype == torch.int8 else scaled.clamp(-448, 448)).to(dtype), scales


def held(
    run: Callable[[], torch.Tensor], expected: torch.Tensor, tolerance: float = 0.02
) -> Callable[[], torch.Tensor]:
    """`run`, once it has been compared: no time is told of what computes something else."""
    torch.testing.assert_close(run().reshape(expected.shape).float(), expected.float(), rtol=tolerance, atol=tolerance)
    return run


def prefill_cases(given: Setting) -> list[Case]:
    """One ragged batch of equal stretches."""
    shape, count = given.shape, len(given.rows)
    start, length = given.rows[0].start, given.rows[0].length
    cut = prefill.tiling(shape.head_dim, DTYPE, PLAIN, architecture(given.q.device))
    plan = prefill.plan_prefill(given.rows, shape, cut)
    here = plan.on(given.q.device)
    k, v = given.dense()
    q = given.q.view(count, length, shape.num_heads, -1).transpose(1, 2)
    mask = None if start == 0 else causal_lower_right(length, start + length)

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    expected = dense().transpose(1, 2)
    pairs = sum(row.length * row.start + row.length * (row.length + 1) // 2 for row in given.rows)
    tiled, standard = prefill.moved_bytes(plan, shape, 2), prefill.standard_bytes(plan, shape, 2)
    common = {
        "what": f"prefill {count} x {length} tokens behind {start}",
        "moved_bytes": 2 * (2 * given.q.numel() + k.numel() + v.numel()),
        "operations": 4 * pairs * shape.num_heads * shape.head_dim,
    }

    def ours() -> torch.Tensor:
        return prefill.prefill_attention(given.q, given.layer, given.tables, here, shape)

    note = f"tiles move {tiled / 1e9:.2f} GB, standard attention {standard / 1e9:.2f}"
    cases = [
        Case(who="tandem", run=held(ours, expected), note=note, **common),
        Case(who="sdpa, dense", run=dense, **common),
    ]
    if library := flashinfer_prefill(given):
        cases.append(Case(who="flashinfer", run=held(library, expected), **common))
    return cases


def decode_cases(given: Setting) -> list[Case]:
    """One query each at the end of equal contexts; then the same over narrow memories."""
    shape, device = given.shape, given.q.device
    lengths = [row.start + 1 for row in given.rows]
    k, v = given.dense()

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(given.q[:, :, None], k, v, enable_gqa=True)

    expected = dense()[:, :, 0]
    what = f"decode {len(lengths)} x {lengths[0]} context, blocks of {shape.block_size}"
    plain_bytes, narrow_bytes = decode.moved_bytes(lengths, shape, 2), decode.moved_bytes(lengths, shape, 2, 1)

    def ours(layer: torch.Tensor, scales: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        group = shape.num_heads // shape.num_kv_heads
        cut = decode.tiling(group, shape.head_dim, DTYPE, form_of(layer, DTYPE), architecture(device))
        plan = decode.plan_decode(lengths, shape, cut, decode.multiprocessors(device)).on(device)
        return lambda: decode.decode_attention(given.q, layer, given.tables, plan, shape, scales_2K=scales)

    cases = [
        Case(what=what, who="tandem", run=held(ours(given.layer), expected), moved_bytes=plain_bytes),
        Case(what=what, who="sdpa, dense", run=dense, moved_bytes=plain_bytes),
    ]
    if library := flashinfer_decode(given):
        cases.append(Case(what=what, who="flashinfer", run=held(library, expected), moved_bytes=plain_bytes))
    if len(lengths) >= 32:
        for dtype in (torch.int8, torch.float8_e4m3fn):
            run = held(ours(*given.narrow(dtype)), expected, 0.1)
            cases.append(Case(what=what, who=f"tandem, {str(dtype)[6:]} KV", run=run, moved_bytes=narrow_bytes))
    return cases


def _pages(given: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's page table of rows of one length: first pages, pages, slots used of the last ones."""
    count, context = len(given.rows), given.rows[0].start + given.rows[0].length
    blocks = given.tables.shape[1]
    firsts = torch.arange(count + 1, dtype=torch.int32, device=given.q.device) * blocks
    last = torch.full(
        (count,), context - (blocks - 1) * given.shape.block_size, dtype=torch.int32, device=firsts.device
    )
    return firsts, given.tables.flatten(), last


def flashinfer_prefill(given: Setting) -> Callable[[], torch.Tensor] | None:
    """FlashInfer over the same memory, whose layout it calls HND; None where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    library, shape = importlib.import_module("flashinfer"), given.shape
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=given.q.device)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    starts = torch.tensor([row.offset for row in given.rows] + [len(given.q)], dtype=torch.int32, device=given.q.device)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)
    wrapper.plan(starts, *_pages(given), *heads, causal=True, q_data_type=DTYPE, kv_data_type=DTYPE)
    return lambda: wrapper.run(given.q, given.layer)


def flashinfer_decode(given: Setting) -> Callable[[], torch.Tensor] | None:
    """As `flashinfer_prefill`; with matrix units, which it advises for grouped heads."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    library, shape = importlib.import_module("flashinfer"), given.shape
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=given.q.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)
    wrapper.plan(*_pages(given), *heads, q_data_type=DTYPE, kv_data_type=DTYPE)
    return lambda: wrapper.run(given.q, given.layer)


def llama(block_size: int = 16) -> AttentionShape:
    """A layer of Llama-3.1-8B."""
    return AttentionShape(32, 8, 128, block_size)


def cases(device: torch.device) -> Iterator[Callable[[], list[Case]]]:
    """Decode first: it is what most time goes to."""
    for batch, context in DECODES:
        yield lambda batch=batch, context=context: decode_cases(  # type: ignore[misc]
            Setting.make([(context - 1, 1)] * batch, llama(), device)
        )
    yield lambda: decode_cases(Setting.make([(8191, 1)] * 32, llama(64), device))
    for stretches in PREFILLS:
        yield lambda stretches=stretches: prefill_cases(Setting.make(stretches, llama(), device))  # type: ignore[misc]


def tune(device: torch.device) -> Iterator[str]:
    """Times other tilings at two shapes each; lines for people, the best last. The kernels' `tiling` holds the pick."""
    for batch, context in ((32, 8192), (1, 131_072)):
        given = Setting.make([(context - 1, 1)] * batch, llama(), device)
        cuts = itertools.starmap(Tiling, itertools.product((16,), (32, 64, 128), (4, 8), (3, 5, 7)))
        yield from _timed(f"decode {batch} x {context}", _decoding(given), cuts)
    for length in (2048, 8192):
        given = Setting.make([(0, length)], llama(), device)
        cuts = itertools.starmap(Tiling, itertools.product((64, 128), (32, 64, 128), (4, 8), (3, 5, 7)))
        yield from _timed(f"prefill {length}", _prefilling(given), cuts)


def _decoding(given: Setting) -> Callable[[Tiling], Callable[[], torch.Tensor]]:
    lengths, device = [row.start + 1 for row in given.rows], given.q.device

    def make(cut: Tiling) -> Callable[[], torch.Tensor]:
        plan = decode.plan_decode(lengths, given.shape, cut, decode.multiprocessors(device)).on(device)
        return lambda: decode.decode_attention(given.q, given.layer, given.tables, plan, given.shape)

    return make


def _prefilling(given: Setting) -> Callable[[Tiling], Callable[[], torch.Tensor]]:
    def make(cut: Tiling) -> Callable[[], torch.Tensor]:
        plan = prefill.plan_prefill(given.rows, given.shape, cut).on(given.q.device)
        return lambda: prefill.prefill_attention(given.q, given.layer, given.tables, plan, given.shape)

    return make


def _timed(what: str, make: Callable[[Tiling], Callable[[], torch.Tensor]], cuts: Iterator[Tiling]) -> Iterator[str]:
    taken: list[tuple[float, Tiling]] = []
    for cut in cuts:
        try:
            taken.append((time_s(make(cut), repetitions=10), cut))
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory than the device has
        yield f"{what} {cut}: {taken[-1][0] * 1e6:.1f} µs"
    best_s, best = min(taken, key=lambda entry: entry[0])
    yield f"{what} best: {best}, {best_s * 1e6:.1f} µs"
