"""What names a handoff, who takes part in it, and why one may be refused.

A ticket names exactly one passage of one sequence's KV: a message that names another attempt or another life (epoch) of
the prefill worker is refused with a reason, never served (DESIGN: the handoff is fenced). Pure data.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..cluster.types import Side, seq_id
from .layout import same_kv

PROTOCOL_VERSION = 4
"""Of the messages in `kvtransfer.wire` and of the state machines in `kvtransfer.protocol`; compared when workers
meet."""


class RefusalReason(enum.StrEnum):
    """Why a member refuses, or gives up, a handoff. Values travel on the wire and in metrics."""

    WRONG_EPOCH = "wrong_epoch"
    """The ticket is of another life of the prefill worker, or of another worker."""
    WRONG_GENERATION = "wrong_generation"
    """A block was handed out anew while, or before, it was read."""
    STALE_ATTEMPT = "stale_attempt"
    """A newer decode attempt, or a newer pull of the same attempt, has taken over."""
    UNKNOWN_TICKET = "unknown_ticket"
    """No such prefill here, and none came within the bounded wait."""
    WRONG_TOKENS = "wrong_tokens"
    """Ticket and prefill disagree about the number of tokens."""
    DUPLICATE = "duplicate"
    """This attempt is here already."""
    EXPIRED = "expired"
    """The lease or the credit ran out."""
    ABORTED = "aborted"
    FINISHED = "finished"
    """The first token ended the choice: there is nothing to hand off."""
    FINGERPRINT_MISMATCH = "fingerprint_mismatch"
    """Other weights, rope or KV dtype."""
    LAYOUT_MISMATCH = "layout_mismatch"
    TRANSPORT_MISMATCH = "transport_mismatch"
    """The transport that was demanded does not join this pair."""
    VERSION_MISMATCH = "version_mismatch"
    PREFILL_FAILED = "prefill_failed"
    CORRUPT = "corrupt"
    """A checksum, a bound or an order in the stream does not hold."""
    LIMIT = "limit"
    """A bounded table is full."""
    PEER_LOST = "peer_lost"
    """The connection broke, or could not be made."""
    DEADLINE = "deadline"
    CLOSED = "closed"
    """The member is shutting down."""
    INVALID = "invalid"
    """The request makes no sense; the same one never will."""

    @property
    def pull_again(self) -> bool:
        """True if the same ticket may be pulled again, from the first block that is missing."""
        return self in _PULL_AGAIN

    @property
    def retryable(self) -> bool:
        """True if a new attempt (another decode attempt, or a new prefill) may succeed where this one failed."""
        return self not in _FINAL


_PULL_AGAIN = frozenset(
    {RefusalReason.PEER_LOST, RefusalReason.CORRUPT, RefusalReason.LIMIT, RefusalReason.WRONG_GENERATION}
)
_FINAL = frozenset(
    {
        RefusalReason.FINGERPRINT_MISMATCH,
        RefusalReason.LAYOUT_MISMATCH,
        RefusalReason.TRANSPORT_MISMATCH,
        RefusalReason.VERSION_MISMATCH,
        RefusalReason.WRONG_TOKENS,
        RefusalReason.DUPLICATE,
        RefusalReason.FINISHED,
        RefusalReason.DEADLINE,
        RefusalReason.INVALID,
    }
)


class HandoffRefused(Exception):
    """A handoff that cannot go on, with its reason. `retryable`: a new attempt may succeed."""

    def __init__(self, reason: RefusalReason, message: str = "") -> None:
        super().__init__(f"{reason.value}: {message}" if message else reason.value)
        self.reason = reason
        self.message = message

    @property
    def retryable(self) -> bool:
        """Whether a new attempt may succeed; see `RefusalReason.retryable`."""
        return self.reason.retryable


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Names one handoff. Both workers build it from what the router told them; equal tickets or none."""

    request_id: str
    choice: int
    prefill_attempt: int
    decode_attempt: int
    prefill_worker: str
    epoch: int
    """Of the prefill worker's process; random, compared for equality only."""
    num_tokens: int
    """Tokens whose KV is handed off: prompt, plus outputs that an earlier attempt already sent."""
    fingerprint: str
    """Of weights, rope and KV dtype (`Device.fingerprint`)."""

    prefill_key: str = field(init=False, repr=False, compare=False)
    """Name of the sequence on the prefill worker's engine; also the holder's key."""
    decode_key: str = field(init=False, repr=False, compare=False)
    """Name of the sequence on the decode worker's engine; also the puller's key."""

    def __post_init__(self) -> None:
        prefill = seq_id(self.request_id, self.choice, Side.PREFILL, self.prefill_attempt)
        object.__setattr__(self, "prefill_key", prefill)
        object.__setattr__(self, "decode_key", seq_id(self.request_id, self.choice, Side.DECODE, self.decode_attempt))


@dataclass(frozen=True, slots=True)
class Peer:
    """A prefill worker as a decode worker reaches it."""

    worker_id: str
    epoch: int
    kv_address: str
    """host:port of its KV service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOffer:
    """Where a worker's KV memory can be had, and how to know it (`kvtransfer.mapped`)."""

    socket_name: str
    """Of a Unix socket in the abstract namespace, without its leading NUL."""
    nonce: bytes
    """Stands in the memory: who reads it there shares the host with its owner, whatever either is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What two workers tell each other when they first meet; a pair that cannot work is refused then."""

    protocol_version: int
    worker_id: str
    epoch: int
    fingerprint: str
    layout: bytes
    """`KVLayout.to_bytes()`."""
    offer: SegmentOffer | None = None
    """Where a reader on this host can have the speaker's KV memory; None: it is not shared."""
    ranks: bytes = b""
    """How ranks of others can meet the speaker's (`kvtransfer.collective.messages`); empty: they cannot."""


def check_hello(mine: Hello, theirs: Hello) -> None:
    """Raises `HandoffRefused` if KV of one cannot be used by the other: version, fingerprint, layout, in this order."""
    if theirs.protocol_version != mine.protocol_version:
        raise HandoffRefused(
            RefusalReason.VERSION_MISMATCH,
            f"{theirs.worker_id} speaks KV protocol {theirs.protocol_version}, {mine.worker_id} speaks "
            f"{mine.protocol_version}",
        )
    if theirs.fingerprint != mine.fingerprint:
        raise HandoffRefused(
            RefusalReason.FINGERPRINT_MISMATCH,
            f"{theirs.worker_id} has KV {theirs.fingerprint!r}, {mine.worker_id} has {mine.fingerprint!r}",
        )
    if not same_kv(mine.layout, theirs.layout):
        raise HandoffRefused(
            RefusalReason.LAYOUT_MISMATCH,
            f"the KV layouts of {theirs.worker_id} and {mine.worker_id} differ (layers, heads or dtype)",
        )
