"""Commands of a router's stream, run and answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.worker.commands import Commands
from tandem.cluster.worker.outbox import Outbox


class Handler:
    """Remembers what ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def run_prefill(self, request: pb.PrefillRequest) -> None:
        self.ran.append("prefill")

    async def run_reserve(self, request: pb.ReserveRequest) -> int:
        self.ran.append("reserve")
        return 9

    async def run_decode(self, request: pb.DecodeRequest) -> None:
        self.ran.append("decode")

    def run_abort(self, request: pb.AbortRequest) -> None:
        self.ran.append("abort")


async def frames(*commands: pb.Command) -> AsyncIterator[pb.RouterFrame]:
    yield pb.RouterFrame(commands=commands)


@pytest.mark.parametrize("ends", [False, True], ids=["stands", "has ended"])
@scenario
async def test_nothing_begins_for_a_stream_that_has_ended(ends: bool) -> None:
    outbox, handler = Outbox(7), Handler()
    stream = outbox.attach("r")
    commands = Commands(handler, outbox, stream, 7)
    prefill = pb.Command(id=1, prefill=pb.PrefillRequest())
    await commands.read(frames(pb.Command(id=2, reserve=pb.ReserveRequest()), prefill))
    if ends:  # the prompt's task has not run yet
        stream.close()
    for _ in range(3):  # the prompt's task runs to its end
        await asyncio.sleep(0)
    assert handler.ran == (["reserve"] if ends else ["reserve", "prefill"])
    outbox.close()
