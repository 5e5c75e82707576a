"""Calls between a worker and its mover: one item at a time, an end that means the end, nothing left when one goes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import pytest
import uvloop
from tandem.kvtransfer.mover import link
from tandem.kvtransfer.mover.link import WINDOW, Handler, Link, _Kind
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason

PATIENCE_S = 20.0


class Ends:
    """Both ends of a link on one loop, and what happened in the order in which it did."""

    def __init__(self, handlers: Mapping[str, Handler], cancel_s: float = PATIENCE_S) -> None:
        self.happened: list[str] = []
        self.near = Link(
            "the other end",
            {"back": self.back},
            on_lost=lambda: self.happened.append("near lost"),
            on_stuck=self.stuck,
            cancel_s=cancel_s,
        )
        self.far = Link("this end", handlers, on_lost=lambda: self.happened.append("far lost"))

    async def back(self, body: bytes) -> AsyncGenerator[bytes, None]:
        yield body + b" and back"

    def stuck(self) -> None:
        self.happened.append("stuck")
        self.far.close()


def play(
    handlers: Mapping[str, Handler],
    scene: Callable[[Ends], Awaitable[None]],
    *,
    cancel_s: float = 20.0,
    run_on: Callable[[Any], Any] = asyncio.run,
) -> Ends:
    async def run() -> Ends:
        ends = Ends(handlers, cancel_s)
        one, other = socket.socketpair()
        await ends.near.join(one)
        await ends.far.join(other)
        async with asyncio.timeout(PATIENCE_S):
            await scene(ends)
            ends.near.close()
            ends.far.close()
            await until(lambda: {"near lost", "far lost"} <= set(ends.happened))
        return ends

    ends: Ends = run_on(run())
    return ends


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0)


async def echo(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def refuse(body: bytes) -> AsyncGenerator[bytes, None]:
    raise HandoffRefused(RefusalReason.EXPIRED, "too late")
    yield b""


@pytest.mark.parametrize("run_on", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_both_ends_ask(run_on: Callable[[Any], Any]) -> None:
    async def scene(ends: Ends) -> None:
        assert await ends.near.ask("echo", b"x" * 100_000, timeout_s=PATIENCE_S) == b"x" * 100_000
        assert await ends.far.ask("back", b"there", timeout_s=PATIENCE_S) == b"there and back"

    play({"echo": echo}, scene, run_on=run_on)


def test_an_answer_ends_its_call_and_nothing_more_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    take = Link._take

    def heard(self: Link, message: list[Any]) -> None:
        said.append(_Kind(message[0]).name)
        take(self, message)

    monkeypatch.setattr(Link, "_take", heard)

    async def scene(ends: Ends) -> None:
        assert await ends.near.ask("echo", b"x", timeout_s=PATIENCE_S) == b"x"
        assert await ends.near.ask("echo", b"y", timeout_s=PATIENCE_S) == b"y"

    play({"echo": echo}, scene)
    assert said == ["CALL", "ITEM", "DONE"] * 2


def test_what_waits_for_an_end_that_reads_nothing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_UNSENT_BYTES", 2**18)

    async def scene(ends: Ends) -> None:
        assert ends.far._transport is not None
        assert ends.near._transport is not None
        ends.far._transport.pause_reading()
        ask = ends.near.ask
        begun = [asyncio.create_task(ask("echo", b"x" * 2**16, timeout_s=PATIENCE_S)) for _ in range(100)]
        await until(lambda: begun[-1].done())
        refusals = [task for task in begun if task.done()]
        assert 0 < len(refusals) < 100
        for refused in refusals:
            error = refused.exception()
            assert isinstance(error, HandoffRefused)
            assert error.reason is RefusalReason.LIMIT
        assert ends.near._transport.get_write_buffer_size() < 2**19
        ends.far._transport.resume_reading()
        answers = await asyncio.gather(*(task for task in begun if task not in refusals))
        assert {len(answer) for answer in answers} == {2**16}
        assert await ends.near.ask("echo", b"again", timeout_s=PATIENCE_S) == b"again"

    play({"echo": echo}, scene)


def test_a_refusal_keeps_its_reason() -> None:
    async def scene(ends: Ends) -> None:
        for method, reason in (("refuse", RefusalReason.EXPIRED), ("nothing", RefusalReason.INVALID)):
            with pytest.raises(HandoffRefused) as refused:
                await ends.near.ask(method, b"", timeout_s=PATIENCE_S)
            assert refused.value.reason is reason

    play({"refuse": refuse}, scene)


def test_a_handler_is_a_window_ahead_of_its_caller() -> None:
    made: list[int] = []

    async def count(body: bytes) -> AsyncGenerator[bytes, None]:
        for number in range(5):
            made.append(number)
            yield str(number).encode()

    async def scene(ends: Ends) -> None:
        taken = []
        async with aclosing(ends.near.stream("count", b"")) as items:
            async for item in items:
                taken.append(item)
                await ends.near.ask("echo", b"", timeout_s=PATIENCE_S)  # whatever is on its way has come
                assert len(made) == min(5, len(taken) + WINDOW - 1)
        assert taken == [b"0", b"1", b"2", b"3", b"4"]

    play({"count": count, "echo": echo}, scene)


def test_who_leaves_early_hears_the_end_of_the_handler() -> None:
    happened: list[str] = []

    async def write(body: bytes) -> AsyncGenerator[bytes, None]:
        try:
            yield b"first"
            await asyncio.sleep(PATIENCE_S)
        finally:
            await asyncio.sleep(0.01)
            happened.append("written for the last time")

    async def scene(ends: Ends) -> None:
        async def read() -> None:
            async with aclosing(ends.near.stream("write", b"")) as items:
                async for _ in items:
                    happened.append("read")
                    await asyncio.sleep(PATIENCE_S)

        reader = asyncio.create_task(read())
        await until(lambda: happened == ["read"])
        reader.cancel()
        await asyncio.sleep(0)
        reader.cancel()  # again, while it waits for the end
        await asyncio.wait([reader])
        assert reader.cancelled()
        assert happened == ["read", "written for the last time"]

    play({"write": write}, scene)


def test_an_end_that_goes_takes_its_calls_and_handlers_with_it() -> None:
    ended: list[str] = []

    async def hang(body: bytes) -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.sleep(PATIENCE_S)
            yield b""
        finally:
            ended.append("handler")

    async def scene(ends: Ends) -> None:
        asked = asyncio.create_task(ends.near.ask("hang", b"", timeout_s=PATIENCE_S))
        await until(lambda: bool(ends.far._served))
        ends.far.close()
        with pytest.raises(HandoffRefused) as refused:
            await asked
        assert refused.value.reason is RefusalReason.PEER_LOST
        with pytest.raises(HandoffRefused) as refused:
            await ends.near.ask("hang", b"", timeout_s=PATIENCE_S)
        assert refused.value.reason is RefusalReason.PEER_LOST
        await until(lambda: ended == ["handler"])

    play({"hang": hang}, scene)


def test_an_end_that_cannot_be_reached_is_given_up() -> None:
    async def hang(body: bytes) -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(PATIENCE_S)
        yield b""

    async def scene(ends: Ends) -> None:
        asked = asyncio.create_task(ends.near.ask("hang", b"", timeout_s=PATIENCE_S))
        await until(lambda: bool(ends.far._served))
        ends.near.give_up()
        with pytest.raises(HandoffRefused) as refused:
            await asked
        assert refused.value.reason is RefusalReason.PEER_LOST
        await until(lambda: not ends.far._served)  # it was told

    play({"hang": hang}, scene)


def test_a_handler_that_does_not_end_is_somebody_elses_to_end() -> None:
    async def stubborn(body: bytes) -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.sleep(PATIENCE_S)
            yield b""
        finally:
            await asyncio.sleep(PATIENCE_S)

    async def scene(ends: Ends) -> None:
        with pytest.raises(HandoffRefused) as refused:
            await ends.near.ask("stubborn", b"", timeout_s=0.01)
        assert refused.value.reason is RefusalReason.DEADLINE
        for served in ends.far._served.values():
            assert served.task is not None
            served.task.cancel()

    assert "stuck" in play({"stubborn": stubborn}, scene, cancel_s=0.01).happened


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\1\0\0\0\xc1", b"\3\0\0\0\x92\0\1", b"\1\0\0\0\1"], ids=repr
)
def test_what_is_no_message_ends_the_link(garbage: bytes) -> None:
    async def scene(ends: Ends) -> None:
        assert ends.near._transport is not None
        ends.near._transport.write(garbage)
        await until(lambda: "near lost" in ends.happened)

    play({"echo": echo}, scene)
