"""Streams to routers: one frame per flush, bounded, and exactly one current stream per router."""

from __future__ import annotations

import asyncio

import pytest
from scenario import scenario
from tandem.cluster import rpc
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.worker import outbox as module
from tandem.cluster.worker.outbox import Outbox, RouterStream


def frames(stream: RouterStream) -> list[list[str] | None]:
    """What is buffered: request ids by frame, None for the end."""
    taken: list[list[str] | None] = []
    while not stream.frames.empty():
        frame = stream.frames.get_nowait()
        taken.append(None if frame is None else [event.request_id for event in frame.events])
    return taken


def event(name: str) -> pb.Event:
    return pb.Event(request_id=name)


def test_a_flush_is_one_frame_for_each_router() -> None:
    outbox = Outbox(7)
    a, b = outbox.attach("a"), outbox.attach("b")
    for router_id, name in (("a", "1"), ("b", "2"), ("a", "3"), ("nobody", "4")):
        outbox.post(router_id, event(name))
    outbox.flush()
    outbox.flush()
    outbox.post("a", event("5"))
    outbox.flush()
    assert frames(a) == [["1", "3"], ["5"]]
    assert frames(b) == [["2"]]


def test_an_answer_that_may_wait_leaves_with_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "SMALL_WAIT_S", 60.0)

    async def run() -> None:
        outbox = Outbox(7)
        stream = outbox.attach("a")
        outbox.answer(stream, pb.Answer(id=1), at_once=False)
        await asyncio.sleep(0.01)
        assert stream.frames.qsize() == 1, "no frame had just left"
        outbox.answer(stream, pb.Answer(id=2), at_once=False)
        await asyncio.sleep(0.02)
        assert stream.frames.qsize() == 1
        outbox.answer(stream, pb.Answer(id=3))
        await asyncio.sleep(0.01)
        frames = [stream.frames.get_nowait() for _ in range(stream.frames.qsize())]
        assert [[answer.id for answer in frame.answers] for frame in frames if frame is not None] == [[1], [2, 3]]
        outbox.close()

    asyncio.run(run())


@scenario
async def test_what_a_router_did_not_read_leaves_in_one_frame() -> None:
    outbox = Outbox(7)
    stream = outbox.attach("a")
    for name in ("1", "2"):
        outbox.post("a", event(name))
        outbox.flush()
    outbox.answer(stream, pb.Answer(id=3))
    outbox.flush()
    stream.close()
    frame = await stream.next_frame()
    assert frame is not None
    assert [one.request_id for one in frame.events] == ["1", "2"]
    assert [answer.id for answer in frame.answers] == [3]
    assert await stream.next_frame() is None


@scenario
async def test_answers_of_one_turn_of_the_loop_leave_with_its_events() -> None:
    outbox = Outbox(7)
    stream = outbox.attach("a")
    outbox.answer(stream, pb.Answer(id=1))
    outbox.answer(stream, pb.Answer(id=2))
    outbox.post("a", event("1"))
    frame = await asyncio.wait_for(stream.next_frame(), 10)
    assert frame is not None
    assert ([answer.id for answer in frame.answers], len(frame.events)) == ([1, 2], 1)
    assert stream.frames.empty()


def test_frames_carry_the_epoch() -> None:
    outbox = Outbox(7)
    stream = outbox.attach("a")
    outbox.post("a", event("1"))
    outbox.flush()
    frame = stream.frames.get_nowait()
    assert frame is not None
    assert frame.epoch == 7


def test_a_second_stream_ends_the_first_and_takes_over() -> None:
    outbox = Outbox(7)
    first = outbox.attach("a")
    second = outbox.attach("a")
    outbox.post("a", event("1"))
    outbox.flush()
    assert frames(first) == [None]
    assert frames(second) == [["1"]]
    assert not outbox.detach(first)  # not the current one: nothing of the router ends
    assert outbox.attached("a")
    assert outbox.detach(second)
    assert not outbox.attached("a")
    assert len(outbox) == 0


def test_what_was_posted_for_a_stream_that_went_is_dropped() -> None:
    outbox = Outbox(7)
    outbox.post("a", event("0"))
    stream = outbox.attach("a")
    outbox.post("a", event("1"))
    outbox.detach(stream)
    stream = outbox.attach("a")
    outbox.flush()
    assert frames(stream) == []


def test_a_router_that_does_not_read_is_cut_off_at_the_bound() -> None:
    outbox = Outbox(7)
    slow, quick = outbox.attach("slow"), outbox.attach("quick")
    for i in range(module.MAX_BUFFERED_FRAMES + 10):
        for router_id in ("slow", "quick"):
            outbox.post(router_id, event(str(i)))
        outbox.flush()
        frames(quick)
    assert not outbox.attached("slow")
    assert outbox.attached("quick")
    got = frames(slow)
    assert (len(got), got[-1]) == (module.MAX_BUFFERED_FRAMES + 1, None)


def test_closing_ends_every_stream_once() -> None:
    outbox = Outbox(7)
    streams = [outbox.attach(name) for name in "ab"]
    outbox.close()
    outbox.close()
    outbox.post("a", event("late"))
    outbox.flush()
    assert [frames(stream) for stream in streams] == [[None], [None]]


@scenario
async def test_who_leaves_answers_first_and_says_so_last() -> None:
    outbox = Outbox(7)
    read, slow = outbox.attach("read"), outbox.attach("slow")
    outbox.answer(read, pb.Answer(id=1, code=9))
    outbox.leave()
    outbox.close()
    frame = read.frames.get_nowait()
    assert frame is not None
    assert ([answer.id for answer in frame.answers], frame.leaving) == ([1], False)
    outbox.answer(read, pb.Answer(id=2))
    outbox.flush()
    for stream in (read, slow):
        frame = await stream.next_frame()
        assert frame is not None
        assert (frame.epoch, frame.leaving, len(frame.answers)) == (7, True, 0)
        assert await stream.next_frame() is None


@scenario
async def test_what_leaves_unread_in_one_frame_says_that_it_is_the_last() -> None:
    outbox = Outbox(7)
    stream = outbox.attach("a")
    outbox.post("a", event("1"))
    outbox.leave()
    frame = await stream.next_frame()
    assert frame is not None
    assert ([one.request_id for one in frame.events], frame.leaving) == (["1"], True)


@scenario
async def test_an_answer_that_may_wait_leaves_with_the_next_frame_or_soon() -> None:
    outbox = Outbox(7)
    stream = outbox.attach("a")
    outbox.answer(stream, pb.Answer(id=1), at_once=False)  # nothing has just left
    assert await answers(stream) == [1]
    outbox.answer(stream, pb.Answer(id=2), at_once=False)
    outbox.post("a", event("1"))
    outbox.flush()
    assert await answers(stream) == [2]
    outbox.answer(stream, pb.Answer(id=3), at_once=False)
    outbox.answer(stream, pb.Answer(id=4), at_once=True)
    assert await answers(stream) == [3, 4]
    outbox.answer(stream, pb.Answer(id=5), at_once=False)
    assert await answers(stream) == [5]
    outbox.close()


async def answers(stream: RouterStream) -> list[int]:
    frame = await asyncio.wait_for(stream.next_frame(), 10)
    assert frame is not None
    assert stream.frames.empty()
    return [answer.id for answer in frame.answers]
