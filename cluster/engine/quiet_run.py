"""Many decode steps taken together: between two of a scheduler's decisions its running sequences only grow by a token
a step, and a clock that is not the machine's need not stop at each of them.

A run is *quiet* while every step of it would compute one token of each running sequence and change nothing else: nobody
is admitted or preempted, and nobody ends before the last step. The simulator runs on it (`cluster.sim`); a device in
real time takes its steps one by one. Both leave the same lengths, counts and events behind; which of the free blocks a
sequence gets may differ.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter

from .sequence import Sequence
from .sequence_kv import SequenceKV


@dataclass(frozen=True, slots=True)
class QuietRun:
    """What the next steps would be."""

    steps: int
    decode_rows: int
    context_tokens: int
    """Context of the first step's rows, each with the token that it computes; every step adds `decode_rows`."""


def quiet_run(rows: Collection[Sequence], kv: SequenceKV, limit: int) -> QuietRun | None:
    """The longest run of at most `limit` steps; None where not even the next one is quiet. O(rows).

    `rows` are all that run, in any order, and nobody that waits can be admitted while they do. A choice ends by its
    length only: whoever draws the tokens of a run sees to it that none is a stop token.
    """
    steps, context = limit, len(rows)
    for seq in rows:
        # `can_decode`, without a call: this is the simulator's innermost loop.
        if seq.plans or seq.undrawn or seq.doomed or seq.scheduled < seq.prefill_end:
            return None
        context += seq.scheduled
        left = seq.last_len - len(seq.tokens)
        if left < steps:
            steps = left
        if not seq.told:
            steps = min(steps, 1)
    pool = kv.pool
    if len(rows) * (1 + steps // pool.block_size) > pool.num_available:
        while steps > 0 and sum(_blocks_to_grow(rows, kv, steps)) > pool.num_available:
            steps //= 2
    return QuietRun(steps, len(rows), context) if steps > 0 and rows else None


def grow_rows(rows: Collection[Sequence], kv: SequenceKV) -> None:
    """Gives `rows` the blocks of their next step, which `quiet_run` has found to be there."""
    for seq, blocks in zip(rows, _blocks_to_grow(rows, kv, 1), strict=True):
        if blocks:
            kv.pool.grow(kv.pool.tables[seq.seq_id], blocks)


def take_run(rows: Collection[Sequence], kv: SequenceKV, steps: int, token_id: int) -> list[Sequence]:
    """Every sequence of `rows` computes `steps` tokens and draws as many, each `token_id`. Returns those that have
    something to tell, their first own token or their last, oldest first.
    """
    drawn = [token_id] * steps
    telling: list[Sequence] = []
    pool, size, caches, tables = kv.pool, kv.pool.block_size, kv.cache.enabled, kv.pool.tables
    for seq in rows:
        scheduled, table, tokens = seq.scheduled + steps, tables[seq.seq_id], seq.tokens
        if scheduled > len(table) * size:
            pool.grow(table, -(-scheduled // size) - len(table))
        seq.computed = seq.scheduled = scheduled
        tokens += drawn
        seq.outputs += drawn
        if caches:
            kv.written(seq)
        if not seq.told or len(tokens) >= seq.last_len:
            telling.append(seq)
    return sorted(telling, key=attrgetter("order"))


def _blocks_to_grow(rows: Collection[Sequence], kv: SequenceKV, steps: int) -> list[int]:
    """Blocks that each of `rows` lacks for the KV of its next `steps` tokens."""
    size, tables, ahead = kv.pool.block_size, kv.pool.tables, steps - 1
    lacking = [(seq.scheduled + ahead) // size + 1 - len(tables[seq.seq_id]) for seq in rows]
    return [blocks if blocks > 0 else 0 for blocks in lacking]
