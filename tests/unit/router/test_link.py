"""A router's connection to one life of one worker: events to inboxes, refusals by status, every break told."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import Refusal
from tandem.cluster.types import Role, Side
from tandem.router.link import Inbox, LinkLost, SubscriptionKey, WorkerEvent
from tandem.router.mailbox import Mailbox

KEY = SubscriptionKey("q", 0, Side.PREFILL, 1)
SEQUENCE = pb.Sequence(request_id="q", prefill_attempt=1, decode_attempt=1)
EPOCH = 0xE
RESERVE = pb.ReserveRequest(request_id="q", decode_attempt=1, context_tokens=5, epoch=EPOCH)


@scenario
async def test_events_go_to_the_attempt_they_name_and_to_nobody_else(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL)
        inbox: Inbox = Mailbox()
        r.link("p0").subscribe(KEY, inbox)
        other = pb.Sequence(request_id="q", prefill_attempt=2, decode_attempt=1)
        worker.send(
            r.event(other, Side.PREFILL, tokens=(0, [1], "")),
            r.event(SEQUENCE, Side.DECODE, tokens=(0, [2], "")),
            r.event(SEQUENCE, Side.PREFILL, tokens=(0, [3], "")),
        )
        got = await inbox.get()
        assert isinstance(got, WorkerEvent)
        assert [token.token_id for token in got.event.tokens.tokens] == [3]
        assert inbox.empty()
        r.link("p0").unsubscribe(KEY)
        r.link("p0").unsubscribe(KEY)
        worker.send(r.event(SEQUENCE, Side.PREFILL, tokens=(1, [4], "")))
        marker: Inbox = Mailbox()
        r.link("p0").subscribe(SubscriptionKey("m", 0, Side.PREFILL, 1), marker)
        worker.send(r.event(pb.Sequence(request_id="m", prefill_attempt=1), Side.PREFILL, failed=("x", True)))
        await marker.get()
        assert inbox.empty()


@scenario
async def test_a_broken_stream_is_told_to_everybody_once_and_opened_again(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL)
        link, inboxes = r.link("p0"), [Mailbox(), Mailbox()]
        for attempt, inbox in enumerate(inboxes):
            link.subscribe(SubscriptionKey("q", 0, Side.PREFILL, attempt), inbox)
        worker.break_streams()
        for inbox in inboxes:
            lost = await inbox.get()
            assert isinstance(lost, LinkLost)
            assert (lost.worker_id, lost.side) == ("p0", Side.PREFILL)
        await r.until(lambda: len(worker.attached_routers) == 2 and link.attached, "the stream to be back")
        worker.break_streams()
        await r.until(lambda: not link.attached, "the second break")
        assert all(inbox.empty() for inbox in inboxes)


@scenario
async def test_every_failed_call_is_a_refusal_with_its_status(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("d0", Role.DECODE, epoch=EPOCH)
        worker.refuse["Reserve"] = [grpc.StatusCode.RESOURCE_EXHAUSTED]
        with pytest.raises(Refusal, match="d0: Reserve refused") as refused:
            await r.link("d0").reserve(RESERVE)
        assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await r.link("d0").reserve(RESERVE)).epoch == worker.epoch


@scenario
async def test_an_answer_of_another_life_is_refused(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("d0", Role.DECODE, epoch=EPOCH)
        worker.reply_epoch = worker.epoch ^ 2
        with pytest.raises(Refusal, match="another epoch") as refused:
            await r.link("d0").reserve(RESERVE)
        assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


@scenario
async def test_another_life_on_the_same_port_is_never_attached(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("d0", Role.DECODE, epoch=EPOCH)
        link = r.link("d0")
        await worker.die()
        await r.until(lambda: not link.attached, "the break")
        worker.epoch ^= 2
        await worker.start()
        await r.heartbeat(worker)
        await r.until(lambda: r.link("d0").attached, "the new life")
        assert r.link("d0") is not link
        assert not link.attached


@scenario
async def test_closing_refuses_the_call_in_flight_and_all_after_it(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("d0", Role.DECODE, epoch=EPOCH)
        link = r.link("d0")
        worker.hold["Reserve"] = asyncio.Event()
        call = asyncio.create_task(link.reserve(RESERVE))
        await r.until(lambda: worker.calls, "the call to be in flight")
        await link.close()
        await link.close()
        with pytest.raises(Refusal) as refused:
            await call
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(Refusal):
            await link.reserve(RESERVE)
        await link.abort(pb.AbortRequest(request_id="q"))


@scenario
async def test_what_a_worker_that_has_drained_did_not_answer_is_refused_before_it_is_lost(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL, epoch=EPOCH)
        worker.hold["Prefill"] = asyncio.Event()
        link, inbox, here = r.link("p0"), Mailbox(), list[bool]()
        link.subscribe(KEY, inbox)

        async def submit() -> None:
            try:
                await link.prefill(pb.PrefillRequest(sequence=SEQUENCE, epoch=EPOCH))
            finally:
                here.append(inbox.empty())

        call = asyncio.create_task(submit())
        await r.until(lambda: worker.calls, "the call to be in flight")
        worker.leave()
        with pytest.raises(Refusal, match="has drained") as refused:
            await call
        assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert here == [True], "refused, and not lost"
        assert isinstance(await inbox.get(), LinkLost), "the end of the stream is told all the same"


@scenario
async def test_a_caller_that_is_cancelled_is_cancelled(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("d0", Role.DECODE, epoch=EPOCH)
        worker.hold["Reserve"] = asyncio.Event()
        call = asyncio.create_task(r.link("d0").reserve(RESERVE))
        await r.until(lambda: worker.calls, "the call to be in flight")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


@scenario
async def test_an_abort_is_tried_again_and_given_up_with_the_stream(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("d0", Role.DECODE, epoch=EPOCH)
        worker.refuse["Abort"] = [grpc.StatusCode.UNAVAILABLE]
        await r.link("d0").abort(pb.AbortRequest(request_id="q"))
        assert len(worker.requests(pb.AbortRequest)) == 2
        await worker.die()
        await r.until(lambda: not r.link("d0").attached, "the break")
        await r.link("d0").abort(pb.AbortRequest(request_id="q"))
        assert len(worker.requests(pb.AbortRequest)) == 2
