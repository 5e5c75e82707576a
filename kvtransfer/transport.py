"""The seam between the handoff's decisions and the bytes: what a transport carries, and who answers on the other end.

The decode worker calls a `KVTransport` (through `SinkDriver`); the transport's server part asks the prefill worker's
`KVSource` (`SourceDriver`). A source decides what may be read and when; a transport moves the bytes and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from ..cluster.types import BlockRef, SampledToken
from .ticket import Hello, Peer, Ticket

MESSAGE_BYTES = 2**20
"""Blocks are grouped into messages of about this size; a bigger block travels alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """Asks for the blocks of one ticket, in order, from `first_block` to the last, then the end frame."""

    ticket: Ticket
    first_block: int
    """Index of the first wanted block in the sequence; those before it are in the reader's prefix cache or memory."""
    pull_index: int = 0
    """Counts the pulls of one decode attempt; the newest is the only one served."""
    checksum: bool = True
    mapped: bool = False
    """The reader has mapped the holder's memory: send references in place of bytes."""
    into: tuple[int, ...] = ()
    """Where the blocks go in the reader's memory, from `first_block` on: for a transport that writes them itself. Not
    on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFrame:
    """One whole block. The last block of a sequence is sent whole too, though only its first slots mean anything."""

    ticket: Ticket
    block_index: int
    """Position of the block in its sequence, not its id in anybody's memory."""
    generation: int
    """The holder's generation of the block while it was read."""
    payload: memoryview
    """`KVLayout.block_bytes` bytes."""
    checksum: int | None
    """`wire.block_checksum` over identity and payload; None: switched off."""
    verify: Callable[[], None] | None = None
    """Set where the payload is memory that the holder may use anew: copy it, then call this before the next `await`. It
    raises `HandoffRefused` (WRONG_GENERATION) if what was copied is not what the frame names. Frames that came together
    may share one, which then speaks for all of them. None: the payload is the frame's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefFrame:
    """One whole block of a reader that has mapped the holder's memory: where it lies there."""

    ticket: Ticket
    block_index: int
    block_id: int
    """In the holder's memory."""
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndFrame:
    """The end of a pull: everything was sent, and this is the token that prefill sampled."""

    ticket: Ticket
    num_tokens: int
    first_token: SampledToken
    prefill_end_age_s: float
    """Seconds between the end of prefill and this frame, on the holder's clock."""
    total_bytes: int
    """Bytes of KV that this pull offered."""
    transport: str = ""
    """How this pull came; filled in by the reader's transport, not on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenBlocks:
    """Blocks that came in order, were checked and lie where `PullRequest.into` wants them."""

    ticket: Ticket
    first_block: int
    """Index of the first one in the sequence."""
    block_ids: tuple[int, ...]
    """Where they lie."""
    arrived_age_s: float
    """Seconds since the first of them was here."""
    written_age_s: float
    """Seconds since the last of them was written."""


KVFrame = BlockFrame | EndFrame
KVFrames = tuple[BlockFrame, ...] | WrittenBlocks | EndFrame
"""What a `KVTransport` yields: blocks that came together, in order, to be written or written; at last the end frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRun:
    """Blocks that may be read now. The payloads are views of the engine's memory: copy them, then call `verify`, both
    before the next `await`, and send only if `verify` returned.
    """

    first_block: int
    """Index of the first one in the sequence."""
    frames: tuple[BlockFrame, ...]
    """None for a reader that has mapped the memory."""
    refs: tuple[BlockRef, ...]
    """The blocks in the holder's memory: all that is sent to a reader that has mapped it."""
    verify: Callable[[], None]
    """Raises `HandoffRefused` (WRONG_GENERATION, or why the pull was revoked) if what was copied must not be sent."""
    last: bool = False
    """The end frame comes next, and at once."""


class KVTransport(ABC):
    """Reader's end; one per decode worker, called from its event loop. Every method raises `HandoffRefused`: with the
    holder's reason where it refused, PEER_LOST where it cannot be reached, DEADLINE where `timeout_s` ran out.
    """

    @abstractmethod
    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        """Introduces this worker; once per peer and epoch (the caller caches). Does not compare the answer, but for
        TRANSPORT_MISMATCH where this transport is demanded and does not join the two, PEER_LOST where it may later.
        """

    @abstractmethod
    def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        """Streams the blocks as they become readable, some at a time, then one `EndFrame`. Once per pull; `aclose`
        cancels it on both sides, and when it returns the transport writes into none of `request.into` any more. A
        stream that ends without an `EndFrame` raises PEER_LOST.
        """

    @abstractmethod
    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        """Tells the holder that the first step is done and its blocks may go; idempotent."""

    @abstractmethod
    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        """Tells the holder that this decode attempt is over and nobody will pull; idempotent, may overtake its pull."""

    @abstractmethod
    async def close(self) -> None:
        """Ends every call and connection; idempotent."""


class KVSource(ABC):
    """Holder's end; one per prefill worker, called by transport servers on the worker's event loop."""

    @abstractmethod
    async def hello(self, theirs: Hello) -> Hello:
        """Compares, and answers with this worker's own; raises `HandoffRefused` if the pair cannot work."""

    @abstractmethod
    def open_pull(self, request: PullRequest) -> AsyncGenerator[BlockRun | EndFrame, None]:
        """Yields runs as the watermark moves, then the end frame; waits (bounded) for a prefill that has not begun.
        Raises `HandoffRefused`, before the first run or between runs. The caller must close it.
        """

    @abstractmethod
    async def confirm(self, ticket: Ticket) -> None:
        """Releases the ticket's blocks. Raises `HandoffRefused` if the ticket is not the current one."""

    @abstractmethod
    async def abort_ticket(self, ticket: Ticket) -> None:
        """Ends the ticket's handoff, even before it began. Raises `HandoffRefused` if the ticket is stale."""
