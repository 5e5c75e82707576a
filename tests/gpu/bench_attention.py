"""Attention over paged KV against `scaled_dot_product_attention` (on keys and values that lie dense) and FlashInfer.

Llama-3.1-8B's layer: 32 query heads, 8 kv heads, head dim 128; then Mistral-7B's window, int8 and float8 KV, other
sizes of blocks. Bytes are those that must move at least: keys, values, queries and results once; prefill's note tells
what its tiles move, caches included, and what standard attention would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import flashinfer_rival
import torch
import triton
from measure import LAST, LATE, Case, library, time_s
from tandem.kernels.gpu.decode_attention import decode_attention
from tandem.kernels.gpu.prefill_attention import prefill_attention
from tandem.kernels.gpu_plans import decode, prefill
from tandem.kernels.gpu_plans.tiling import Tiling, architecture, form_of, multiprocessors
from tandem.kernels.paged_attention import AttentionRow, AttentionShape
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

DTYPE = torch.bfloat16
PREFILLS = [((0, 2048),), ((0, 8192),), ((0, 1024),) * 8, ((6144, 2048),), ((0, 32768),)]
DECODES = [(1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 8192), (8, 8192), (32, 8192), (128, 8192), (1, 131_072)]
VARIED_DECODE, VARIED_PREFILL = ((8191, 1),) * 32, ((6144, 2048),)
"""At which blocks and windows are varied."""
BLOCK_SIZES = (64, 128, 32)
WINDOW = 4096
NARROW = (torch.int8, torch.float8_e4m3fn)


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

    def narrow(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Setting]:
        """The layer in int8 or float8, with its scales (all heads' are alike, because FlashInfer takes one); and what
        that layer then holds.
        """
        largest = self.layer.abs().amax(dim=(0, 2, 3, 4)).float()
        scales = (largest / (127.0 if dtype == torch.int8 else 448.0)).to(DTYPE)[None, :, None, None, None]
        scaled = self.layer / scales
        stored = (scaled.round().clamp(-127, 127) if dtype == torch.int8 else scaled.clamp(-448, 448)).to(dtype)
        wide = replace(self, layer=stored.to(DTYPE) * scales)
        return stored, scales.float().view(2, 1).repeat(1, self.shape.num_kv_heads), wide


def held(
    run: Callable[[], torch.Tensor], expected: torch.Tensor, tolerance: float = 0.02
) -> Callable[[], torch.Tensor]:
    """`run`, once it has been compared: no time is told of what computes something else."""
    torch.testing.assert_close(run().reshape(expected.shape).float(), expected.float(), rtol=tolerance, atol=tolerance)
    return run


def prefill_cases(given: Setting, narrow: bool = False) -> list[Case]:
    """One ragged batch of equal stretches; `narrow`: then the same over narrow memories."""
    shape, count, device = given.shape, len(given.rows), given.q.device
    start, length = given.rows[0].start, given.rows[0].length
    dense = _dense_prefill(given)
    expected = dense().transpose(1, 2)

    def planned(layer: torch.Tensor) -> prefill.PrefillPlan:
        cut = prefill.tiling(shape.head_dim, DTYPE, form_of(layer, DTYPE), architecture(device))
        return prefill.plan_prefill(given.rows, shape, cut)

    def ours(layer: torch.Tensor, scales: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        plan = planned(layer).on(device)
        return lambda: prefill_attention(given.q, layer, given.tables, plan, shape, scales_2K=scales)

    tiled, standard = (moved(planned(given.layer), shape, 2) for moved in (prefill.moved_bytes, prefill.standard_bytes))
    queries, vectors = 2 * 2 * given.q.numel(), count * _seen(given, length) * shape.num_kv_heads * shape.head_dim * 2
    common = {
        "what": f"prefill {count} x {length} tokens behind {start}{_told(shape)}",
        "moved_bytes": queries + 2 * vectors,
        "operations": 4 * _pairs(given) * shape.num_heads * shape.head_dim,
    }
    note = f"tiles move {tiled / 1e9:.2f} GB, standard attention {standard / 1e9:.2f}"
    cases = [
        Case(who="tandem", run=held(ours(given.layer), expected), note=note, **common),
        Case(who="sdpa, dense", run=dense, **common),
    ]
    if flashinfer_rival.is_here():
        run = library(lambda: held(flashinfer_rival.prefill(given, given.layer), expected))
        cases.append(Case(who="flashinfer", run=run, late=_turn(shape), **common))
    for dtype in NARROW if narrow else ():
        layer, scales, wide = given.narrow(dtype)
        known, common["moved_bytes"] = _dense_prefill(wide)().transpose(1, 2), queries + vectors
        mine = held(ours(layer, scales), known)
        cases.append(Case(who=f"tandem, {str(dtype)[6:]} KV", run=mine, **common))
        if flashinfer_rival.is_here() and dtype == torch.float8_e4m3fn:
            theirs = library(partial(_held_narrow, flashinfer_rival.prefill, given, layer, scales, known))
            cases.append(Case(who="flashinfer, float8_e4m3fn KV", run=theirs, late=LAST, **common))
    return cases


def _dense_prefill(given: Setting) -> Callable[[], torch.Tensor]:
    """Torch's, [rows, H, length, D]. With a window, heads are repeated: then there is a kernel that takes a mask."""
    shape, (start, length) = given.shape, (given.rows[0].start, given.rows[0].length)
    k, v = given.dense()
    q = given.q.view(len(given.rows), length, shape.num_heads, -1).transpose(1, 2)
    if shape.window is not None:
        k, v = (x.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1) for x in (k, v))
        seen = torch.ones(length, start + length, dtype=torch.bool, device=q.device)
        seen = seen.tril(start).triu(start - shape.window + 1)
        return lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen)
    mask = None if start == 0 else causal_lower_right(length, start + length)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def _seen(given: Setting, queries: int) -> int:
    """Keys that a row's last so many queries see."""
    context, window = given.rows[0].start + given.rows[0].length, given.shape.window
    return context if window is None else min(context, window + queries - 1)


def _pairs(given: Setting) -> int:
    """Queries times the keys that each sees."""
    window = given.shape.window or 2**62
    return sum(min(position + 1, window) for row in given.rows for position in range(row.start, row.start + row.length))


def _told(shape: AttentionShape) -> str:
    """What of a layer is not as in most cases."""
    window = "" if shape.window is None else f", window {shape.window}"
    return window + ("" if shape.block_size == 16 else f", blocks of {shape.block_size}")


def decode_cases(given: Setting, narrow: bool = False) -> list[Case]:
    """One query each at the end of equal contexts; `narrow`: then the same over narrow memories."""
    shape, device = given.shape, given.q.device
    lengths = [row.start + 1 for row in given.rows]
    dense = _dense_decode(given)
    expected = dense()[:, :, 0]
    what = f"decode {len(lengths)} x {lengths[0]} context{_told(shape)}"
    plain_bytes, narrow_bytes = decode.moved_bytes(lengths, shape, 2), decode.moved_bytes(lengths, shape, 2, 1)

    def ours(layer: torch.Tensor, scales: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        group = shape.num_heads // shape.num_kv_heads
        cut = decode.tiling(group, shape.head_dim, DTYPE, form_of(layer, DTYPE), architecture(device))
        plan = decode.plan_decode(lengths, shape, cut, multiprocessors(device)).on(device)
        return lambda: decode_attention(given.q, layer, given.tables, plan, shape, scales_2K=scales)

    cases = [
        Case(what=what, who="tandem", run=held(ours(given.layer), expected), moved_bytes=plain_bytes),
        Case(what=what, who="sdpa, dense", run=dense, moved_bytes=plain_bytes),
    ]
    if flashinfer_rival.is_here():
        run = library(lambda: held(flashinfer_rival.decode(given, given.layer), expected))
        cases.append(Case(what=what, who="flashinfer", run=run, moved_bytes=plain_bytes, late=_turn(shape)))
    for dtype in NARROW if narrow else ():
        layer, scales, wide = given.narrow(dtype)
        known = _dense_decode(wide)()[:, :, 0]
        mine = held(ours(layer, scales), known)
        cases.append(Case(what=what, who=f"tandem, {str(dtype)[6:]} KV", run=mine, moved_bytes=narrow_bytes))
        if flashinfer_rival.is_here() and dtype == torch.float8_e4m3fn:
            theirs = library(partial(_held_narrow, flashinfer_rival.decode, given, layer, scales, known))
            who = "flashinfer, float8_e4m3fn KV"
            cases.append(Case(what=what, who=who, run=theirs, moved_bytes=narrow_bytes, late=LAST))
    return cases


def _dense_decode(given: Setting) -> Callable[[], torch.Tensor]:
    """Torch's, [rows, H, 1, D], over the keys that are seen."""
    k, v = (x[:, :, -_seen(given, 1) :] for x in given.dense())
    return lambda: scaled_dot_product_attention(given.q[:, :, None], k, v, enable_gqa=True)


def _turn(shape: AttentionShape) -> int:
    """FlashInfer has kernels of their own for windows, which it compiles for the two lines here."""
    return LATE if shape.window is None else LAST


def _held_narrow(
    make: Callable[..., Callable[[], torch.Tensor]],
    given: Setting,
    layer: torch.Tensor,
    scales: torch.Tensor,
    expected: torch.Tensor,
) -> Callable[[], torch.Tensor]:
    return held(make(given, layer, k_scale=float(scales[0, 0]), v_scale=float(scales[1, 0])), expected, 0.05)


def llama(block_size: int = 16, window: int | None = None) -> AttentionShape:
    """A layer of Llama-3.1-8B; with a window, of Mistral-7B."""
    return AttentionShape(32, 8, 128, block_size, window)


def cases(device: torch.device) -> Iterator[Callable[[], list[Case]]]:
    """Decode first: it is what most time goes to. What varies the same comes last."""
    for batch, context in DECODES:
        yield partial(_cases, ((context - 1, 1),) * batch, llama(), device, batch >= 32)
    for stretches in PREFILLS:
        yield partial(_cases, stretches, llama(), device, stretches == ((0, 8192),))
    for shape in (llama(window=WINDOW), *map(llama, BLOCK_SIZES)):
        for stretches in (VARIED_DECODE, VARIED_PREFILL):
            yield partial(_cases, stretches, shape, device)


def _cases(
    stretches: Sequence[tuple[int, int]], shape: AttentionShape, device: torch.device, narrow: bool = False
) -> list[Case]:
    given = Setting.make(stretches, shape, device)
    return decode_cases(given, narrow) if stretches[0][1] == 1 else prefill_cases(given, narrow)


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
        plan = decode.plan_decode(lengths, given.shape, cut, multiprocessors(device)).on(device)
        return lambda: decode_attention(given.q, given.layer, given.tables, plan, given.shape)

    return make


def _prefilling(given: Setting) -> Callable[[Tiling], Callable[[], torch.Tensor]]:
    def make(cut: Tiling) -> Callable[[], torch.Tensor]:
        plan = prefill.plan_prefill(given.rows, given.shape, cut).on(given.q.device)
        return lambda: prefill_attention(given.q, given.layer, given.tables, plan, given.shape)

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
