"""Many decode steps taken together: between two of a scheduler's decisions its running sequences only grow by a token
a step, and a clock that is not the machine's need not stop at each of them.

A run is *quiet* while every step of it would compute one token of each row that decodes and change nothing else of
them: nobody is admitted or preempted, and nobody ends before the last step. A run of one step may have prompts beside
it. The simulator runs on it (`cluster.sim`); a device in real time takes its steps one by one. Both leave the same
lengths, counts and events behind; which of the free blocks a sequence gets may differ.

Rows in lockstep are not looked at one by one: each knows when it joined, and what it has drawn since is added to it
when somebody asks. A run costs what it changes: rows that end, blocks that are full.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

from .block_pool import IntegrityError
from .plan import StepRow
from .sequence import Sequence
from .sequence_kv import SequenceKV

_ORDER = attrgetter("order")


class QuietRun(NamedTuple):
    """What the next steps would be."""

    steps: int
    decode_rows: int
    context_tokens: int
    """Context of the first step's rows, each with the token that it computes; every step adds `decode_rows`."""
    prompts: tuple[StepRow, ...] = ()
    """What else its only step computes."""


class Lockstep:
    """Running sequences that decode, none in an outstanding plan. Their own counts (`Sequence.tokens`, `outputs`,
    `scheduled`, `computed`) are those of the moment at which they were last `settle`d, their blocks are as of now.
    Either all that a scheduler could decode are in it, or none.

        taken  ───────────┬──────────┬──────────┬─────────▶   steps since it was made
        ends   heap       │ row 3    │ row 1    │ row 2       at which a row has drawn its last token
        full   by taken   │ rows 1,3 │ row 2    │             at which a row's blocks are full, again every block_size
    """

    def __init__(self, kv: SequenceKV) -> None:
        self._kv = kv
        self.rows: dict[str, Sequence] = {}
        """Who is in it, by name; read-only for others."""
        self._taken = 0
        self._scheduled = 0
        self._ends: list[tuple[int, int, Sequence]] = []
        self._full: dict[int, list[Sequence]] = {}
        self._written: dict[int, list[Sequence]] = {}
        """By `taken` at which another block is written whole, where a prefix cache wants to hear of it."""
        self._untold: list[Sequence] = []
        self._token_id = 0

    @property
    def known_tokens(self) -> int:
        """Tokens of all rows: their context, each with the token that its next step computes."""
        return self._scheduled + len(self.rows)

    def owed(self, seq: Sequence) -> int:
        """Tokens that `seq` has drawn and that are not added to it yet."""
        return 0 if seq.joined is None else self._taken - seq.joined

    def join(self, seq: Sequence) -> None:
        """`seq` decodes from now on. It holds the blocks of all that is scheduled."""
        taken, size = self._taken, self._kv.pool.block_size
        seq.joined = taken
        self.rows[seq.seq_id] = seq
        self._scheduled += seq.scheduled
        heapq.heappush(self._ends, (taken + seq.last_len - len(seq.tokens), seq.order, seq))
        self._full.setdefault(self._full_at(seq), []).append(seq)
        if self._kv.cache.enabled:
            self._written.setdefault(taken + size - seq.scheduled % size, []).append(seq)
        if not seq.told:
            self._untold.append(seq)

    def leave(self, seq: Sequence) -> None:
        """It goes on alone, or not at all: its counts are right again. Idempotent."""
        if seq.joined is None:
            return
        self.settle(seq)
        size = self._kv.pool.block_size
        del self.rows[seq.seq_id]
        self._scheduled -= seq.scheduled
        _remove(self._full, self._full_at(seq), seq)
        if self._kv.cache.enabled:
            _remove(self._written, self._taken + size - seq.scheduled % size, seq)
        if not seq.told:
            self._untold = [row for row in self._untold if row is not seq]
        seq.joined = None  # its end is passed over when it comes up
        if not self.rows:
            self._ends.clear()

    def dissolve(self) -> None:
        """Everybody goes on alone. O(rows)."""
        if not self.rows:
            return
        for seq in self.rows.values():
            self.settle(seq)
            seq.joined = None
        self.rows.clear()
        self._ends.clear()
        self._full.clear()
        self._written.clear()
        self._untold, self._scheduled = [], 0

    def settle(self, seq: Sequence) -> None:
        """Adds to a row what it has drawn."""
        assert seq.joined is not None
        steps = self._taken - seq.joined
        if steps:
            seq.joined = self._taken
            seq.scheduled += steps
            seq.computed = seq.scheduled
            drawn = [self._token_id] * steps
            seq.tokens += drawn
            seq.outputs += drawn

    def quiet_steps(self, limit: int) -> int:
        """The longest run of at most `limit` steps; 0 where not even the next one is quiet: blocks are lacking.

        Nobody that waits can be admitted meanwhile. A choice ends by its length only: whoever draws the tokens of a run
        sees to it that none is a stop token.
        """
        ends = self._ends
        while ends[0][2].joined is None:
            heapq.heappop(ends)
        steps = min(limit, 1 if self._untold else limit, ends[0][0] - self._taken)
        pool = self._kv.pool
        available = pool.num_available
        if len(self.rows) * (1 + steps // pool.block_size) > available:
            while steps > 0 and self._growth_blocks(steps) > available:
                steps //= 2
        return steps

    def grow(self, steps: int) -> None:
        """Gives all rows the blocks of their next `steps` steps, which `quiet_steps` has found to be there."""
        full, pool, until = self._full, self._kv.pool, self._taken + steps
        tables, size = pool.tables, pool.block_size
        growing: list[list[int]] = []
        """A table as often as it lacks a block."""
        due = [at for at in full if at < until] if steps > 1 else [self._taken] if self._taken in full else []
        for at in due:
            rows = full.pop(at)
            each = 1 + (until - 1 - at) // size
            mine = [tables[seq.seq_id] for seq in rows] if len(rows) > 1 else [tables[rows[0].seq_id]]
            growing += mine if each == 1 else mine * each
            later = at + each * size
            if later in full:
                full[later] += rows
            else:
                full[later] = rows
        if growing:
            pool.grow(growing)

    def take(self, steps: int, token_id: int) -> list[Sequence]:
        """Every row computes `steps` tokens and draws as many, each `token_id`. Returns those that have something to
        tell, their first own token or their last, oldest first and settled.
        """
        if token_id != self._token_id:
            for seq in self.rows.values():
                self.settle(seq)
            self._token_id = token_id
        self.grow(steps)
        self._taken += steps
        self._scheduled += steps * len(self.rows)
        if self._written:
            self._name_blocks()
        ends, telling = self._ends, self._untold
        self._untold = []
        while ends and ends[0][0] <= self._taken:
            seq = heapq.heappop(ends)[2]
            if seq.joined is not None and seq.told:
                telling.append(seq)
        for seq in telling:
            self.settle(seq)
        if len(telling) > 1:
            telling.sort(key=_ORDER)
        return telling

    def check_integrity(self, decoding: Iterable[Sequence]) -> None:
        """Proves that all of `decoding`, or none, are in it, that its sum is theirs and that their blocks are full when
        it says. Settles everybody. Raises IntegrityError. O(rows).
        """
        if not self.rows:
            return
        for seq in self.rows.values():
            self.settle(seq)
        if {seq.seq_id for seq in decoding} != set(self.rows):
            raise IntegrityError("lockstep: rows that decode are not in it, or others are")
        if self._scheduled != sum(seq.scheduled for seq in self.rows.values()):
            raise IntegrityError("lockstep: the context is miscounted")
        due = {seq: at for at, rows in self._full.items() for seq in rows}
        if due != {seq: self._full_at(seq) for seq in self.rows.values()}:
            raise IntegrityError("lockstep: blocks are full at other steps than it says")

    def _full_at(self, seq: Sequence) -> int:
        assert seq.joined is not None
        pool = self._kv.pool
        return seq.joined + len(pool.tables[seq.seq_id]) * pool.block_size - seq.scheduled

    def _growth_blocks(self, steps: int) -> int:
        """Blocks that all rows lack for the KV of their next `steps` tokens."""
        last, size = self._taken + steps - 1, self._kv.pool.block_size
        return sum([len(rows) * (1 + (last - at) // size) for at, rows in self._full.items() if at <= last])

    def _name_blocks(self) -> None:
        """Tells the prefix cache of the blocks that are written whole now."""
        written, taken, size = self._written, self._taken, self._kv.pool.block_size
        for at in sorted([at for at in written if at <= taken]):
            rows = written.pop(at)
            for seq in rows:
                self.settle(seq)
                self._kv.written(seq)
            written.setdefault(at + size * (1 + (taken - at) // size), []).extend(rows)


def _remove(places: dict[int, list[Sequence]], at: int, seq: Sequence) -> None:
    rows = places[at]
    if len(rows) == 1:
        del places[at]
    else:
        rows.remove(seq)
