"""What the decode side of the handoff keeps for one sequence, in which state, and what it tells of itself."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ...cluster.types import BlockRef
from ..ticket import RefusalReason, Ticket


class PullerState(enum.StrEnum):
    """Where one sequence stands on the decode side."""

    ABSENT = "absent"
    CREDITED = "credited"
    WAITING_BLOCKS = "waiting_blocks"
    PULLING = "pulling"
    CANCELLING = "cancelling"
    READY = "ready"
    RUNNING = "running"
    """The first step is done; the confirmation is on its way."""
    DONE = "done"


class PullerEvent(enum.StrEnum):
    """Everything that can happen to a sequence; each is a method of `HandoffPuller` of the same name."""

    RESERVE = "reserve"
    SUBMIT = "submit"
    SUBMIT_LOCAL = "submit_local"
    BLOCKS_GRANTED = "blocks_granted"
    BLOCKS_ARRIVED = "blocks_arrived"
    BLOCKS_WRITTEN = "blocks_written"
    END_ARRIVED = "end_arrived"
    PULL_ENDED = "pull_ended"
    FIRST_STEP = "first_step"
    CONFIRM_ENDED = "confirm_ended"
    ABORT = "abort"
    ROUTER_GONE = "router_gone"
    TICK = "tick"


@dataclass(slots=True)
class Record:
    """What the protocol keeps for one sequence."""

    key: str
    ticket: Ticket
    state: PullerState
    deadline_s: float
    blocks: tuple[BlockRef, ...] = ()
    next_block: int = 0
    """Index of the first block whose KV is not here."""
    pull_index: int = -1
    retries: int = 0
    failing: RefusalReason | None = None
    """CANCELLING because of this; None: an abort."""
    notify: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PullerCounts:
    """Sequences by state, and what else could leak; for metrics and tests."""

    credits: int = 0
    """Promises, those that wait for blocks included."""
    credited_blocks: int = 0
    wants: int = 0
    """Refused asks for credit that are remembered; they own nothing."""
    waiting_blocks: int = 0
    pulling: int = 0
    cancelling: int = 0
    ready: int = 0
    running: int = 0
    tombstones: int = 0

    @property
    def live(self) -> int:
        """Sequences and credits that still own something."""
        return self.credits + self.waiting_blocks + self.pulling + self.cancelling + self.ready + self.running

    def by_state(self) -> dict[str, int]:
        """Live sequences by `PullerState`; states without one are left out."""
        counts = {
            PullerState.CREDITED: self.credits - self.waiting_blocks,
            PullerState.WAITING_BLOCKS: self.waiting_blocks,
            PullerState.PULLING: self.pulling,
            PullerState.CANCELLING: self.cancelling,
            PullerState.READY: self.ready,
            PullerState.RUNNING: self.running,
        }
        return {state.value: count for state, count in counts.items() if count}
