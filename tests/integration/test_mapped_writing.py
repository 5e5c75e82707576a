"""Mapped KV that its transport writes into the reader's memory: what is written where, and what does not count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from mapped_ends import LAYOUT, NUM_BLOCKS, TOKEN, D, Holder, Reader, content, play, until
from tandem.kvtransfer.mapped import blocks
from tandem.kvtransfer.mapped.blocks import HostBlocks
from tandem.kvtransfer.mapped.copies import BlockCopies
from tandem.kvtransfer.mapped.segment import MappedSegment
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason
from tandem.kvtransfer.transport import PullRequest, RefFrame, WrittenBlocks
from tickets import ticket_of

BLOCK = LAYOUT.block_bytes


@pytest.fixture
def after_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Lets something happen after a copy, before its generations are compared; told how many copies were before."""

    def hook(happens: Callable[[int], None]) -> None:
        copy, copies = BlockCopies.copy, iter(range(1000))

        def hooked(self: BlockCopies, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
            copy(self, source_ids, target_ids)
            happens(next(copies))

        monkeypatch.setattr(BlockCopies, "copy", hooked)

    return hook


@pytest.mark.parametrize("unbroken_bytes", [blocks.UNBROKEN_BYTES, 2 * BLOCK, 1])
def test_content_is_equal_and_confirmed(monkeypatch: pytest.MonkeyPatch, unbroken_bytes: int) -> None:
    monkeypatch.setattr(blocks, "UNBROKEN_BYTES", unbroken_bytes)
    theirs = [9, 3, 4, 5, 0, 8, 1]

    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, theirs)
        there.submit(holder.peer, 100)
        holder.source.on_advanced(key, 50)
        await until(lambda: bytes(there.store.read_block(2)) == content(4, 1))
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(D)
        assert [bytes(there.store.read_block(index)) for index in range(7)] == [content(b, 1) for b in theirs]
        assert not any(bytes(there.store.read_block(index)).strip(b"\0") for index in range(7, NUM_BLOCKS))
        assert (stats.transport, stats.blocks, stats.bytes, stats.retries) == ("mapped", 7, 7 * BLOCK, 0)
        assert there.store.writes == 0
        there.sink.on_first_step(D)
        await until(lambda: there.sink.counts().live == 0)
        assert holder.said == [("release", "r/0/p0", "confirmed")]

    play(scene, transport_writes=True)


def test_a_block_handed_out_anew_while_it_is_copied_does_not_count(
    after_copy: Callable[[Callable[[int], None]], None],
) -> None:
    async def scene(holder: Holder, there: Reader) -> None:
        key = holder.prefill(100, [0, 1, 2, 3, 4, 5, 6])
        torn = asyncio.Event()

        def preempt(copies: int) -> None:
            if not copies:
                holder.source.on_preempted(key)
                holder.grant([2])  # to somebody else
                torn.set()

        after_copy(preempt)
        holder.source.on_advanced(key, 80)
        there.submit(holder.peer, 100)
        await torn.wait()
        holder.source.on_blocks(key, holder.grant([9, 8, 7, 10, 11, 12, 13]), 0)
        holder.source.on_done(key, TOKEN)
        stats = await there.ready(D)
        assert (stats.retries, stats.blocks) == (1, 7)
        whole = [bytes(there.store.read_block(index)) for index in range(7)]
        assert whole == [content(b, 1) for b in (9, 8, 7, 10, 11, 12, 13)]

    play(scene, transport_writes=True)


def test_an_abort_between_two_turns_ends_the_writing_before_the_blocks_are_free(
    monkeypatch: pytest.MonkeyPatch, after_copy: Callable[[Callable[[int], None]], None]
) -> None:
    monkeypatch.setattr(blocks, "UNBROKEN_BYTES", BLOCK)

    async def scene(holder: Holder, there: Reader) -> None:
        holder.source.on_done(holder.prefill(100, [0, 1, 2, 3, 4, 5, 6]), TOKEN)
        copied = []

        def abort(copies: int) -> None:
            copied.append(copies)
            if copies == 3:
                there.sink.abort("r", 0, 0)
                assert not there.said, "a writer is under way"

        after_copy(abort)
        there.submit(holder.peer, 100)
        await until(lambda: ("writer_done", D) in there.said)
        there.store.write_block(4, bytes(BLOCK))  # of somebody else now
        await asyncio.sleep(0.01)
        assert copied == [0, 1, 2, 3]
        assert not bytes(there.store.read_block(4)).strip(b"\0")

    play(scene, transport_writes=True)


@pytest.mark.parametrize("count", [1, 44, 45, 46, 67, 68, 91, 728])
def test_turns_are_of_about_one_size(count: int) -> None:
    block_bytes = 360 * 2**10
    refs = named(*range(count))
    turns = list(blocks._turns(refs, block_bytes))
    assert [ref for turn in turns for ref in turn] == refs
    assert len(turns) == max(1, round(count * block_bytes / blocks.UNBROKEN_BYTES))
    assert max(map(len, turns)) * block_bytes <= 1.5 * blocks.UNBROKEN_BYTES


TICKET = ticket_of(100)


def named(*block_ids: int, first: int = 0) -> list[RefFrame]:
    return [
        RefFrame(ticket=TICKET, block_index=index, block_id=block_id, generation=1)
        for index, block_id in enumerate(block_ids, first)
    ]


@pytest.mark.parametrize(
    ("refs", "reason"),
    [
        (named(0, 1, 2), RefusalReason.CORRUPT),
        (named(0, first=1), RefusalReason.CORRUPT),
        (named(NUM_BLOCKS), RefusalReason.CORRUPT),
        ([replace(named(0)[0], ticket=ticket_of(99))], RefusalReason.CORRUPT),
        ([replace(named(0)[0], generation=2)], RefusalReason.WRONG_GENERATION),
    ],
    ids=["more than there is room for", "another block", "no such block", "another's", "another generation"],
)
def test_blocks_that_are_not_due_are_written_nowhere(refs: list[RefFrame], reason: RefusalReason) -> None:
    held, mine = (MemoryKVStore(LAYOUT, NUM_BLOCKS) for _ in range(2))
    for block_id in range(NUM_BLOCKS):
        held.segment.generations[block_id] = 1
        held.write_block(block_id, content(block_id, 1))
    segment = MappedSegment(held.segment.fileno(), nonce=held.segment.nonce, epoch=0, layout=LAYOUT)
    request = PullRequest(ticket=TICKET, first_block=0, into=(3, 4))

    async def take() -> None:
        async for came in HostBlocks(segment, mine.host_blocks).open(request).take(refs):
            assert isinstance(came, WrittenBlocks)

    with pytest.raises(HandoffRefused) as refused:
        asyncio.run(take())
    assert refused.value.reason is reason
    assert not bytes(mine.segment.blocks).strip(b"\0")
