"""What a scheduler tells its worker: one frozen value per thing that happened, in order, through `take_events`; what is
told with every token is a named tuple, which is made three times as fast as a frozen dataclass.

For a sequence the order is always: BlocksGranted? (PrefillAdvanced | Preempted)* TokensEmitted*, the last
TokensEmitted with a finish reason, or SequenceFailed instead. An aborted sequence says nothing after `Scheduler.abort`
has returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..types import BlockRef, FinishReason, SampledToken


class BlocksGranted(NamedTuple):
    """An OUT or IN sequence has been admitted and holds the blocks of its whole context. Once a sequence.

    IN: the transport may write into blocks[cached_tokens // block_size:] from now on, until `kv_ready` or
    `writer_done`; the scheduler keeps the blocks for it even across an abort.
    """

    seq_id: str
    blocks: tuple[BlockRef, ...]
    """The block table in order; exactly the blocks of prompt and earlier output tokens."""
    cached_tokens: int
    """Prefix hit, a multiple of the block size: KV that is already there and is neither computed nor transferred."""


class PrefillAdvanced(NamedTuple):
    """A prefill chunk is done: the KV of positions < computed_tokens is written."""

    seq_id: str
    computed_tokens: int


class TokensEmitted(NamedTuple):
    """New output tokens of one sequence."""

    seq_id: str
    index: int  # type: ignore[assignment]  # in the place of tuple.index
    """Output index of the first of `tokens`; `SequenceSpec.output_token_ids` count as indices 0…"""
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    """Set on the sequence's last event."""
    stop_token_id: int | None = None
    """The id in `SamplingParams.stop_token_ids` that ended it; None for end of sequence and for length."""
    queue_s: float = 0.0
    """From arrival to admission (blocks granted), seconds; the same on every event of a sequence."""
    prefill_s: float = 0.0
    """From admission to the first token drawn here, seconds; 0 for an IN sequence."""
    cached_tokens: int = 0
    """Prefix hit at the first admission, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """KV ran out: the sequence gave its blocks back and will be prefilled again here, from the front of the queue."""

    seq_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFailed:
    """The device could not compute this sequence (`RowOutput.error`) and the rest of the batch went on; it is freed."""

    seq_id: str
    message: str


SchedulerEvent = BlocksGranted | PrefillAdvanced | TokensEmitted | Preempted | SequenceFailed
