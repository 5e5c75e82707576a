"""From a `StepPlan` to what the kernels read: tokens, positions, block tables, work lists, on the device.

A plan whose rows all compute one token and sample becomes a decode step of a padded number of rows: every tensor has
the size of that number and the address of the step before, so that a captured graph runs it. Padding rows have length
0 and no block: attention skips them, nothing of them is written. Any other plan is laid out exactly, row by row.

A row whose token is still being drawn (`plan.DRAWN`) names the place of its draw in the step before: the token is
looked up on the device.

Legend: T tokens, B decode rows, R rows that sample, P padded rows, W columns of the block tables.
"""
# ruff: noqa: N806

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....kernels.gpu_plans.decode import DecodePlan, most_pieces, plan_decode
from ....kernels.gpu_plans.decode import tiling as decode_tiling
from ....kernels.gpu_plans.prefill import PrefillPlan, plan_prefill
from ....kernels.gpu_plans.prefill import tiling as prefill_tiling
from ....kernels.gpu_plans.tiling import PLAIN, architecture, multiprocessors
from ....kernels.paged_attention import AttentionRow, AttentionShape
from ...models.config import ModelConfig
from ..plan import DRAWN, StepPlan, StepRow
from .model import DeviceBatch
from .staging import ALIGNMENT_BYTES, Place, Staging

Ids = NDArray[np.int32]
_MOST_TABLES_BYTES = 4 * 2**20
"""Of block tables beside prompts, that there is room for at the start."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How large steps get."""

    rows: int
    """Of a decode step, at most; larger ones are computed like prompts."""
    tokens: int
    """Of a step: what is made room for at the start. Longer ones make room when they come."""
    table_width: int
    """Blocks of a sequence, at most."""


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A plan on the device."""

    batch: DeviceBatch
    padded_rows: int | None
    """P of a decode step; None: the plan is none."""


class StepInputs:
    """The buffers of one device and what fills them. One thread; everything is queued on the current stream."""

    def __init__(
        self,
        config: ModelConfig,
        shape: AttentionShape,
        dtype: torch.dtype,
        device: torch.device,
        limits: Limits,
        *,
        num_blocks: int,
        turns: int,
        form: int = PLAIN,
    ) -> None:
        """`turns`: plans under way at a time; `form`: how the KV memory holds numbers (`gpu_plans.tiling.form_of`)."""
        self.limits = limits
        self._config = config
        self._shape = shape
        self._device = device
        self.num_blocks = num_blocks
        """That a block table may name."""
        self._turns = turns
        group = shape.num_heads // shape.num_kv_heads
        arch = architecture(device)
        self._decode_cut = decode_tiling(group, shape.head_dim, dtype, form, arch)
        self._prefill_cut = prefill_tiling(shape.head_dim, dtype, form, arch)
        self._multiprocessors = multiprocessors(device)
        self._tables = _BlockTables(limits.rows)
        self._static_tables = torch.zeros(limits.rows, limits.table_width, dtype=torch.int32, device=device)
        self._batches: dict[int, DeviceBatch] = {}
        self._decode = Staging(device, self._decode_bytes(limits.rows), turns)
        self._decode_places = self._parts_of_turn().places  # the same at every turn
        tables_bytes = min(4 * limits.rows * limits.table_width, _MOST_TABLES_BYTES)
        self._any = Staging(device, self._any_bytes(limits.tokens, limits.tokens) + tables_bytes, turns)

    def most_pieces(self, rows: int) -> int:
        """Length of decode attention's work list in a step of so many padded rows."""
        return most_pieces(rows, self._shape.num_kv_heads, self._multiprocessors)

    def lay_out(
        self,
        plan: StepPlan,
        drawn_at: Mapping[str, int],
        padded: Callable[[int], int],
    ) -> LaidOut:
        """Gathers a plan's inputs and starts their copy. `drawn_at`: where among the draws of the step before
        each sequence's token is; `padded`: rows -> P.

        Raises ValueError for a row that is malformed for this model and KV memory.
        """
        flat = _flatten(plan.rows, drawn_at)
        tables = self._tables.gather(plan.rows, flat.ends, self._shape.block_size, self.num_blocks)
        self._check(plan.rows, flat)
        if flat.decode_rows == len(plan.rows) <= self.limits.rows and all(row.sample for row in plan.rows):
            return self._lay_out_decode(plan.rows, flat, tables, padded(len(plan.rows)))
        return self._lay_out_any(plan.rows, flat, tables)

    def static_batch(self, rows: int) -> DeviceBatch:
        """What every decode step of `rows` padded rows reads: the same tensors each time."""
        if rows not in self._batches:
            staging = self._decode
            here = {name: staging.tensor(place) for name, place in self._decode_places.items()}
            by_row = {name: tensor[:rows] for name, tensor in here.items()}
            work = here["work"][: self.most_pieces(rows)]
            self._batches[rows] = DeviceBatch(
                tokens_T=by_row["tokens"],
                sources_T=by_row["sources"],
                positions_T=by_row["positions"],
                blocks_T=by_row["blocks"],
                slots_T=by_row["slots"],
                decode_rows=rows,
                decode=DecodePlan(by_row["lengths"], work, by_row["spans"], True, self._decode_cut),
                decode_tables=self._static_tables[:rows],
                prefill=None,
                prefill_tables=self._static_tables[:0],
                sampled_R=None,
            )
        return self._batches[rows]

    def clear(self) -> None:
        """Makes a decode step of every size one of padding rows alone."""
        self._parts_of_turn().clear()
        self._decode.upload()

    def _parts_of_turn(self) -> _DecodeParts:
        self._decode.begin()
        return _DecodeParts.make(self._decode, self.limits.rows, self.most_pieces(self.limits.rows))

    def _lay_out_decode(self, rows: Sequence[StepRow], flat: _Flat, tables: Ids, padded_rows: int) -> LaidOut:
        batch = self.static_batch(padded_rows)
        count, size = len(rows), self._shape.block_size
        staging, parts = self._decode, self._parts_of_turn()
        parts.clear()
        parts.tokens[:count], parts.sources[:count], parts.positions[:count] = flat.tokens, flat.sources, flat.starts
        parts.blocks[:count] = tables[np.arange(count), flat.starts // size]
        parts.slots[:count] = flat.starts % size
        lengths = [*flat.ends.tolist(), *[0] * (padded_rows - count)]
        pieces = self.most_pieces(padded_rows)
        cut = plan_decode(lengths, self._shape, self._decode_cut, self._multiprocessors, pieces)
        parts.lengths[:padded_rows], parts.work[:pieces], parts.spans[:padded_rows] = (
            tensor.numpy() for tensor in (cut.lengths_B, cut.work_W4, cut.spans_B2)
        )
        width = int((flat.ends.max() + size - 1) // size)
        compact = staging.put(tables[:, :width])
        staging.upload()
        # A strided copy, from where tables of this step's width lie to where every step's do.
        self._static_tables[:count, :width].copy_(staging.tensor(compact))
        return LaidOut(batch, padded_rows)

    def _lay_out_any(self, rows: Sequence[StepRow], flat: _Flat, tables: Ids) -> LaidOut:
        size, decoding = self._shape.block_size, flat.decode_rows
        positions = np.concatenate([np.arange(start, end) for start, end in zip(flat.starts, flat.ends, strict=True)])
        owners = np.repeat(np.arange(len(rows)), flat.ends - flat.starts)
        offsets = np.cumsum(flat.ends - flat.starts)
        needed = self._any_bytes(len(flat.tokens), len(rows)) + tables.nbytes
        if needed > self._any.nbytes:
            self._any = Staging(self._device, 2 * needed, self._turns)
        staging = self._any
        staging.begin()
        put: dict[str, Place] = {
            "tokens_T": staging.put(flat.tokens),
            "sources_T": staging.put(flat.sources),
            "positions_T": staging.put(positions.astype(np.int32)),
            "blocks_T": staging.put(tables[owners, positions // size]),
            "slots_T": staging.put((positions % size).astype(np.int32)),
            "sampled_R": staging.put(
                np.array([end - 1 for row, end in zip(rows, offsets, strict=True) if row.sample is not None], np.int32)
            ),
        }
        decode = prefill = None
        if decoding:
            decode = plan_decode(flat.ends[:decoding].tolist(), self._shape, self._decode_cut, self._multiprocessors)
            decode_at = [staging.put(t.numpy()) for t in (decode.lengths_B, decode.work_W4, decode.spans_B2)]
        if decoding < len(rows):
            stretches = [
                AttentionRow(int(end - len(row.token_ids)), row.start, len(row.token_ids), ())
                for row, end in zip(rows[decoding:], offsets[decoding:], strict=True)
            ]
            prefill = plan_prefill(stretches, self._shape, self._prefill_cut)
            prefill_at = [staging.put(t.numpy()) for t in (prefill.rows_R3, prefill.tiles_I2)]
        # Apart: kernels are compiled anew for a table that begins anywhere.
        decode_table, prefill_table = staging.put(tables[:decoding]), staging.put(tables[decoding:])
        staging.upload()
        here: dict[str, Any] = {name: staging.tensor(place) for name, place in put.items()}
        if decode is not None:
            lengths, work, spans = map(staging.tensor, decode_at)
            decode = DecodePlan(lengths, work, spans, decode.merges, decode.tiling)
        if prefill is not None:
            stretches_R3, tiles = map(staging.tensor, prefill_at)
            prefill = PrefillPlan(stretches_R3, tiles, prefill.tiling)
        batch = DeviceBatch(
            **here,
            decode_rows=decoding,
            decode=decode,
            decode_tables=staging.tensor(decode_table),
            prefill=prefill,
            prefill_tables=staging.tensor(prefill_table),
        )
        return LaidOut(batch, None)

    def _check(self, rows: Sequence[StepRow], flat: _Flat) -> None:
        """ValueError naming the row that is malformed."""
        config = self._config
        longest = min(config.max_model_len, self.limits.table_width * self._shape.block_size)
        wrong = (flat.tokens < 0) | (flat.tokens >= config.vocab_size)
        if wrong.any():
            owner = rows[int(np.searchsorted(np.cumsum(flat.ends - flat.starts), np.argmax(wrong), side="right"))]
            raise ValueError(f"row {owner.seq_id!r}: token_ids are not all in 0…{config.vocab_size - 1}")
        for row, end in zip(rows, flat.ends.tolist(), strict=True):
            if not row.token_ids or row.start < 0 or end > longest:
                raise ValueError(
                    f"row {row.seq_id!r}: positions {row.start}…{end - 1} are empty or not in 0…{longest - 1}"
                )

    def _decode_bytes(self, rows: int) -> int:
        integers = 8 * rows + 4 * self.most_pieces(rows) + rows * self.limits.table_width
        return 4 * integers + 32 * ALIGNMENT_BYTES

    def _any_bytes(self, tokens: int, rows: int) -> int:
        """Without block tables."""
        integers = 8 * tokens + 10 * rows + 4 * self.most_pieces(rows)
        return 4 * integers + 32 * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class _Flat:
    """A plan's rows, flattened."""

    tokens: Ids
    """[T]; 0 where a token is still being drawn."""
    sources: Ids
    """[T] where in the draws of the step before a token is; -1: it is given."""
    starts: NDArray[np.int64]
    """By row."""
    ends: NDArray[np.int64]
    decode_rows: int
    """Leading rows of one token."""


def _flatten(rows: Sequence[StepRow], drawn_at: Mapping[str, int]) -> _Flat:
    """ValueError for a row that waits for a token that nobody draws."""
    tokens: list[int] = []
    waiting: list[tuple[int, int]] = []
    decoding = 0
    for index, row in enumerate(rows):
        ids = row.token_ids
        if len(ids) == 1:
            decoding += decoding == index
            if ids[0] == DRAWN:
                if row.seq_id not in drawn_at:
                    raise ValueError(
                        f"row {row.seq_id!r}: its token is to be drawn by the plan before, which has not it"
                    )
                waiting.append((len(tokens), drawn_at[row.seq_id]))
                ids = (0,)
        tokens.extend(ids)
    sources = np.full(len(tokens), -1, np.int32)
    for at, source in waiting:
        sources[at] = source
    starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
    lengths = np.fromiter((len(row.token_ids) for row in rows), np.int64, len(rows))
    return _Flat(np.array(tokens, np.int32), sources, starts, starts + lengths, decoding)


@dataclass(frozen=True, slots=True)
class _DecodeParts:
    """A decode step's arrays in host memory."""

    tokens: Ids
    sources: Ids
    positions: Ids
    blocks: Ids
    slots: Ids
    lengths: Ids
    work: Ids
    spans: Ids
    places: Mapping[str, Place] = dataclasses.field(default_factory=dict)

    @classmethod
    def make(cls, staging: Staging, rows: int, pieces: int) -> _DecodeParts:
        """Always of the most rows: a step of fewer reads the first of each."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("tokens", "sources", "positions", "blocks", "slots", "lengths"), (rows,)
        )
        shapes |= {"work": (pieces, 4), "spans": (rows, 2)}
        made = {name: staging.room(shape, np.int32) for name, shape in shapes.items()}
        return cls(**{name: array for name, (_, array) in made.items()}, places={n: p for n, (p, _) in made.items()})

    def clear(self) -> None:
        """Padding rows only."""
        for array in (self.tokens, self.positions, self.slots, self.lengths, self.spans):
            array.fill(0)
        self.spans[:, 1] = 1
        self.work.fill(0)
        for array in (self.sources, self.blocks, self.work[:, 0]):
            array.fill(-1)


class _BlockTables:
    """Block tables as rows of numbers. A sequence's table mostly is what it was a step ago, and a list of numbers costs
    twenty times as much to convert as to compare.
    """

    def __init__(self, rows: int) -> None:
        self._most = 4 * rows + 16
        self._kept: dict[str, tuple[Sequence[int], Ids]] = {}

    def gather(self, rows: Sequence[StepRow], ends: NDArray[np.int64], block_size: int, num_blocks: int) -> Ids:
        """[rows, blocks of the longest], 0 behind a row's own. ValueError for a table that does not hold its row, or
        names a block that is not there.
        """
        counts = [-(-end // block_size) for end in ends.tolist()]
        tables = np.zeros((len(rows), max(counts)), np.int32)
        if len(self._kept) > self._most:
            self._kept.clear()
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if len(row.block_ids) < count:
                raise ValueError(
                    f"row {row.seq_id!r}: {len(row.block_ids)} blocks of {block_size} do not hold {ends[index]} tokens"
                )
            ids = row.block_ids[:count]
            kept = self._kept.get(row.seq_id)
            if kept is None or kept[0] != ids:
                array = np.array(ids, np.int64)
                if array.size and not 0 <= array.min() <= array.max() < num_blocks:
                    raise ValueError(f"row {row.seq_id!r}: block_ids are not all in 0…{num_blocks - 1}")
                kept = self._kept[row.seq_id] = (ids, array.astype(np.int32))
            tables[index, :count] = kept[1]
        return tables
