"""Holder and reader of mapped KV memory, on one event loop and over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.cluster.clock import MonotonicClock
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.cuda_ipc.blocks import DeviceMapper
from tandem.kvtransfer.grpc_transport import GrpcKVServer, GrpcKVTransport
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped.blocks import HostMapper, Mapper
from tandem.kvtransfer.mapped.fd_passing import SegmentServer
from tandem.kvtransfer.mapped.transport import MappedKVTransport
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.reblock import ReblockingTransport
from tandem.kvtransfer.sink import SinkDriver
from tandem.kvtransfer.source import SourceDriver
from tandem.kvtransfer.ticket import Peer, SegmentOffer
from tandem.kvtransfer.transfer_stats import TransferStats
from tickets import ticket_of

TOKEN = SampledToken(42, -0.25, ((42, -0.25),))
D = "r/0/d0"
PATIENCE_S = 60.0
GROUP = KVGroup(name="all", num_layers=2, num_kv_heads=4, head_dim=64, dtype="float32")
LAYOUT = KVLayout(block_size=16, groups=(GROUP,))
NUM_BLOCKS = 16


class Holder:
    """A prefill worker's side, in this process, with one life an epoch."""

    def __init__(self, epoch: int = 7, store: MemoryKVStore | None = None) -> None:
        self.epoch = epoch
        self.store = store or MemoryKVStore(LAYOUT, NUM_BLOCKS)
        self.segment = self.store.segment
        self.segment.publish(epoch)
        device = self.store.device_memory
        self.segments = SegmentServer(self.segment, device_fd=None if device is None else device.fd)
        self.offer: SegmentOffer | None = self.segments.offer
        self.said: list[tuple[object, ...]] = []

    async def start(self) -> None:
        self.source = SourceDriver(
            worker_id="p",
            epoch=self.epoch,
            fingerprint="fp",
            store=self.store,
            generation_of=lambda block_id: int(self.segment.generations[block_id]),
            release=lambda key, outcome: self.said.append(("release", key, outcome.value)),
            abort_prefill=lambda key: self.said.append(("abort_prefill", key)),
            clock=MonotonicClock(),
            offer=self.offer,
        )
        self.server = GrpcKVServer(self.source, block_bytes=self.store.layout.block_bytes)
        await self.segments.start()
        self.peer = Peer("p", self.epoch, f"127.0.0.1:{await self.server.start()}")

    def grant(self, block_ids: list[int], *, attempt: int = 0) -> tuple[BlockRef, ...]:
        """Hands blocks out anew, then fills each with its id and generation."""
        for block_id in block_ids:
            self.segment.generations[block_id] += 1
            generation = self.segment.generations[block_id]
            self.store.write_block(block_id, content(block_id, generation, self.store.layout))
        return tuple(BlockRef(block_id, self.segment.generations[block_id]) for block_id in block_ids)

    def prefill(self, num_tokens: int, block_ids: list[int]) -> str:
        key = self.source.on_submitted("r", 0, 0, num_tokens)
        self.source.on_blocks(key, self.grant(block_ids), 0)
        return key

    async def stop(self) -> None:
        await self.source.close()
        await self.server.stop()
        await self.segments.stop()
        self.segment.close()
        self.source.check_integrity()


def content(block_id: int, generation: int, layout: KVLayout = LAYOUT) -> bytes:
    return bytes([block_id + 1, generation]) * (layout.block_bytes // 2)


class HookedStore(MemoryKVStore):
    """Runs `before_write(index of the write)` while a block's bytes are about to be copied."""

    before_write: Callable[[int], None] = staticmethod(lambda count: None)
    writes = 0

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        self.before_write(self.writes)
        self.writes += 1
        super().write_block(block_id, payload)


@dataclass
class Reader:
    """A decode worker's side."""

    required: bool = False
    fetch_timeout_s: float = 10.0
    max_mappings: int = 8
    max_channels: int = 1
    stats: TransferStats | None = None
    said: list[tuple[object, ...]] = field(default_factory=list)
    in_device: MemoryKVStore | None = None
    """The reader's own memory, where it is a device's."""
    transport_writes: bool = False
    """Blocks go from memory to memory; the store is not asked."""

    def __post_init__(self) -> None:
        self.store = HookedStore(LAYOUT, NUM_BLOCKS)
        mapper: Mapper = HostMapper(LAYOUT, self.store.host_blocks if self.transport_writes else None)
        if self.in_device is not None:
            assert self.in_device.device_memory is not None
            mapper = DeviceMapper(self.in_device.layout, self.in_device.device_memory)
        self.transport = MappedKVTransport(
            GrpcKVTransport(block_bytes=LAYOUT.block_bytes, max_channels=self.max_channels),
            LAYOUT,
            mapper=mapper,
            required=self.required,
            fetch_timeout_s=self.fetch_timeout_s,
            max_mappings=self.max_mappings,
        )
        pulls = ReblockingTransport(
            self.transport,
            (self.in_device or self.store).layout,
            plain=None if self.required else GrpcKVTransport(block_bytes=4 * LAYOUT.block_bytes),
            own=self.transport.reblocks,
        )
        self.sink = SinkDriver(
            worker_id="d",
            epoch=1,
            fingerprint="fp",
            store=self.in_device or self.store,
            transport=pulls,
            clock=MonotonicClock(),
            kv_ready=self._kv_ready,
            writer_done=lambda key: self.said.append(("writer_done", key)),
            failed=lambda key, reason, retryable, message: self.said.append(("failed", key, reason, message)),
            credit_limit_blocks=NUM_BLOCKS,
            max_pull_retries=2,
        )

    def _kv_ready(self, key: str, token: SampledToken, stats: TransferStats) -> None:
        self.stats = stats
        self.said.append(("kv_ready", key, token))

    def submit(self, peer: Peer, num_tokens: int, decode_attempt: int = 0) -> str:
        ticket = ticket_of(num_tokens, decode_attempt=decode_attempt, prefill_worker=peer.worker_id, epoch=peer.epoch)
        blocks = (self.in_device or self.store).layout.blocks_for(num_tokens)
        credit = self.sink.reserve("r", 0, decode_attempt, blocks)
        key = self.sink.submit(ticket, peer, credit, PATIENCE_S)
        self.sink.on_blocks(key, tuple(BlockRef(i, 1) for i in range(blocks)), 0)
        return key

    def failure(self) -> tuple[object, ...] | None:
        return next((what for what in self.said if what[0] == "failed"), None)

    async def ready(self, key: str) -> TransferStats:
        await until(lambda: ("kv_ready", key, TOKEN) in self.said or self.failure() is not None)
        assert self.failure() is None, self.said
        assert self.stats is not None
        return self.stats

    async def close(self) -> None:
        self.sink.check_integrity()
        await self.sink.close()
        await self.transport.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0.001)


Scene = Callable[[Holder, Reader], Awaitable[None]]


def play(scene: Scene, *, offer: SegmentOffer | None = None, held: MemoryKVStore | None = None, **reader: Any) -> None:
    async def run() -> None:
        holder, there = Holder(store=held), Reader(**reader)
        if offer is not None:
            holder.offer = SegmentOffer(
                socket_name=offer.socket_name or holder.segments.offer.socket_name,
                nonce=offer.nonce or holder.segments.offer.nonce,
            )
        await holder.start()
        try:
            await scene(holder, there)
        finally:
            await there.close()
            await holder.stop()

    asyncio.run(run())
