"""What the state machines ask the runtime to do. Frozen; a machine returns them in the order in which to do them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ...cluster.types import SampledToken
from ..ticket import RefusalReason, Ticket


class Outcome(enum.StrEnum):
    """How a handoff ended, on either side."""

    CONFIRMED = "confirmed"
    ABORTED = "aborted"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the event's sender with this reason; nothing else came of the event."""

    key: str
    reason: RefusalReason
    message: str = ""
    """What the reason does not say."""


# Holder (prefill side)


@dataclass(frozen=True, slots=True)
class Serve:
    """The pull is accepted under `reader_id`; ask `HandoffHolder.view` what it may read, again after every `Wake`."""

    key: str
    reader_id: int


@dataclass(frozen=True, slots=True)
class Wake:
    """More of this key may be readable now."""

    key: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """These readers must stop before they touch another block; each then reports `pull_ended`."""

    key: str
    reader_ids: tuple[int, ...]
    reason: RefusalReason


@dataclass(frozen=True, slots=True)
class ReleaseBlocks:
    """The engine may free the held sequence: nobody reads it and nobody will. Exactly once per held sequence."""

    key: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class AbortPrefill:
    """The engine shall stop computing the sequence and free it. Instead of `ReleaseBlocks` where prefill is not
    done.
    """

    key: str


HolderAction = Refuse | Serve | Wake | Revoke | ReleaseBlocks | AbortPrefill


# Puller (decode side)


@dataclass(frozen=True, slots=True)
class Credit:
    """The credit is granted; tell the router its id."""

    key: str
    credit_id: int


@dataclass(frozen=True, slots=True)
class StartPull:
    """Pull from `first_block`, after `delay_s`; then report `pull_ended`, whatever happened."""

    key: str
    ticket: Ticket
    first_block: int
    pull_index: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class CancelPull:
    """Stop the writer; it reports `pull_ended` when it can write no more."""

    key: str


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """The blocks are the ones that were wanted: write them there, in this order."""

    key: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvReady:
    """All KV is written; the sequence may join the running batch. The writer writes no more."""

    key: str
    first_token: SampledToken


@dataclass(frozen=True, slots=True)
class WriterDone:
    """Nothing writes, or ever will, into the sequence's blocks: the engine may free them. Idempotent for the engine."""

    key: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence cannot get its KV: free it and tell the router."""

    key: str
    reason: RefusalReason
    message: str


@dataclass(frozen=True, slots=True)
class Confirm:
    """Tell the holder that its blocks may go; then report `confirm_ended`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell the holder that this decode attempt is over. Best effort: the lease bounds what a loss costs."""

    ticket: Ticket


PullerAction = (
    Refuse | Credit | StartPull | CancelPull | WriteBlocks | KvReady | WriterDone | Failed | Confirm | SendAbort
)
