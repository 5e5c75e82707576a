"""Both sides of the handoff with their engines' memories, for the machine that tries them (test_handoff_protocol)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.protocol.credits import CreditLedger
from tandem.kvtransfer.protocol.holder import HandoffHolder
from tandem.kvtransfer.protocol.puller import HandoffPuller
from tandem.kvtransfer.ticket import Ticket

BLOCK_SIZE = 4
NUM_BLOCKS = 7
TOKEN = SampledToken(1)
LEASE_S, WAIT_S, CREDIT_TTL_S, TIMEOUT_S = 10.0, 5.0, 4.0, 20.0

Content = tuple[str, int] | None
"""Whose KV a block of memory holds: (request, index of the block)."""


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


class Memory:
    """Blocks with generations and content, as an engine's pool hands them out."""

    def __init__(self) -> None:
        self.free = list(range(NUM_BLOCKS))
        self.generation = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.content: dict[int, Content] = dict.fromkeys(range(NUM_BLOCKS))

    def take(self, count: int) -> tuple[BlockRef, ...] | None:
        if len(self.free) < count:
            return None
        ids = [self.free.pop(0) for _ in range(count)]
        for block in ids:
            self.generation[block] += 1
        return tuple(BlockRef(block, self.generation[block]) for block in ids)

    def give_back(self, refs: tuple[BlockRef, ...]) -> None:
        for ref in refs:
            assert ref.block_id not in self.free, "freed twice"
            assert self.generation[ref.block_id] == ref.generation
            self.free.append(ref.block_id)


@dataclass
class Prefilling:
    request: str
    tokens: int
    computed: int = 0
    held: bool = False
    blocks: tuple[BlockRef, ...] = ()


@dataclass
class Stream:
    """An open pull as the holder's transport sees it."""

    ticket: Ticket
    to: tuple[str, int]
    """Decode worker and its life."""
    pull_index: int
    index: int


@dataclass
class PrefillSide:
    epoch: int
    memory: Memory = field(default_factory=Memory)
    sequences: dict[str, Prefilling] = field(default_factory=dict)
    events: deque[tuple[Any, ...]] = field(default_factory=deque)
    """What the engine did and the holder has not heard: they run in different threads."""
    commands: deque[tuple[str, str]] = field(default_factory=deque)
    streams: dict[int, Stream] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    """Keys that `ReleaseBlocks` or `AbortPrefill` came for."""
    newest_attempt: dict[str, int] = field(default_factory=dict)
    aborted: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.holder = HandoffHolder(
            worker_id="P",
            epoch=self.epoch,
            fingerprint="fp",
            block_size=BLOCK_SIZE,
            lease_s=LEASE_S,
            pull_wait_s=WAIT_S,
            max_tickets=4,
            max_tombstones=64,
        )

    def free(self, key: str) -> None:
        sequence = self.sequences.pop(key, None)
        if sequence is not None:
            self.memory.give_back(sequence.blocks)


@dataclass
class Decoding:
    ticket: Ticket
    blocks: tuple[BlockRef, ...] = ()
    cached: int = 0
    aborted: bool = False
    writer_done: bool = False
    ready: bool = False


@dataclass
class DecodeSide:
    name: str
    epoch: int
    memory: Memory = field(default_factory=Memory)
    sequences: dict[str, Decoding] = field(default_factory=dict)
    grants: deque[str] = field(default_factory=deque)
    confirming: deque[str] = field(default_factory=deque)
    aborted: dict[str, int] = field(default_factory=dict)
    writers: dict[str, tuple[int, bool]] = field(default_factory=dict)
    """By key: pull index of the writer that runs, and whether it was told to stop."""

    def __post_init__(self) -> None:
        credits = CreditLedger(limit_blocks=NUM_BLOCKS, ttl_s=CREDIT_TTL_S, max_credits=3)
        self.puller = HandoffPuller(
            block_size=BLOCK_SIZE, credits=credits, max_sequences=3, max_tombstones=64, max_pull_retries=1
        )

    def maybe_free(self, key: str) -> None:
        """The engine's rule: an aborted sequence's blocks are free when no writer can write into them."""
        sequence = self.sequences[key]
        if sequence.aborted and (sequence.writer_done or not sequence.blocks):
            del self.sequences[key]
            self.memory.give_back(sequence.blocks)


@dataclass
class Request:
    name: str
    tokens: int
    prefill_attempt: int = 0
    decode_attempt: int = 0
