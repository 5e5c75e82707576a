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

from ..types import Handoff
from .sequence import Sequence
from .sequence_kv import SequenceKV


@dataclass(frozen=True, slots=True)
class QuietRun:
    """What the next steps would be."""

    steps: int
    decode_rows: int
    context_tokens: int
    """Context of the first step's rows, each with the token that it computes; every step adds `decode_rows`."""


def quiet_run(rows: Collection[Sequence], kv: SequenceKV, limit: int, max_model_len: int) -> QuietRun | None:
    """The longest run of at most `limit` steps; None where not even the next one is quiet. O(rows).

    `rows` are all that run, in any order, and nobody that waits can be admitted while they do. A choice ends by its
    length only: whoever draws the tokens of a run sees to it that none is a stop token.
    """
    steps, context = limit, 0
    for seq in rows:
        if seq.plans or not seq.can_decode:
            return None
        context += seq.scheduled
        left = min(seq.spec.sampling.max_tokens - len(seq.outputs), max_model_len - len(seq.tokens))
        if left < steps:
            steps = left
        if steps > 1 and _tells_at_once(seq):
            steps = 1
    while steps > 0 and sum(_blocks_to_grow(rows, kv, steps)) > kv.pool.num_available:
        steps //= 2
    return QuietRun(steps, len(rows), context + len(rows)) if steps > 0 and rows else None


def take_run(
    rows: Collection[Sequence], kv: SequenceKV, steps: int, token_id: int, max_model_len: int
) -> list[Sequence]:
    """Every sequence of `rows` computes `steps` tokens and draws as many, each `token_id`. Returns those that have
    something to tell, their first own token or their last, oldest first.
    """
    drawn = [token_id] * steps
    telling: list[Sequence] = []
    for seq, blocks in zip(rows, _blocks_to_grow(rows, kv, steps), strict=True):
        if blocks > 0:
            kv.pool.allocate(blocks, seq.seq_id)
        last = len(seq.outputs) + steps >= seq.spec.sampling.max_tokens or len(seq.tokens) + steps >= max_model_len
        if last or _tells_at_once(seq):
            telling.append(seq)
        seq.computed = seq.scheduled = seq.scheduled + steps
        seq.tokens += drawn
        seq.outputs += drawn
        if kv.cache.enabled:
            kv.written(seq)
    return sorted(telling, key=attrgetter("order"))


def _blocks_to_grow(rows: Collection[Sequence], kv: SequenceKV, steps: int) -> list[int]:
    """Blocks that each of `rows` lacks for the KV of its next `steps` tokens."""
    size, table = kv.pool.block_size, kv.pool.table
    return [max(0, (seq.scheduled + steps - 1) // size + 1 - len(table(seq.seq_id))) for seq in rows]


def _tells_at_once(seq: Sequence) -> bool:
    """Its next token is the first that this engine draws for it: others wait for that news."""
    return len(seq.outputs) == len(seq.spec.output_token_ids) + (seq.spec.handoff is Handoff.IN)
