"""What `HandoffHolder` knows of a ticket: states, events, records, and what it tells others about them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from ...cluster.types import BlockRef, SampledToken
from ..ticket import RefusalReason
from .actions import Outcome
from .memory import ChoiceKey


class HolderState(enum.StrEnum):
    """Where one ticket stands on the prefill side."""

    ABSENT = "absent"
    AWAITED = "awaited"
    QUEUED = "queued"
    COMPUTING = "computing"
    HELD = "held"
    REVOKED = "revoked"
    DONE = "done"


class HolderEvent(enum.StrEnum):
    """Everything that can happen to a ticket; each is a method of `HandoffHolder` of the same name."""

    PREFILL_SUBMITTED = "prefill_submitted"
    BLOCKS_GRANTED = "blocks_granted"
    ADVANCED = "advanced"
    PREEMPTED = "preempted"
    PREFILL_DONE = "prefill_done"
    PREFILL_FAILED = "prefill_failed"
    PULL = "pull"
    PULL_PROGRESS = "pull_progress"
    PULL_ENDED = "pull_ended"
    READ = "read"
    CONFIRM = "confirm"
    ABORT_TICKET = "abort_ticket"
    ABORT_ATTEMPT = "abort_attempt"
    TICK = "tick"


class Owed(enum.Enum):
    """What the engine must be told when the ticket ends."""

    NOTHING = 0
    ABORT = 1
    RELEASE = 2


@dataclass(slots=True)
class Reader:
    """An accepted pull that has not reported its end."""

    reader_id: int
    key: str
    decode_attempt: int
    revoked: RefusalReason | None = None


@dataclass(slots=True)
class Record:
    """One live ticket."""

    key: str
    choice: ChoiceKey
    attempt: int
    state: HolderState
    num_tokens: int
    deadline_s: float | None = None
    """AWAITED: end of the wait; HELD: end of the lease."""
    blocks: tuple[BlockRef, ...] = ()
    watermark_tokens: int = 0
    first_token: SampledToken | None = None
    prefill_end_s: float = 0.0
    decode_attempt: int = -1
    pull_index: int = -1
    readers: dict[int, Reader] = field(default_factory=dict)
    owed: Owed = Owed.NOTHING
    outcome: Outcome | None = None
    reason: RefusalReason = RefusalReason.ABORTED
    """Why pulls are refused once `outcome` is set."""


class Tombstone(NamedTuple):
    """What is remembered of a ticket that is over."""

    outcome: Outcome
    reason: RefusalReason
    decode_attempt: int


class ReaderView(NamedTuple):
    """What a reader may do now. `refused` set: stop, report `pull_ended`, answer with the reason."""

    refused: RefusalReason | None
    blocks: tuple[BlockRef, ...]
    readable_blocks: int
    num_tokens: int
    first_token: SampledToken | None
    """Set once prefill is done; then every block is readable."""
    prefill_end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderCounts:
    """Tickets by state, and what else could leak; for metrics and tests."""

    awaited: int = 0
    queued: int = 0
    computing: int = 0
    held: int = 0
    revoked: int = 0
    readers: int = 0
    leases: int = 0
    tombstones: int = 0

    @property
    def live(self) -> int:
        """Tickets and readers that still own something."""
        return self.awaited + self.queued + self.computing + self.held + self.revoked + self.readers

    def by_state(self) -> dict[str, int]:
        """Live tickets by `HolderState`; states without one are left out."""
        live = (HolderState.AWAITED, HolderState.QUEUED, HolderState.COMPUTING, HolderState.HELD, HolderState.REVOKED)
        counts = (self.awaited, self.queued, self.computing, self.held, self.revoked)
        return {state.value: count for state, count in zip(live, counts, strict=True) if count}
