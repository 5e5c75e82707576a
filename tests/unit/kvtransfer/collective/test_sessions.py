"""KV from rank to rank over Gloo, between drivers of two workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from ends import NUM_BLOCKS, OPEN, PATIENCE_S, READ, TOKEN, Holder, Reader, play, reblocked, split, until
from tandem.kvtransfer.collective import messages
from tandem.kvtransfer.collective import reader as reader_end
from tandem.kvtransfer.collective.commands import Command, Join, Leave, Receive, Send, Stage
from tandem.kvtransfer.collective.holder import MAX_KEYS
from tandem.kvtransfer.collective.plan import batch_blocks
from tandem.kvtransfer.collective.reader import ReaderSession
from tandem.kvtransfer.layout import KVSplit
from tandem.kvtransfer.reshape import Reshape
from tandem.kvtransfer.ticket import Peer, RefusalReason

NCCL = messages.Offer(backend="nccl", tensor_parallel=1, pipeline_stages=1)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (split(), split()),
        (split(tensor_parallel=2), split(block_size=32)),
        (split(block_size=32, pipeline_stages=2), split(tensor_parallel=2)),
        (split(tensor_parallel=2, pipeline_stages=2), split(tensor_parallel=8)),
    ],
    ids=["one rank each", "TP 2 to larger blocks", "PP 2 to TP 2 and smaller blocks", "TP 2 x PP 2 to TP 8"],
)
def test_kv_goes_from_rank_to_rank_while_prefill_computes(source: KVSplit, target: KVSplit) -> None:
    async def scene(holder: Holder, reader: Reader) -> None:
        tokens = 500
        blocks, wanted = source.layout.blocks_for(tokens), target.layout.blocks_for(tokens)
        held, into = list(range(blocks))[::-1], list(range(3, 3 + wanted))
        whole = holder.fill(held, seed=1)
        key = holder.prefill("r", tokens, held)
        cached = target.layout.block_size
        before = reader.whole([3])
        pulled = reader.submit(holder.peer, "r", tokens, into, cached)
        for computed in (100, 260, 490):
            holder.source.on_advanced(key, computed)
            await until(lambda: reader.transport.sessions == 1)
        holder.source.on_done(key, TOKEN)
        stats = await reader.ready(pulled)
        assert stats.transport == "gloo"
        assert stats.blocks == wanted - 1
        expected = reblocked(whole, source, target, tokens)
        np.testing.assert_array_equal(reader.whole(into)[1:], expected[1:])
        np.testing.assert_array_equal(reader.whole([3]), before)
        reader.sink.on_first_step(pulled)
        await until(lambda: ("release", key, "confirmed") in holder.said)

    play(scene, source, target)


ONE = split()
BLOCKS = list(range(32))
TOKENS = 16 * len(BLOCKS)


def done(holder: Holder, name: str, seed: int, block_ids: list[int] = BLOCKS) -> np.ndarray:
    """A prefill that has ended."""
    whole = holder.fill(block_ids, seed)
    holder.source.on_done(holder.prefill(name, 16 * len(block_ids), block_ids), TOKEN)
    return whole


def test_a_block_that_is_handed_out_anew_while_it_is_copied_is_not_sent() -> None:
    """The reader's request fails or is pulled again; another request's KV never arrives."""

    async def scene(holder: Holder, reader: Reader) -> None:
        done(holder, "r", 1)
        before = reader.whole(BLOCKS)
        torn = []

        def tear(command: Command) -> bool:
            if isinstance(command, Stage) and not torn:
                torn.append(command)
                holder.fill([command.block_ids[-1]], seed=99)
            return False

        holder.ports[0].before = tear
        key = reader.submit(holder.peer, "r", TOKENS, BLOCKS)
        await until(lambda: reader.failure(key) is not None)
        assert reader.failure(key)[2] is RefusalReason.WRONG_GENERATION
        after = reader.whole(BLOCKS)
        first = BLOCKS.index(torn[0].block_ids[0])
        np.testing.assert_array_equal(after[first:], before[first:])
        assert ("writer_done", key) in reader.said

    play(scene, ONE, ONE)


def test_a_pull_that_is_given_up_writes_nothing_any_more_and_leaves_the_session_in_order() -> None:
    async def scene(holder: Holder, reader: Reader) -> None:
        done(holder, "r", 1)
        holder.ports[0].before = lambda command: isinstance(command, Send)
        received = []
        reader.ports[0].before = lambda command: received.append(command) if isinstance(command, Receive) else False
        key = reader.submit(holder.peer, "r", TOKENS, BLOCKS)
        await until(lambda: len(received) > 0)
        reader.sink.abort("r", 0, 0)
        await until(lambda: ("writer_done", key) in reader.said)
        before = reader.whole(BLOCKS)
        holder.ports[0].go_on()
        whole = done(holder, "s", 2, list(range(32, 40)))
        second = reader.submit(holder.peer, "s", 128, list(range(40, 48)))
        await reader.ready(second)
        np.testing.assert_array_equal(reader.whole(list(range(40, 48))), whole)
        np.testing.assert_array_equal(reader.whole(BLOCKS), before)
        assert reader.transport.sessions == 1

    play(scene, ONE, ONE)


@pytest.mark.parametrize("whose", ["holder", "reader"])
def test_ranks_that_part_meet_anew_and_the_pull_is_made_again(whose: str) -> None:
    shape = split(tensor_parallel=2)

    async def scene(holder: Holder, reader: Reader) -> None:
        whole = done(holder, "r", 1)
        met = []

        def part(command: Command) -> bool:
            met.extend([command.session] if isinstance(command, Join) else [])
            if isinstance(command, Send) and len(set(met)) == 1:
                (holder if whose == "holder" else reader).ports[1].break_pairs()
            return False

        holder.ports[0].before = part
        stats = await reader.ready(reader.submit(holder.peer, "r", TOKENS, BLOCKS))
        assert stats.retries == 1
        assert len(set(met)) == 2
        np.testing.assert_array_equal(reader.whole(BLOCKS), whole)
        assert reader.transport.sessions == holder.sessions.sessions == 1

    play(scene, shape, shape)


def test_a_rank_that_does_not_answer_is_given_up_within_the_lease() -> None:
    async def scene(holder: Holder, reader: Reader) -> None:
        done(holder, "r", 1)
        holder.ports[0].before = lambda command: isinstance(command, Send)
        key = reader.submit(holder.peer, "r", TOKENS, BLOCKS)
        await until(lambda: reader.failure(key) is not None)
        assert reader.failure(key)[2] is RefusalReason.PEER_LOST
        assert ("release", "r/0/p0", "expired") not in holder.said
        await until(lambda: holder.sessions.sessions == 0)

    play(scene, ONE, ONE, timeout_s=0.3)


def test_a_rank_that_ends_as_it_is_told_to_leave_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never says that it has left; that it is lost says as much."""
    monkeypatch.setattr(reader_end, "SETTLE_S", 10 * PATIENCE_S)
    shape = split(tensor_parallel=2)

    async def scene(holder: Holder, reader: Reader) -> None:
        done(holder, "r", 1)
        await reader.ready(reader.submit(holder.peer, "r", TOKENS, BLOCKS))
        ending = reader.ports[1]
        ending.before = lambda command: isinstance(command, Leave)
        (session,) = reader.transport._sessions.values()
        closing = asyncio.create_task(session.close())
        await until(lambda: bool(ending.kept))
        reader.ranks._lose(1, "rank 1 has ended")
        try:
            await asyncio.wait_for(closing, PATIENCE_S)
        finally:
            ending.go_on()

    play(scene, shape, shape)


def test_a_session_that_breaks_as_it_begins_says_so_at_once() -> None:
    """Its first message is still being written then."""

    async def scene(holder: Holder, reader: Reader) -> None:
        done(holder, "r", 1)
        lose = partial(holder.ranks._lose, 0, "rank 0 has ended")

        def break_it(command: Command) -> bool:
            if isinstance(command, Join):
                asyncio.get_running_loop().call_soon(lose)
            return False

        holder.ports[0].before = break_it
        key = reader.submit(holder.peer, "r", TOKENS, BLOCKS)
        await until(lambda: reader.failure(key) is not None)
        assert "rank 0 has ended" in reader.failure(key)[3]
        assert holder.sessions.sessions == 0

    play(scene, ONE, ONE)


def test_peers_that_cannot_meet_are_refused_for_good() -> None:
    async def scene(holder: Holder, reader: Reader) -> None:
        for ranks, said in ((b"", "is not set to it"), (messages.encode_offer(NCCL), "is set to 'nccl'")):
            holder.source._hello = replace(holder.source._hello, ranks=ranks)
            name = said.replace(" ", "-")
            done(holder, name, 1)
            key = reader.submit(holder.peer, name, TOKENS, BLOCKS)
            await until(lambda key=key: reader.failure(key) is not None)
            assert reader.failure(key)[2] is RefusalReason.TRANSPORT_MISMATCH
            assert said in reader.failure(key)[3]

    play(scene, ONE, ONE)


def test_idle_sessions_end_where_there_are_too_many() -> None:
    async def scene(holder: Holder, reader: Reader) -> None:
        other = Holder(ONE, 9)
        await other.start()
        try:
            reader.transport._max_sessions = 1
            for index, there in enumerate((holder, other, holder)):
                whole = done(there, f"r{index}", index)
                await reader.ready(reader.submit(there.peer, f"r{index}", TOKENS, BLOCKS))
                np.testing.assert_array_equal(reader.whole(BLOCKS), whole)
                assert reader.transport.sessions == 1
                reader.sink.on_first_step(f"r{index}/0/d0")
            await until(lambda: other.sessions.sessions == 0)
        finally:
            await other.stop()

    play(scene, ONE, ONE)


def test_a_session_that_somebody_waits_for_is_not_idle() -> None:
    """Two are opened at once where one is the most: the second ends no session that the first is about to use."""

    async def scene(holder: Holder, reader: Reader) -> None:
        other, transport = Holder(ONE, 9), reader.transport
        await other.start()
        opened, opened_both = [], asyncio.Event()
        opening = transport._open

        async def open_together(peer: Peer, reshape: Reshape) -> ReaderSession:
            session = await opening(peer, reshape)
            opened.append(session)
            if len(opened) == 2:
                opened_both.set()
            await opened_both.wait()
            return session

        transport._open = open_together
        transport._max_sessions = 1
        try:
            whole = done(holder, "r1", 1), done(other, "r2", 2)
            mine = BLOCKS, list(range(32, 64))
            keys = [
                reader.submit(there.peer, f"r{index}", TOKENS, mine[index - 1])
                for index, there in enumerate((holder, other), 1)
            ]
            for key, blocks, expected in zip(keys, mine, whole, strict=True):
                assert (await reader.ready(key)).retries == 0
                np.testing.assert_array_equal(reader.whole(blocks), expected)
            third = Holder(ONE, 10)
            await third.start()
            done(third, "r3", 3)
            reader.sink.on_first_step(keys[0])
            await reader.ready(reader.submit(third.peer, "r3", TOKENS, BLOCKS))
            assert transport.sessions == 1
            assert {str(session._over) for session in opened[:2]} == {
                "peer_lost: ranks of p: nobody pulls from them, and others are met"
            }
            await third.stop()
        finally:
            await other.stop()

    play(scene, ONE, ONE)


async def talk(holder: Holder, *said: bytes) -> list[messages.Message]:
    """What a session answers, to its end."""
    answers: list[messages.Message] = []

    async def saying() -> AsyncIterator[bytes]:
        for message in said:
            yield message
        await asyncio.Event().wait()

    async def write(message: bytes) -> None:
        answers.append(messages.decode(message))

    await holder.sessions.serve(saying(), write)
    return answers


def test_who_breaks_the_rules_of_a_session_ends_it() -> None:
    async def scene(holder: Holder, _: Reader) -> None:
        cases: list[tuple[RefusalReason, list[bytes]]] = [
            (RefusalReason.CORRUPT, [b"nonsense"]),
            (RefusalReason.CORRUPT, [messages.encode(READ)]),
            (RefusalReason.WRONG_EPOCH, [messages.encode(replace(OPEN, holder_epoch=6))]),
            (RefusalReason.TRANSPORT_MISMATCH, [messages.encode(replace(OPEN, backend="nccl"))]),
            (RefusalReason.CORRUPT, [messages.encode(OPEN), messages.encode(OPEN)]),
            (RefusalReason.CORRUPT, [messages.encode(OPEN), messages.encode(replace(READ, end_token=17))]),
            (RefusalReason.CORRUPT, [messages.encode(OPEN), messages.encode(replace(READ, block_ids=(NUM_BLOCKS,)))]),
            (RefusalReason.LIMIT, [messages.encode(OPEN), messages.encode(READ), messages.encode(READ)]),
        ]
        many = batch_blocks(Reshape(ONE, ONE)) + 1
        read = replace(READ, end_token=16 * many, block_ids=tuple(range(many)), generations=(1,) * many)
        cases.append((RefusalReason.LIMIT, [messages.encode(OPEN), messages.encode(read)]))
        key = messages.encode(messages.PairKey(pair=0, key="x", value=b""))
        cases.append((RefusalReason.LIMIT, [messages.encode(OPEN), *[key] * (MAX_KEYS + 1)]))
        group = replace(ONE.layout.groups[0], num_layers=5)
        other = replace(ONE, layout=replace(ONE.layout, groups=(group,)))
        cases.append((RefusalReason.LAYOUT_MISMATCH, [messages.encode(replace(OPEN, split=other))]))
        for reason, said in cases:
            last = (await talk(holder, *said))[-1]
            assert isinstance(last, messages.End)
            assert last.refusal.reason is reason, said
        assert holder.sessions.sessions == 0

    play(scene, ONE, ONE, timeout_s=0.5)


def test_who_asks_and_does_not_take_the_answers_ends_the_session() -> None:
    """Nothing piles up: a read counts until its answer is written. END has no place behind one that is not taken."""

    async def scene(holder: Holder, _: Reader) -> None:
        answered: list[messages.Message] = []

        async def saying() -> AsyncIterator[bytes]:
            yield messages.encode(OPEN)
            for batch in range(100):
                yield messages.encode(replace(READ, batch=batch))
                for _ in range(10):
                    await asyncio.sleep(0)  # a read of a ticket that is not known is answered by then
            await asyncio.Event().wait()

        async def write(message: bytes) -> None:
            answered.append(messages.decode(message))
            if isinstance(answered[-1], messages.No):
                await asyncio.Event().wait()

        async with asyncio.timeout(PATIENCE_S):
            await holder.sessions.serve(saying(), write)
        assert isinstance(answered[-1], messages.No)
        assert len([answer for answer in answered if isinstance(answer, messages.No)]) == 1
        assert holder.sessions.sessions == 0

    play(scene, ONE, ONE, timeout_s=0.5)
