"""Commands to a worker: what leaves at once, and what with the next frame."""

from __future__ import annotations

import asyncio

import pytest
from scenario import scenario
from tandem.cluster import rpc
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import Refusal
from tandem.router.commands import Commands
from tandem.router.pace import Pace


def ignore(answer: pb.Answer | Refusal) -> None:
    """Nobody waits for it."""


async def ids(commands: Commands) -> list[int]:
    frame = await asyncio.wait_for(commands.next_frame(), 10)
    return [command.id for command in frame.commands]


@scenario
async def test_a_command_that_may_wait_leaves_with_the_next_frame_or_soon() -> None:
    commands = Commands("w", 7)
    commands.send(pb.Command(), ignore, at_once=False)
    assert await ids(commands) == [1]  # nothing has just left
    writer = asyncio.create_task(ids(commands))
    await asyncio.sleep(0)
    commands.send(pb.Command(), ignore, at_once=False)
    commands.send(pb.Command(), ignore)
    assert await writer == [2, 3]
    writer = asyncio.create_task(ids(commands))
    await asyncio.sleep(0)
    commands.send(pb.Command(), ignore, at_once=False)
    assert await writer == [4]
    commands.fail("it is over")


def test_a_command_that_may_wait_wakes_nobody_by_itself_and_goes_with_one_that_may_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "SMALL_WAIT_S", 60.0)

    async def run() -> None:
        commands = Commands("w", 7)
        commands.send(pb.Command(), ignore)
        assert await ids(commands) == [1]
        writer = asyncio.create_task(ids(commands))
        await asyncio.sleep(0.02)  # it waits
        commands.send(pb.Command(), ignore, at_once=False)
        await asyncio.sleep(0.02)
        assert not writer.done()
        commands.send(pb.Command(), ignore)
        assert await writer == [2, 3]
        commands.fail("it is over")

    asyncio.run(run())


def test_where_the_router_is_busy_a_command_waits_for_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        commands = Commands("w", 7)
        commands.send(pb.Command(), ignore)
        assert await ids(commands) == [1]
        writer = asyncio.create_task(ids(commands))
        await asyncio.sleep(0.02)  # it waits
        for _ in range(2):
            commands.send(pb.Command(), ignore)
            await asyncio.sleep(0.02)
        assert not writer.done()
        writer.cancel()
        commands.fail("the stream broke")
        again = asyncio.create_task(ids(commands))
        await asyncio.sleep(0.02)
        assert not again.done(), "what had not left never leaves"
        again.cancel()

    monkeypatch.setattr(Pace, "left", lambda pace, now_s: setattr(pace, "gap_s", 60.0))
    asyncio.run(run())


def test_what_had_to_wait_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        commands = Commands("w", 7)
        for number in range(1, 9):
            commands.send(pb.Command(), ignore, at_once=bool(number % 2))
            assert await ids(commands) == [number]
        commands.fail("it is over")

    monkeypatch.setattr(Pace, "left", lambda pace, now_s: setattr(pace, "gap_s", 0.005))
    asyncio.run(run())


@scenario
async def test_what_comes_while_a_frame_is_written_leaves_behind_it() -> None:
    commands = Commands("w", 7)
    commands.send(pb.Command(), ignore)
    assert await ids(commands) == [1]
    commands.send(pb.Command(), ignore)  # nobody asks for the next frame yet
    commands.send(pb.Command(), ignore, at_once=False)
    assert await ids(commands) == [2, 3]
    commands.fail("it is over")


@scenario
async def test_what_waits_when_the_stream_breaks_is_refused_and_never_leaves() -> None:
    commands, heard = Commands("w", 7), []
    commands.send(pb.Command(), ignore)
    await ids(commands)
    commands.send(pb.Command(), heard.append, at_once=False)
    commands.fail("it broke")
    assert [type(answer) for answer in heard] == [Refusal]
    commands.send(pb.Command(), ignore)
    assert await ids(commands) == [3]
    commands.fail("it is over")
