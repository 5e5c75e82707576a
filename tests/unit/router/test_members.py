"""Who is in the cluster: joining, coming back, falling silent, being refused; and the view that placement ranks."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from scenario import scenario
from tandem.cluster.clock import VirtualClock
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import Refusal
from tandem.cluster.types import Role, Side, Urgency
from tandem.router.link import SubscriptionKey
from tandem.router.mailbox import Mailbox


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worker_id": ""}, "all three must be set"),
        ({"epoch": 0}, "all three must be set"),
        ({"address": ""}, "all three must be set"),
        ({"protocol_version": 999}, "protocol_version: 999"),
        ({"role": "cook"}, "'cook' is not one of"),
        ({"step_time": pb.StepTime(decode_row_s=math.nan)}, "step_time.decode_row_s: nan is not a finite number"),
        ({"step_time": pb.StepTime(step_s=-0.1)}, "step_time.step_s: -0.1 is not a finite number"),
    ],
)
@scenario
async def test_a_mismatched_member_is_refused_when_it_comes(rig: Any, change: dict[str, Any], message: str) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL)
        with pytest.raises(Refusal, match=message):
            await r.heartbeat(worker, **change)
        assert len(r.members.members()) == 1


@scenario
async def test_a_new_epoch_is_a_new_member_and_the_old_one_is_dead(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL)
        old, old_epoch = r.link("p0"), worker.epoch
        r.members.prefixes.insert("p0", [b"key"], 10)
        worker.epoch ^= 2
        await r.heartbeat(worker)
        assert r.link("p0") is not old
        assert r.link("p0").epoch == worker.epoch
        assert r.members.prefixes.match_blocks("p0", [b"key"]) == 0
        with pytest.raises(Refusal, match="replaced by a newer life"):
            await r.heartbeat(worker, epoch=old_epoch)
        assert len(r.members.members()) == 1
        await r.until(lambda: not old.attached, "the old link to be closed")


@scenario
async def test_routable_is_attached_and_heard_and_not_draining(rig: Any) -> None:
    async with rig() as r:
        clock = VirtualClock()
        r.members._clock = clock
        worker = await r.worker("p0", Role.PREFILL)
        [member] = r.members.members()

        def routable() -> bool:
            return len(r.members.routable(Role.PREFILL, Role.MIXED)) == 1

        assert routable()
        assert not r.members.routable(Role.DECODE)
        await r.heartbeat(worker, draining=True)
        assert (routable(), r.members.why_not_routable(member)) == (False, "draining")
        await r.heartbeat(worker)
        clock.advance(1001)
        assert (routable(), r.members.why_not_routable(member)) == (False, "no heartbeat")
        await r.heartbeat(worker)
        assert routable()
        await worker.die()
        await r.until(lambda: not r.link("p0").attached, "the break")
        assert (routable(), r.members.why_not_routable(member)) == (False, "not attached")


@scenario
async def test_the_silent_are_forgotten_by_the_next_arrival(rig: Any) -> None:
    async with rig() as r:
        clock = VirtualClock()
        r.members._clock = clock
        gone, quiet = await r.worker("p0", Role.PREFILL), await r.worker("p1", Role.PREFILL)
        await gone.die()
        await r.until(lambda: not r.link("p0").attached, "the break")
        clock.advance(61)
        await r.worker("p2", Role.PREFILL)
        assert r.members.link("p0") is None
        assert r.members.link("p1") is not None  # silent, but its stream stands
        assert r.members.kv_address("p0") == ""
        assert r.members.kv_address("p1") == f"127.0.0.1:{quiet.port + 1}"


@scenario
async def test_views_are_heartbeats_corrected_by_what_was_sent_since(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("d0", Role.DECODE, running=2, queued_prefill_tokens=10, free_blocks=5, cached_blocks=7)
        [view] = r.members.routable(Role.DECODE)
        assert (view.running, view.queued_prefill_tokens, view.available_blocks) == (2, 10, 12)
        sent = r.link("d0").sent
        sent.prompt_sent(300, 0)
        for _ in range(5):
            sent.row_begun(1.0)
        [view] = r.members.routable(Role.DECODE)
        assert (view.running, view.queued_prefill_tokens) == (7, 310), "what others sent, and what we have sent since"
        await r.heartbeat(worker, running=6, queued_prefill_tokens=310)
        sent.prompt_done(300, 0)
        for _ in range(4):
            sent.row_ended(1.0)
        [view] = r.members.routable(Role.DECODE)
        assert (view.running, view.queued_prefill_tokens) == (2, 10), "what of it was ours is as we know it now"
        sent.row_ended(1.0)


@scenario
async def test_what_other_routers_sent_without_a_deadline_is_patient_too(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL, queued_prefill_tokens=500, patient_prefill_tokens=400)
        soon, whenever = Urgency(deadline_s=1.0), Urgency()
        [view] = r.members.routable(Role.PREFILL)
        assert (view.tokens_before(soon), view.tokens_before(whenever)) == (100, 500)
        r.link("p0").sent.prompt_sent(300, 200)
        await r.heartbeat(worker, queued_prefill_tokens=800, patient_prefill_tokens=600)
        [view] = r.members.routable(Role.PREFILL)
        assert (view.tokens_before(soon), view.tokens_before(whenever)) == (200, 800)
        r.link("p0").sent.prompt_done(300, 200)
        [view] = r.members.routable(Role.PREFILL)
        assert (view.tokens_before(soon), view.tokens_before(whenever)) == (100, 500), "ours is as we know it now"


@scenario
async def test_whoever_watches_hears_of_a_heartbeat_and_of_a_broken_stream(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL)
        changed = asyncio.Event()
        r.members.watch(changed.set)
        await r.heartbeat(worker)
        assert changed.is_set()
        changed.clear()
        await worker.die()
        await changed.wait()


@scenario
async def test_nobody_joins_a_router_that_stops(rig: Any) -> None:
    async with rig() as r:
        worker = await r.worker("p0", Role.PREFILL)
        await r.members.close()
        await r.members.close()
        with pytest.raises(Refusal, match="stopping"):
            await r.heartbeat(worker)
        assert r.members.members() == ()


@scenario
async def test_a_silent_worker_is_given_up_once_and_welcome_when_it_goes_on(rig: Any) -> None:
    async with rig() as r:
        clock = VirtualClock()
        r.members._clock, r.members._lost_after_s, r.members._timeout_s = clock, 0.2, 0.1
        worker = await r.worker("p0", Role.PREFILL)
        inbox: Mailbox[Any] = Mailbox()
        key = SubscriptionKey("q", 0, Side.PREFILL, 1)
        r.link("p0").subscribe(key, inbox)
        for _ in range(40):  # silence is counted only as far as the router itself was running
            clock.advance(0.03)
            await asyncio.sleep(0.02)
            if not inbox.empty():
                break
        lost = inbox.get_nowait()
        assert (lost.silent, lost.side, lost.message) == (True, Side.PREFILL, "no heartbeat for 0.2 s")
        assert not r.members.routable(Role.PREFILL)
        await r.until(lambda: len(worker.attached_routers) == 2, "a new stream in place of the one given up")
        await r.until(lambda: r.link("p0").attached, "it to stand")
        assert len(worker._streams) == 1
        await r.heartbeat(worker)
        assert len(r.members.routable(Role.PREFILL)) == 1
        assert inbox.empty()


@scenario
async def test_who_was_forgotten_may_come_back_unless_another_life_did(rig: Any) -> None:
    async with rig() as r:
        clock = VirtualClock()
        r.members._clock = clock
        worker = await r.worker("p0", Role.PREFILL)
        first = worker.epoch

        async def forget() -> None:
            link = r.link("p0")
            await link.close()
            clock.advance(61)
            assert r.members.members() == ()

        await forget()
        await r.heartbeat(worker)
        assert r.link("p0").epoch == first
        await forget()
        worker.epoch ^= 2
        await r.heartbeat(worker)
        with pytest.raises(Refusal, match="replaced by a newer life"):
            await r.heartbeat(worker, epoch=first)
