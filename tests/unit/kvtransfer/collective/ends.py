"""Two workers on one event loop whose ranks hand KV to each other over Gloo: real drivers, real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.collective import messages
from tandem.kvtransfer.collective.commands import Begin, Command
from tandem.kvtransfer.collective.holder import CollectiveHolder
from tandem.kvtransfer.collective.memory import HostRankMemory
from tandem.kvtransfer.collective.ports import WorkerRanks
from tandem.kvtransfer.collective.rank import LocalPort
from tandem.kvtransfer.collective.transport import CollectiveKVTransport
from tandem.kvtransfer.grpc_transport import GrpcKVServer, GrpcKVTransport
from tandem.kvtransfer.layout import KVGroup, KVLayout, KVSplit
from tandem.kvtransfer.mapped.segment import KVSegment
from tandem.kvtransfer.reshape import repack_reference
from tandem.kvtransfer.sink import SinkDriver
from tandem.kvtransfer.source import SourceDriver
from tandem.kvtransfer.store import KVStore
from tandem.kvtransfer.ticket import Peer
from tandem.kvtransfer.transfer_stats import TransferStats
from tickets import ticket_of

TOKEN = SampledToken(42, -0.25, ((42, -0.25),))
PATIENCE_S = 60.0
LEASE_S = 30.0
NUM_BLOCKS = 64
GROUP = KVGroup(name="all", num_layers=4, num_kv_heads=4, head_dim=64, dtype="float32")


def split(block_size: int = 16, tensor_parallel: int = 1, pipeline_stages: int = 1) -> KVSplit:
    layout = KVLayout(block_size=block_size, groups=(GROUP,))
    return KVSplit(layout=layout, tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages)


class NoStore(KVStore):
    """The drivers never touch blocks themselves."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.num_blocks = NUM_BLOCKS

    def read_block(self, block_id: int) -> memoryview:
        raise AssertionError("the holder's driver has read a block")

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        raise AssertionError("the reader's driver has written a block")


class HookedPort(LocalPort):
    """`before` hears every command; what it returns True for is kept, until `go_on`."""

    before: Callable[[Command], bool] = staticmethod(lambda command: False)
    kept: list[Command]

    def say(self, command: Command) -> None:
        if self.before(command):
            self.kept.append(command)
        else:
            super().say(command)

    def go_on(self) -> None:
        self.before = lambda command: False
        for command in self.kept:
            super().say(command)
        self.kept.clear()

    def break_pairs(self) -> None:
        """What the end of a rank's process is to the ranks that it has met."""
        assert self._transfers is not None
        self._transfers.close()


class Member:
    """A worker's ranks, their memories, and its life."""

    def __init__(self, split: KVSplit, epoch: int, timeout_s: float = 5.0) -> None:
        self.split = split
        self.epoch = epoch
        self.segments = [KVSegment(split.rank_layout(rank), NUM_BLOCKS) for rank in range(split.num_ranks)]
        self.ports = [HookedPort(HostRankMemory(segment.blocks)) for segment in self.segments]
        for port in self.ports:
            port.kept = []
        begin = Begin(backend="gloo", host="127.0.0.1", timeout_s=timeout_s)
        self.ranks = WorkerRanks(split, NUM_BLOCKS, self.ports, begin)
        self.said: list[tuple[object, ...]] = []

    def memories(self) -> list[np.ndarray]:
        """[block, byte] of each rank."""
        return [np.frombuffer(segment.blocks, np.uint8).reshape(NUM_BLOCKS, -1) for segment in self.segments]

    async def end(self) -> None:
        await self.ranks.close()
        for segment in self.segments:
            segment.close()


class Holder(Member):
    """A prefill worker's side."""

    async def start(self) -> None:
        await self.ranks.start()
        self.generations = [0] * NUM_BLOCKS
        offer = messages.Offer(
            backend="gloo", tensor_parallel=self.split.tensor_parallel, pipeline_stages=self.split.pipeline_stages
        )
        self.source = SourceDriver(
            worker_id="p",
            epoch=self.epoch,
            fingerprint="fp",
            store=NoStore(self.split.layout),
            lease_s=LEASE_S,
            generation_of=lambda block_id: self.generations[block_id],
            release=lambda key, outcome: self.said.append(("release", key, outcome.value)),
            abort_prefill=lambda key: self.said.append(("abort_prefill", key)),
            clock=MonotonicClock(),
            ranks=messages.encode_offer(offer),
        )
        self.sessions = CollectiveHolder(self.source, self.ranks, epoch=self.epoch)
        self.server = GrpcKVServer(self.source, block_bytes=self.split.layout.block_bytes, sessions=self.sessions)
        self.peer = Peer("p", self.epoch, f"127.0.0.1:{await self.server.start()}")

    def fill(self, block_ids: list[int], seed: int) -> np.ndarray:
        """Hands blocks out anew and writes random KV; [block, byte] of the whole model."""
        layout = self.split.layout
        whole = np.random.default_rng(seed).integers(1, 255, (len(block_ids), layout.block_bytes), dtype=np.uint8)
        parts = repack_reference(KVSplit(layout=layout), self.split, {0: whole}, len(block_ids) * layout.block_size)
        for block_id in block_ids:
            self.generations[block_id] += 1
        for rank, memory in enumerate(self.memories()):
            memory[block_ids] = parts[rank]
        return whole

    def prefill(self, name: str, num_tokens: int, block_ids: list[int]) -> str:
        key = self.source.on_submitted(name, 0, 0, num_tokens)
        self.source.on_blocks(key, tuple(BlockRef(i, self.generations[i]) for i in block_ids), 0)
        return key

    async def stop(self) -> None:
        await self.source.close()
        await self.server.stop()
        self.source.check_integrity()
        await self.end()


class Reader(Member):
    """A decode worker's side."""

    async def start(self) -> None:
        await self.ranks.start()
        self.stats: dict[str, TransferStats] = {}
        self.transport = CollectiveKVTransport(GrpcKVTransport(block_bytes=self.split.layout.block_bytes), self.ranks)
        self.sink = SinkDriver(
            worker_id="d",
            epoch=self.epoch,
            fingerprint="fp",
            store=NoStore(self.split.layout),
            transport=self.transport,
            clock=MonotonicClock(),
            kv_ready=lambda key, token, stats: self.stats.update({key: stats}),
            writer_done=lambda key: self.said.append(("writer_done", key)),
            failed=lambda key, reason, retryable, message: self.said.append(("failed", key, reason, message)),
            credit_limit_blocks=NUM_BLOCKS,
            max_pull_retries=2,
            call_timeout_s=20.0,
        )

    def submit(self, peer: Peer, name: str, num_tokens: int, block_ids: list[int], cached_tokens: int = 0) -> str:
        ticket = ticket_of(num_tokens, request_id=name, prefill_worker=peer.worker_id, epoch=peer.epoch)
        credit = self.sink.reserve(name, 0, 0, len(block_ids))
        key = self.sink.submit(ticket, peer, credit, PATIENCE_S)
        self.sink.on_blocks(key, tuple(BlockRef(i, 1) for i in block_ids), cached_tokens)
        return key

    def failure(self, key: str) -> tuple[object, ...] | None:
        return next((what for what in self.said if what[:2] == ("failed", key)), None)

    async def ready(self, key: str) -> TransferStats:
        await until(lambda: key in self.stats or self.failure(key) is not None)
        assert self.failure(key) is None, self.said
        return self.stats[key]

    def whole(self, block_ids: list[int]) -> np.ndarray:
        """[block, byte] of the whole model."""
        layout = self.split.layout
        parts = {rank: memory[block_ids] for rank, memory in enumerate(self.memories())}
        return repack_reference(self.split, KVSplit(layout=layout), parts, len(block_ids) * layout.block_size)[0]

    async def stop(self) -> None:
        self.sink.check_integrity()
        await self.sink.close()
        await self.transport.close()
        await self.end()


def reblocked(whole: np.ndarray, source: KVSplit, target: KVSplit, num_tokens: int) -> np.ndarray:
    """What the reader must hold of a sequence."""
    return repack_reference(KVSplit(layout=source.layout), KVSplit(layout=target.layout), {0: whole}, num_tokens)[0]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0.001)


Scene = Callable[[Holder, Reader], Awaitable[None]]


def play(scene: Scene, source: KVSplit, target: KVSplit, **member: float) -> None:
    async def run() -> None:
        holder, reader = Holder(source, 7, **member), Reader(target, 8, **member)
        await holder.start()
        await reader.start()
        try:
            await scene(holder, reader)
        finally:
            await reader.stop()
            await holder.stop()

    asyncio.run(run())


OPEN = messages.Open(
    worker_id="d",
    epoch=8,
    holder_epoch=7,
    session=b"s" * messages.NONCE_BYTES,
    secret=b"x" * messages.NONCE_BYTES,
    backend="gloo",
    split=split(),
)
READ = messages.Read(batch=1, ticket=ticket_of(512), first_token=0, end_token=16, block_ids=(0,), generations=(1,))
