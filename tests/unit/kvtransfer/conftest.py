"""One prefill and one decode worker's handoff, joined by a transport, with what they told their engines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tandem.cluster.clock import VirtualClock
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.memory_transport import MemoryKVTransport
from tandem.kvtransfer.sink import SinkDriver
from tandem.kvtransfer.source import SourceDriver
from tandem.kvtransfer.ticket import Peer, Ticket
from tandem.kvtransfer.transfer_stats import TransferStats
from tandem.kvtransfer.transport import KVTransport
from tickets import ticket_of

sys.path.insert(0, str(Path(__file__).parent))  # the folder's own modules

BLOCK_SIZE = 4
EPOCH = 77
LAYOUT = KVLayout(
    block_size=BLOCK_SIZE, groups=(KVGroup(name="all", num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32"),)
)


@dataclass
class Pair:
    """Worker `p` holds, worker `d` pulls; time is virtual, the event loop is real."""

    transport: KVTransport | None = None
    num_blocks: int = 16
    message_bytes: int = 2 * LAYOUT.block_bytes
    max_pull_retries: int = 3
    decode_fingerprint: str = "fp"
    checksum: bool = True
    store_class: type[MemoryKVStore] = MemoryKVStore
    clock: VirtualClock = field(default_factory=VirtualClock)
    generations: dict[int, int] = field(default_factory=dict)
    said: list[tuple[object, ...]] = field(default_factory=list)
    """What the drivers told their engines, in order."""
    stats: TransferStats | None = None

    def __post_init__(self) -> None:
        self.memory = MemoryKVTransport()
        self.held = self.store_class(LAYOUT, self.num_blocks)
        self.pulled = self.store_class(LAYOUT, self.num_blocks)
        self.peer = Peer("p", EPOCH, "p:1")
        self.source = self.make_source(EPOCH)
        self.memory.add("p:1", self.source)
        self.sink = SinkDriver(
            worker_id="d",
            epoch=5,
            fingerprint=self.decode_fingerprint,
            store=self.pulled,
            transport=self.transport or self.memory,
            clock=self.clock,
            kv_ready=self._kv_ready,
            writer_done=lambda key: self._say("writer_done", key),
            failed=lambda key, reason, retryable, _: self._say("failed", key, reason, retryable),
            credit_limit_blocks=self.num_blocks,
            max_pull_retries=self.max_pull_retries,
            checksum=self.checksum,
        )
        self.changed = asyncio.Event()

    def make_source(self, epoch: int) -> SourceDriver:
        return SourceDriver(
            worker_id="p",
            epoch=epoch,
            fingerprint="fp",
            store=self.held,
            generation_of=lambda block_id: self.generations.get(block_id, 1),
            release=lambda key, outcome: self._say("release", key, outcome),
            abort_prefill=lambda key: self._say("abort_prefill", key),
            clock=self.clock,
            lease_s=10.0,
            pull_wait_s=5.0,
            message_bytes=self.message_bytes,
        )

    def _say(self, *what: object) -> None:
        self.said.append(what)
        self.changed.set()

    def _kv_ready(self, key: str, token: SampledToken, stats: TransferStats) -> None:
        self.stats = stats
        self._say("kv_ready", key, token)

    async def hear(self, *what: object) -> None:
        """Waits until the engines were told so."""
        async with asyncio.timeout(20):
            while what not in self.said:
                self.changed.clear()
                await self.changed.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets the loop run until the condition holds."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  (nobody announces it)
                await asyncio.sleep(0)

    def ticket(self, *, num_tokens: int = 10, **attempts: int) -> Ticket:
        return ticket_of(num_tokens, epoch=EPOCH, **attempts)

    def prefill(self, *, num_tokens: int = 10, first_block: int = 0, attempt: int = 0) -> tuple[BlockRef, ...]:
        """Submits a prefill, grants its blocks and fills them with bytes of their own."""
        key = self.source.on_submitted("r", 0, attempt, num_tokens)
        refs = tuple(BlockRef(first_block + i, 1) for i in range(LAYOUT.blocks_for(num_tokens)))
        for ref in refs:
            self.held.write_block(ref.block_id, bytes([ref.block_id + 1]) * LAYOUT.block_bytes)
        self.source.on_blocks(key, refs, 0)
        return refs

    def submit(self, ticket: Ticket, *, timeout_s: float = 100.0, cached_tokens: int = 0, first: int = 3) -> str:
        """Reserves, submits and grants blocks on the decode side."""
        blocks = LAYOUT.blocks_for(ticket.num_tokens)
        credit = self.sink.reserve(ticket.request_id, ticket.choice, ticket.decode_attempt, blocks)
        key = self.sink.submit(ticket, self.peer, credit, timeout_s)
        self.sink.on_blocks(key, tuple(BlockRef(first + i, 1) for i in range(blocks)), cached_tokens)
        return key

    def check(self) -> None:
        self.source.check_integrity()
        self.sink.check_integrity()

    def nothing_left(self) -> None:
        self.check()
        assert self.source.counts().live == 0
        assert self.sink.counts().live == 0

    async def close(self) -> None:
        await self.sink.close()
        await self.source.close()


@pytest.fixture
def pair_class() -> type[Pair]:
    return Pair


@pytest.fixture
def layout() -> KVLayout:
    return LAYOUT
