"""KV between two plain processes over gRPC: equal content, and a clear end in time where something breaks."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.grpc_transport import GrpcKVTransport
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.sink import SinkDriver
from tandem.kvtransfer.ticket import HandoffRefused, Peer, RefusalReason, Ticket
from tandem.kvtransfer.transfer_stats import TransferStats
from tandem.kvtransfer.transport import EndFrame, PullRequest
from tandem.kvtransfer.wire import decode_ack
from tickets import ticket_of

HOLDER = Path(__file__).parent / "kv_grpc" / "holder.py"
TOKEN = SampledToken(42, -0.25, ((42, -0.25),))
D = "r/0/d0"
PATIENCE_S = 60.0


class Holder:
    """The other process."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.peer = Peer("p", 7, f"127.0.0.1:{port}")

    @classmethod
    async def start(cls, **settings: object) -> Holder:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HOLDER),
            json.dumps(settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd="/",
        )
        holder = cls(process, 0)
        word, port = (await holder.line()).split()
        assert word == "port"
        holder.peer = Peer("p", 7, f"127.0.0.1:{port}")
        return holder

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE_S)).decode().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    async def stop(self) -> None:
        assert self.process.stdin is not None
        if self.process.returncode is None:
            self.process.stdin.close()
        code = await asyncio.wait_for(self.process.wait(), PATIENCE_S)
        assert code in (0, -signal.SIGKILL)


@dataclass
class Reader:
    """A decode worker's side, in this process."""

    layout: KVLayout
    num_blocks: int
    fingerprint: str = "fp"
    stats: TransferStats | None = None
    said: list[tuple[object, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = MemoryKVStore(self.layout, self.num_blocks)
        self.transport = GrpcKVTransport(block_bytes=self.layout.block_bytes)
        self.changed = asyncio.Event()
        self.sink = SinkDriver(
            worker_id="d",
            epoch=1,
            fingerprint=self.fingerprint,
            store=self.store,
            transport=self.transport,
            clock=MonotonicClock(),
            kv_ready=self._kv_ready,
            writer_done=lambda key: self._say("writer_done", key),
            failed=lambda key, reason, retryable, message: self._say("failed", key, reason, retryable),
            credit_limit_blocks=self.num_blocks,
            max_pull_retries=2,
        )

    def _say(self, *what: object) -> None:
        self.said.append(what)
        self.changed.set()

    def _kv_ready(self, key: str, token: SampledToken, stats: TransferStats) -> None:
        self.stats = stats
        self._say("kv_ready", key, token)

    async def hear(self, *what: object) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while what not in self.said:
                assert not [w for w in self.said if w[0] == "failed"], self.said
                self.changed.clear()
                await self.changed.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110  (nobody announces it)
                await asyncio.sleep(0.005)

    def submit(self, holder: Holder, ticket: Ticket, *, timeout_s: float = PATIENCE_S) -> None:
        blocks = self.layout.blocks_for(ticket.num_tokens)
        credit = self.sink.reserve("r", 0, ticket.decode_attempt, blocks)
        key = self.sink.submit(ticket, holder.peer, credit, timeout_s)
        self.sink.on_blocks(key, tuple(BlockRef(i, 1) for i in range(blocks)), 0)

    def blocks_received(self) -> int:
        return self.sink._sequences[D].received_blocks if D in self.sink._sequences else 0

    async def close(self) -> None:
        self.sink.check_integrity()
        await self.sink.close()
        await self.transport.close()


def layout_of(num_layers: int = 2) -> KVLayout:
    group = KVGroup(name="all", num_layers=num_layers, num_kv_heads=4, head_dim=64, dtype="float32")
    return KVLayout(block_size=16, groups=(group,))


def play(
    scene: Callable[[Holder, Reader], Awaitable[None]], *, reader: dict[str, str] | None = None, **settings: object
) -> None:
    async def run() -> None:
        layout = layout_of(int(str(settings.get("num_layers", 2))))
        holder = await Holder.start(**settings)
        there = Reader(layout, layout.blocks_for(int(str(settings["num_tokens"]))), **(reader or {}))
        try:
            await scene(holder, there)
        finally:
            await there.close()
            await holder.stop()

    asyncio.run(run())


@pytest.mark.parametrize("num_layers", [2, 48], ids=["many blocks a message", "a block above gRPC's default limit"])
def test_content_is_equal_and_confirmed(num_layers: int) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        there.submit(holder, ticket_of(100))
        holder.tell("advance 50")
        await there.until(lambda: there.blocks_received() == 3)
        holder.tell("advance 100")
        await there.until(lambda: there.blocks_received() == 6)
        holder.tell("done")
        await there.hear("kv_ready", D, TOKEN)
        for index in range(7):
            assert bytes(there.store.read_block(index)) == bytes([index + 1]) * there.layout.block_bytes
        assert there.stats is not None
        assert there.stats.bytes == 7 * there.layout.block_bytes
        assert there.stats.retries == 0
        there.sink.on_first_step(D)
        assert await holder.line() == "release r/0/p0 confirmed"
        await there.until(lambda: there.sink.counts().live == 0)
        holder.tell("counts")
        assert await holder.line() == "live 0"

    play(scene, num_tokens=100, num_layers=num_layers)


def test_corrupted_payload_is_never_accepted() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        holder.tell("done")
        there.submit(holder, ticket_of(100))
        await there.until(lambda: bool(there.said) and there.said[-1][0] == "failed")
        assert there.said == [("writer_done", D), ("failed", D, RefusalReason.CORRUPT, True)]
        assert not any(there.store.read_block(0))

    play(scene, num_tokens=100, corrupt=True)


def test_wrong_epoch_is_refused_at_the_meeting() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        there.submit(holder, ticket_of(100))
        await there.until(lambda: bool(there.said) and there.said[-1][0] == "failed")
        assert there.said[-1] == ("failed", D, RefusalReason.WRONG_EPOCH, True)
        with pytest.raises(HandoffRefused) as refused:  # a reader that skips the Hello is refused all the same
            async for _ in there.transport.pull(
                holder.peer, PullRequest(ticket=ticket_of(100), first_block=0), timeout_s=30
            ):
                pass
        assert refused.value.reason is RefusalReason.WRONG_EPOCH

    play(scene, num_tokens=100, epoch=8)


def test_other_fingerprint_is_refused_at_the_meeting() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        there.submit(holder, ticket_of(100))
        await there.until(lambda: bool(there.said) and there.said[-1][0] == "failed")
        assert there.said[-1] == ("failed", D, RefusalReason.FINGERPRINT_MISMATCH, False)

    play(scene, num_tokens=100, reader={"fingerprint": "other"})


def test_holder_killed_in_the_middle_fails_clearly() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        there.submit(holder, ticket_of(100))
        holder.tell("advance 50")
        await there.until(lambda: there.blocks_received() == 3)
        holder.process.kill()
        await there.until(lambda: bool(there.said) and there.said[-1][0] == "failed")
        assert there.said == [("writer_done", D), ("failed", D, RefusalReason.PEER_LOST, True)]
        assert there.sink.counts().live == 0

    play(scene, num_tokens=100)


def test_deadline_ends_a_pull_whose_prefill_never_ends() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        there.submit(holder, ticket_of(100), timeout_s=0.3)
        await there.until(lambda: bool(there.said) and there.said[-1][0] == "failed")
        assert there.said[-1] == ("failed", D, RefusalReason.DEADLINE, False)
        assert await holder.line() == "abort_prefill r/0/p0"
        holder.tell("counts")
        assert await holder.line() == "live 0"

    play(scene, num_tokens=100)


def test_abort_frees_the_other_process() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        holder.tell("advance 50")
        there.submit(holder, ticket_of(100))
        await there.until(lambda: there.blocks_received() == 3)
        there.sink.abort("r", 0, 0)
        assert await holder.line() == "abort_prefill r/0/p0"
        holder.tell("counts")
        assert await holder.line() == "live 0"
        assert there.said == [("writer_done", D)]

    play(scene, num_tokens=100)


def test_reader_that_goes_away_leaves_no_reader_behind() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        holder.tell("advance 50")
        frames = there.transport.pull(holder.peer, PullRequest(ticket=ticket_of(100), first_block=0), timeout_s=30)
        await anext(frames)
        holder.tell("counts")
        assert await holder.line() == "live 2", "the ticket and its reader"
        await frames.aclose()
        async with asyncio.timeout(PATIENCE_S):
            live = ""
            while live != "live 1":
                holder.tell("counts")
                live = await holder.line()

    play(scene, num_tokens=100)


def test_newer_attempt_takes_over_from_a_stalled_one() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        holder.tell("advance 50")
        older = there.transport.pull(holder.peer, PullRequest(ticket=ticket_of(100), first_block=0), timeout_s=30)
        await anext(older)
        newer = ticket_of(100, decode_attempt=1)
        holder.tell("done")
        request = PullRequest(ticket=newer, first_block=6)
        frames = [frame async for frame in there.transport.pull(holder.peer, request, timeout_s=30)]
        assert isinstance(frames[-1], EndFrame)
        assert frames[-1].first_token == TOKEN
        with pytest.raises(HandoffRefused) as refused:
            await there.transport.confirm(holder.peer, ticket_of(100), timeout_s=30)
        assert refused.value.reason is RefusalReason.STALE_ATTEMPT
        await older.aclose()
        await there.transport.confirm(holder.peer, newer, timeout_s=30)
        await there.transport.confirm(holder.peer, newer, timeout_s=30)  # again is no error
        assert await holder.line() == "release r/0/p0 confirmed"

    play(scene, num_tokens=100)


def test_garbage_is_refused_and_the_server_goes_on() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        for garbage in (
            b"",
            b"\x00" * 4,
            b"\xff" * 64,
            b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1",
            b"\x80\x04\x95pickle.",
        ):
            for method in ("Hello", "Confirm", "Abort"):
                answer = await there.transport._call(holder.peer, method, garbage, 30)
                with pytest.raises(HandoffRefused, match="corrupt"):
                    decode_ack(answer)
        holder.tell("done")
        there.submit(holder, ticket_of(100))
        await there.hear("kv_ready", D, TOKEN)

    play(scene, num_tokens=100)
