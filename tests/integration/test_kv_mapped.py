"""KV out of another worker's memory: equal content, never a torn block, gRPC where it cannot be, nothing kept of the
dead."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mapped_ends import LAYOUT, TOKEN, D, Holder, Reader, content, play, until
from tandem.kvtransfer.grpc_transport import GrpcKVTransport
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped.blocks import HostBlocks, frames_of
from tandem.kvtransfer.mapped.segment import MappedSegment, take
from tandem.kvtransfer.ticket import HandoffRefused, Peer, RefusalReason, SegmentOffer
from tandem.kvtransfer.transport import PullRequest, RefFrame, WrittenBlocks
from tickets import ticket_of

Copied = tuple[np.ndarray | None, bool]
"""A copy that was accepted, and whether one was begun."""
HOLDER = Path(__file__).parent / "kv_grpc" / "holder.py"
RACER = Path(__file__).parent / "kv_mapped" / "racer.py"


@contextmanager
def running(*command: str) -> Iterator[Any]:
    """A Python process with text pipes, killed at the end."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command], cwd="/", **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_content_is_equal_and_confirmed() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, [9, 3, 4, 1, 0, 8, 5])
        there.submit(holder.peer, 100)
        holder.source.on_advanced(key, 50)
        await until(lambda: there.store.writes == 3)
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(D)
        for index, block_id in enumerate([9, 3, 4, 1, 0, 8, 5]):
            assert bytes(there.store.read_block(index)) == content(block_id, 1)
        assert (stats.transport, stats.blocks, stats.bytes, stats.retries) == ("mapped", 7, 7 * LAYOUT.block_bytes, 0)
        there.sink.on_first_step(D)
        await until(lambda: there.sink.counts().live == 0)
        assert holder.said == [("release", "r/0/p0", "confirmed")]
        assert dict(there.sink.pulls_total) == {"mapped": 1}

    play(scene)


def test_a_block_handed_out_anew_while_it_is_copied_does_not_count() -> None:
    """The prefill is preempted in the middle of a copy, and computed again in other blocks: what was copied with the
    torn one is pulled again, and none of it is of the first life."""

    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, [0, 1, 2, 3, 4, 5, 6])

        def preempt(count: int) -> None:
            if count == 2:
                holder.source.on_preempted(key)
                holder.grant([2])  # to somebody else

        there.store.before_write = preempt
        holder.source.on_advanced(key, 80)
        there.submit(holder.peer, 100)
        await until(lambda: there.store.writes == 5)
        holder.source.on_blocks(key, holder.grant([9, 8, 7, 10, 11, 12, 13]), 0)
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(D)
        assert stats.retries == 1
        whole = [bytes(there.store.read_block(index)) for index in range(7)]
        assert whole == [content(b, 1) for b in (9, 8, 7, 10, 11, 12, 13)]

    play(scene)


def test_an_abort_under_a_reader_is_noticed() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, [0, 1, 2, 3, 4, 5, 6])
        holder.source.on_done(key, TOKEN)

        def abort(count: int) -> None:
            if count == 4:
                holder.source.abort("r", 0, 0)
                assert holder.said == [("release", "r/0/p0", "aborted")], "freed at once: nobody is asked"
                holder.grant([4, 5, 6])

        there.store.before_write = abort
        there.submit(holder.peer, 100)
        await until(lambda: there.failure() is not None)
        assert there.failure()[:3] == ("failed", D, RefusalReason.ABORTED)
        assert there.said[0] == ("writer_done", D)
        assert there.sink.counts().live == 0

    play(scene)


@pytest.mark.parametrize(
    "offer",
    [SegmentOffer(socket_name="", nonce=b"another memory's"), SegmentOffer(socket_name="tandem-kv-nobody", nonce=b"")],
    ids=["the nonce is another's", "nobody listens"],
)
def test_what_cannot_be_mapped_is_tried_once_and_pulled_over_grpc(
    offer: SegmentOffer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tandem.kvtransfer.mapped.transport")

    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, [0, 1, 2, 3, 4, 5, 6])
        holder.source.on_done(key, TOKEN)
        for attempt in range(3):
            there.sink._meetings.forget(holder.peer)  # as after a lost connection
            stats = await there.ready(there.submit(holder.peer, 100, attempt))
            assert stats.transport == "grpc"
            assert bytes(there.store.read_block(6)) == content(6, 1)
        assert there.transport.mapped_peers == 0
        assert sum("is pulled over gRPC" in record.message for record in caplog.records) == 1

    play(scene, offer=offer)


def test_demanded_memory_that_cannot_be_had_is_refused_at_the_meeting() -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, [0, 1, 2, 3, 4, 5, 6])
        holder.source.on_done(key, TOKEN)
        there.submit(holder.peer, 100)
        await until(lambda: there.failure() is not None)
        assert there.failure()[2] is RefusalReason.TRANSPORT_MISMATCH
        assert "transport 'mapped' is demanded, but the KV memory of p cannot be mapped" in str(there.failure()[3])
        assert there.store.writes == 0
        await until(lambda: holder.said == [("release", "r/0/p0", "aborted")])

    play(scene, required=True, offer=SegmentOffer(socket_name="tandem-kv-nobody", nonce=b""))


def test_references_are_for_those_who_were_offered_the_memory() -> None:
    async def run() -> None:
        holder, there = Holder(), Reader()
        holder.offer = None
        await holder.start()
        request = PullRequest(ticket=ticket_of(100, epoch=holder.peer.epoch), first_block=0, mapped=True)
        with pytest.raises(HandoffRefused, match="not shared"):
            async for _ in GrpcKVTransport.references(there.transport._control, holder.peer, request, timeout_s=30):
                pass
        await there.close()
        await holder.stop()

    asyncio.run(run())


def test_mappings_are_bounded_and_those_dropped_go_on_over_grpc() -> None:
    async def run() -> None:
        holders, there = [Holder(epoch) for epoch in (1, 2, 3)], Reader(max_mappings=2)
        for attempt, holder in enumerate(holders):
            await holder.start()
            holder.source.on_done(holder.prefill(100, [0, 1, 2, 3, 4, 5, 6]), TOKEN)
            stats = await there.ready(there.submit(holder.peer, 100, attempt))
            assert stats.transport == "mapped"
        assert there.transport.mapped_peers == 2
        stats = await there.ready(there.submit(holders[0].peer, 100, 3))
        assert stats.transport == "grpc"
        await there.close()
        for holder in holders:
            await until(lambda holder=holder: holder.segments.readers == 0)
            await holder.stop()

    asyncio.run(run())


def test_many_lives_of_peers_leave_no_mapping_and_no_descriptor() -> None:
    def kept() -> tuple[int, int]:
        gc.collect()
        with open("/proc/self/maps") as lines:
            return sum("memfd:tandem-kv" in line for line in lines), len(os.listdir("/proc/self/fd"))

    async def run() -> None:
        there = Reader()
        counts = []
        for life in range(24):
            holder = Holder(epoch=100 + life)
            await holder.start()
            holder.source.on_done(holder.prefill(100, [0, 1, 2, 3, 4, 5, 6]), TOKEN)
            stats = await there.ready(there.submit(holder.peer, 100, life))
            assert stats.transport == "mapped"
            await holder.stop()
            await until(lambda: there.transport.mapped_peers == 0)
            del holder
            counts.append(kept())
        assert {mappings for mappings, _ in counts} == {1}, "the reader's own"
        descriptors = [number for _, number in counts]
        assert max(descriptors[12:]) <= max(descriptors[:12]), descriptors
        await there.close()

    before = kept()
    asyncio.run(run())
    assert kept()[0] == before[0]


def test_a_mapping_outlives_its_owners_kill() -> None:
    """kill -9 of the holder while its blocks are copied: no SIGBUS, what was named is right, then the peer is lost."""

    async def run() -> None:
        port = int(holder.stdout.readline().split()[1])
        there = Reader()

        def kill(count: int) -> None:
            if count == 1:
                holder.kill()
                assert holder.wait(30) == -signal.SIGKILL

        there.store.before_write = kill
        holder.stdin.write("advance 96\n")
        holder.stdin.flush()
        there.submit(Peer("p", 7, f"127.0.0.1:{port}"), 100)
        await until(lambda: there.failure() is not None)
        assert there.failure()[:3] == ("failed", D, RefusalReason.PEER_LOST)
        assert there.store.writes == 6
        for index in range(6):
            assert bytes(there.store.read_block(index)) == bytes([index + 1]) * LAYOUT.block_bytes
        assert there.transport.mapped_peers == 0
        assert there.sink.counts().live == 0
        await there.close()

    settings = json.dumps({"num_tokens": 100, "mapped": True})
    with running(str(HOLDER), settings) as holder:
        asyncio.run(run())


@pytest.mark.parametrize("written", [False, True], ids=["by who pulls", "by the transport"])
def test_no_torn_block_is_ever_accepted(tmp_path: Path, written: bool) -> None:
    """A process hands blocks out anew and overwrites them without a pause; what is accepted is of one generation."""
    num_blocks, block_bytes = 4, 2**18
    published_path = tmp_path / "published"
    published_path.write_bytes(bytes(8 * num_blocks))
    with running(str(RACER), str(num_blocks), str(block_bytes), str(published_path)) as racer:
        pid, number, nonce = racer.stdout.readline().split()
        group = KVGroup(name="all", num_layers=1, num_kv_heads=1, head_dim=block_bytes // 16, dtype="uint64")
        layout = KVLayout(block_size=1, groups=(group,))
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY)
        segment = take(fd, nonce=bytes.fromhex(nonce), epoch=7, layout=layout)
        copied = copied_by_the_transport if written else copied_by_who_pulls
        accepted, refused = race(segment, copied, np.memmap(published_path, dtype=np.uint64, mode="r"))
        racer.stdin.close()
        assert racer.wait(30) == 0
    assert accepted > 0
    assert refused > 0, "nothing raced"


def race(
    segment: MappedSegment, copied: Callable[[MappedSegment, RefFrame], Copied], published: np.ndarray
) -> tuple[int, int]:
    """Copies blocks until enough were accepted and refused after the copy: how many of each."""
    ticket = ticket_of(100)
    pick, accepted, refused = random.Random(5), 0, 0
    for _ in range(200_000):
        if accepted >= 200 and refused >= 50:
            break
        block_id = pick.randrange(segment.num_blocks)
        generation = int(published[block_id])
        copy, begun = copied(segment, RefFrame(ticket=ticket, block_index=0, block_id=block_id, generation=generation))
        if copy is None:
            refused += begun
            continue
        accepted += 1
        assert (copy == generation).all(), f"a torn block was accepted: {np.unique(copy)} of {generation}"
    return accepted, refused


def copied_by_who_pulls(segment: MappedSegment, ref: RefFrame) -> Copied:
    copy = np.zeros(segment.block_bytes // 8, dtype=np.uint64)
    try:
        (frame,) = frames_of(segment, [ref])
    except HandoffRefused:
        return None, False
    copy[:] = np.frombuffer(frame.payload, dtype=np.uint64)
    assert frame.verify is not None
    try:
        frame.verify()
    except HandoffRefused:
        return None, True
    return copy, True


def copied_by_the_transport(segment: MappedSegment, ref: RefFrame) -> Copied:
    copy = np.zeros(segment.block_bytes // 8, dtype=np.uint64)
    reading = HostBlocks(segment, memoryview(copy).cast("B")).open(
        PullRequest(ticket=ref.ticket, first_block=0, into=(0,))
    )

    async def take() -> None:
        async for came in reading.take([ref]):
            assert isinstance(came, WrittenBlocks)

    try:
        asyncio.run(take())
    except HandoffRefused:
        return None, bool(copy.any())
    return copy, True
