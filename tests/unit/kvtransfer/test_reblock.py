"""Blocks of another size: what comes is put together as the whole KV says, and what is not due is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.types import SampledToken
from tandem.kvtransfer.layout import KVGroup, KVLayout, KVSplit, same_kv
from tandem.kvtransfer.reblock import Reblocker, ReblockingTransport, largest_block_bytes
from tandem.kvtransfer.reshape import repack_reference
from tandem.kvtransfer.ticket import PROTOCOL_VERSION, HandoffRefused, Hello, Peer, RefusalReason, Ticket
from tandem.kvtransfer.transport import BlockFrame, EndFrame, KVFrames, KVTransport, PullRequest, WrittenBlocks
from tandem.kvtransfer.wire import check_blocks, checksum_of
from tickets import ticket_of

GROUPS = (
    KVGroup(name="layers", num_layers=3, num_kv_heads=2, head_dim=2, dtype="bfloat16"),
    KVGroup(name="scales", num_layers=3, num_kv_heads=2, head_dim=1, dtype="int8"),
)
PEER = Peer("p", 7, "127.0.0.1:1")
TICKET = ticket_of(40)


def layout(block_size: int) -> KVLayout:
    return KVLayout(block_size=block_size, groups=GROUPS)


def blocks_of(size: int, num_tokens: int) -> np.ndarray:
    """A holder's blocks; slots behind the last token are whatever was there."""
    shape = (layout(size).blocks_for(num_tokens), layout(size).block_bytes)
    return np.random.default_rng(num_tokens).integers(1, 256, shape, dtype=np.uint8)


@settings(max_examples=200, deadline=None)
@given(
    theirs=st.sampled_from([1, 16, 24, 32, 48, 128]),
    mine=st.sampled_from([1, 16, 24, 32, 48, 128]),
    num_tokens=st.integers(1, 300),
    cached=st.integers(0, 20),
)
def test_blocks_are_those_of_the_map(theirs: int, mine: int, num_tokens: int, cached: int) -> None:
    held = blocks_of(theirs, num_tokens)
    split = KVSplit(layout=layout(theirs)), KVSplit(layout=layout(mine))
    expected = repack_reference(*split, {0: held}, num_tokens)[0]
    first = min(cached, len(expected))
    blocks = Reblocker(layout(mine), layout(theirs), first_block=first, num_tokens=num_tokens)
    assert blocks.first_wanted <= len(held)
    got = []
    for index in range(blocks.first_wanted, len(held)):
        before = len(got)
        got += blocks.add(index, memoryview(held[index].tobytes()))
        for number, _ in got[before:]:  # not later than it could be
            needed = min((number + 1) * mine, num_tokens)
            assert index * theirs < needed <= (index + 1) * theirs
    assert [index for index, _ in got] == list(range(first, len(expected)))
    covered = min(len(held) * theirs, len(expected) * mine)
    for index, payload in got:
        assert bytes(payload) == expected[index].tobytes()
    assert covered >= num_tokens


def test_a_block_that_is_not_due_is_refused() -> None:
    blocks = Reblocker(layout(32), layout(16), first_block=1, num_tokens=100)
    assert blocks.first_wanted == 2
    with pytest.raises(HandoffRefused, match="block 3 came, 2 was due"):
        list(blocks.add(3, memoryview(bytes(layout(16).block_bytes))))


class Scripted(KVTransport):
    """Says Hello with a layout and sends what it was told to."""

    def __init__(self, theirs: bytes, frames: list[KVFrames] | None = None) -> None:
        self._theirs = theirs
        self.frames = frames or []
        self.asked: list[PullRequest] = []
        self.calls: list[str] = []

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        return replace(mine, worker_id="p", epoch=7, layout=self._theirs)

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        self.asked.append(request)
        for frames in self.frames:
            yield frames

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        self.calls.append("confirm")

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        self.calls.append("abort")

    async def close(self) -> None:
        self.calls.append("close")


def frame(index: int, payload: bytes, **changes: object) -> BlockFrame:
    whole = BlockFrame(ticket=TICKET, block_index=index, generation=3, payload=memoryview(payload), checksum=None)
    whole = replace(whole, checksum=checksum_of(whole))
    return replace(whole, **changes)


END = EndFrame(
    ticket=TICKET, num_tokens=40, first_token=SampledToken(5), prefill_end_age_s=0.1, total_bytes=9, transport="grpc"
)


def pulled(usual: Scripted, plain: Scripted | None, *, checksum: bool = True) -> list[KVFrames]:
    """What a reader with blocks of 32 gets of a sequence of 40 tokens."""

    async def pull() -> list[KVFrames]:
        transport = ReblockingTransport(usual, layout(32), plain=plain)
        mine = Hello(
            protocol_version=PROTOCOL_VERSION, worker_id="d", epoch=1, fingerprint="f", layout=layout(32).to_bytes()
        )
        await transport.hello(PEER, mine, timeout_s=1)
        request = PullRequest(ticket=TICKET, first_block=0, checksum=checksum, into=(4, 5))
        found = [came async for came in transport.pull(PEER, request, timeout_s=1)]
        await transport.confirm(PEER, TICKET, timeout_s=1)
        await transport.abort(PEER, TICKET, timeout_s=1)
        await transport.close()
        return found

    return asyncio.run(pull())


def test_a_pull_from_smaller_blocks() -> None:
    held = blocks_of(16, 40)
    plain = Scripted(b"", [tuple(frame(i, held[i].tobytes()) for i in (0, 1)), (frame(2, held[2].tobytes()),), END])
    usual = Scripted(layout(16).to_bytes())
    first, second, end = pulled(usual, plain)
    assert usual.calls == ["confirm", "abort", "close"]
    assert plain.calls == ["close"]
    assert not usual.asked
    assert [(request.first_block, request.into) for request in plain.asked] == [(0, ())]
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    check_blocks([*first, *second], layout(32).block_bytes, checksum=True)
    assert [block.block_index for block in (*first, *second)] == [0, 1]
    assert end == replace(END, total_bytes=2 * layout(32).block_bytes)


def test_without_checksums_there_are_none() -> None:
    held = blocks_of(16, 40)
    frames = tuple(frame(i, held[i].tobytes(), checksum=None) for i in range(3))
    (made, _) = pulled(Scripted(layout(16).to_bytes()), Scripted(b"", [frames, END]), checksum=False)
    assert isinstance(made, tuple)
    assert [block.checksum for block in made] == [None, None]


def test_peers_with_the_same_blocks_are_pulled_from_as_usual() -> None:
    usual = Scripted(layout(32).to_bytes(), [END])
    plain = Scripted(b"")
    assert pulled(usual, plain) == [END]
    assert [request.into for request in usual.asked] == [(4, 5)]
    assert not plain.asked


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([(frame(0, bytes(layout(16).block_bytes), checksum=1),)], "checksum of block 0"),
        ([(frame(0, bytes(layout(16).block_bytes), checksum=None),)], "without its checksum"),
        ([(frame(0, b"short"),)], "has 5 bytes"),
        ([(frame(1, bytes(layout(16).block_bytes)),)], "block 1 came, 0 was due"),
        (
            [WrittenBlocks(ticket=TICKET, first_block=0, block_ids=(4,), arrived_age_s=0, written_age_s=0)],
            "written as they are",
        ),
    ],
)
def test_what_is_wrong_is_refused(frames: list[KVFrames], message: str) -> None:
    with pytest.raises(HandoffRefused, match=message):
        pulled(Scripted(layout(16).to_bytes()), Scripted(b"", frames))


def test_a_block_of_another_ticket_is_refused() -> None:
    other = frame(0, bytes(layout(16).block_bytes), ticket=ticket_of(40, epoch=8))
    other = replace(other, checksum=checksum_of(other))
    with pytest.raises(HandoffRefused, match="a block of r/0/p0 came"):
        pulled(Scripted(layout(16).to_bytes()), Scripted(b"", [(other,)]))


def test_mapped_memory_that_is_demanded_needs_equal_blocks() -> None:
    with pytest.raises(HandoffRefused, match="blocks of p have 16 slots, not 32") as refused:
        pulled(Scripted(layout(16).to_bytes()), None)
    assert refused.value.reason is RefusalReason.LAYOUT_MISMATCH


def test_what_makes_kv_the_same() -> None:
    mine = layout(16).to_bytes()
    assert same_kv(mine, layout(128).to_bytes())
    other = KVLayout(block_size=16, groups=(replace(GROUPS[0], dtype="float32"), GROUPS[1]))
    assert not same_kv(mine, other.to_bytes())
    assert not same_kv(mine, b"nonsense")
    assert same_kv(b"l", b"l")
    assert largest_block_bytes(layout(16)) == layout(1024).block_bytes
