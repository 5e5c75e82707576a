"""A holder that says what is not due: the reader ends the session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext

import pytest
from ends import Holder, Reader, play, split
from tandem.kvtransfer.collective import messages
from tandem.kvtransfer.collective.commands import Command, Join, Receive
from tandem.kvtransfer.collective.holder import MAX_KEYS
from tandem.kvtransfer.collective.plan import PullPlan
from tandem.kvtransfer.collective.reader import ReaderSession
from tandem.kvtransfer.reshape import Reshape
from tandem.kvtransfer.ticket import HandoffRefused, Peer, RefusalReason
from tickets import ticket_of

ONE = split()
RESHAPE = Reshape(ONE, ONE)
OPENED = messages.Opened(secret=b"y" * messages.NONCE_BYTES)
KEY = messages.PairKey(pair=0, key="k", value=b"v")
GO = messages.Go(batch=1)
NO = messages.No(batch=1, refusal=HandoffRefused(RefusalReason.LIMIT, "full"))


@pytest.mark.parametrize(
    ("said", "why", "wanted"),
    [
        ([OPENED, OPENED], "Opened came", {Join: 1}),
        ([OPENED, *[KEY] * (MAX_KEYS + 1)], "PairKey came", {Join: 1}),
        ([OPENED, messages.PairKey(pair=1, key="k", value=b"")], "PairKey came", {Join: 1}),
        ([OPENED, GO, GO], "Go came", {Join: 1, Receive: 1}),
        ([OPENED, GO, NO], "No came", {Join: 1, Receive: 1}),
        ([OPENED, messages.Go(batch=2)], "Go came", {Join: 1, Receive: 0}),
    ],
)
def test_it_ends_the_session(said: list[messages.Message], why: str, wanted: dict[type[Command], int]) -> None:
    async def scene(_: Holder, reader: Reader) -> None:
        told: list[Command] = []
        reader.ports[0].before = lambda command: told.append(command)  # type: ignore[func-returns-value]
        session = ReaderSession(reader.ranks, Peer("p", 7, "nowhere:1"), RESHAPE, worker_id="d", epoch=8)
        (batch,) = PullPlan(RESHAPE, first_block=0, num_tokens=16).batches(1)
        reading = await session.read(batch, ticket_of(16), ((0, 1),), (0,))

        async def saying() -> AsyncIterator[bytes]:
            for message in said:
                yield messages.encode(message)
            await asyncio.Event().wait()

        async def say(message: bytes) -> None:
            """Nobody hears it."""

        with pytest.raises(HandoffRefused, match=why):
            await session.meet(nullcontext((saying(), say)))
        with pytest.raises(HandoffRefused, match=why):
            await session.finish(reading)
        for kind, times in wanted.items():
            assert sum(isinstance(command, kind) for command in told) == times
        await session.close()

    play(scene, ONE, ONE, timeout_s=2.0)
