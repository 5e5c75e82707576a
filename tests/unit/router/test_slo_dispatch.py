"""Promises through the core, before scripted workers: what they are told, who is asked, who is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest
from scenario import scenario
from tandem.cluster.config import RouterConfig
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import SLO, Role, SamplingParams, Side, Urgency
from tandem.router import dispatch_policy
from tandem.router.attempt import Work
from tandem.router.errors import PromiseUnattainable, Unavailable
from tandem.router.slo_classes import BATCH, SLOClasses

P, D = Side.PREFILL, Side.DECODE
CLASSES = SLOClasses(RouterConfig())
SLOW = pb.StepTime(step_s=0.0, prefill_token_s=0.01, decode_row_s=0.01)


def answer(r: Any, prefill: Any, decode: Any) -> None:
    """Every request is answered at once."""
    prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
    decode.on_decode = lambda request: [r.event(request.sequence, D, tokens=(0, list(b"abcd"), "length"))]


@scenario
async def test_workers_are_told_where_a_request_stands_and_clients_under_which_promise_it_stood(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        answer(r, prefill, decode)
        deltas = await r.collect(r.request(promise=CLASSES.promise(ttft_s=30.0)))
        assert deltas[-1].timings.slo_class == "interactive"
        [reserve], [asked] = decode.requests(pb.ReserveRequest), prefill.requests(pb.PrefillRequest)
        [redeemed] = decode.requests(pb.DecodeRequest)
        for urgency in (reserve.urgency, asked.sequence.urgency, redeemed.sequence.urgency):
            assert (urgency.slo_class, urgency.share) == ("interactive", 0.9)
            assert 20.0 < urgency.ttft_left_s <= 30.0
        await r.collect(r.request(promise=CLASSES.promise(BATCH)))
        urgency = prefill.requests(pb.PrefillRequest)[-1].sequence.urgency
        assert (urgency.slo_class, urgency.HasField("ttft_left_s")) == ("batch", False)
        assert r.metric("slo_choices_total", slo_class="interactive") == 1
        assert r.metric("slo_attained_total", slo_class="batch") == 1
        r.assert_nothing_left()


@scenario
async def test_a_decode_worker_that_would_break_a_promise_is_not_asked_until_it_could_keep_it(rig: Any) -> None:
    async with rig() as r:
        prefill = await r.worker("p0", Role.PREFILL)
        decode = await r.worker("d0", Role.DECODE, running=4, step_time=SLOW)
        answer(r, prefill, decode)
        tight = CLASSES.promise(ttft_s=60.0, tpot_s=0.045)  # with a fifth row a token would take 50 ms
        waiting = asyncio.create_task(r.collect(r.request(promise=tight)))
        await r.until(lambda: r.core._dispatcher.waiting_by_class(), "the request to wait")
        for _ in range(5):
            await r.heartbeat(decode)
            await asyncio.sleep(0.01)
        assert not decode.requests(pb.ReserveRequest)
        await r.heartbeat(decode, running=3)
        await waiting
        assert len(decode.requests(pb.ReserveRequest)) == 1
        r.assert_nothing_left()


@scenario
async def test_the_rows_that_run_keep_their_promise_too(rig: Any) -> None:
    async with rig() as r:
        prefill = await r.worker("p0", Role.PREFILL)
        decode = await r.worker("d0", Role.DECODE, step_time=SLOW)
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        tight = r.core.generate(r.request(promise=CLASSES.promise(ttft_s=60.0, tpot_s=0.015)))
        await anext(tight)
        assert r.link("d0").sent.tightest_tpot_s == 0.015
        other = asyncio.create_task(r.collect(r.request(promise=CLASSES.promise(BATCH))))
        await r.until(lambda: r.core._dispatcher.waiting_by_class() == {"batch": 1}, "the other to wait")
        await r.heartbeat(decode)
        assert len(decode.requests(pb.ReserveRequest)) == 1, "a second row would break the first one's promise"
        await tight.aclose()
        answer(r, prefill, decode)
        await other
        r.assert_nothing_left()


@scenario
async def test_what_waits_ahead_is_known_at_the_door_at_once(rig: Any) -> None:
    """A burst that arrives in one turn of the loop is not let in as if each were alone."""
    async with rig(slo=SLO(ttft_s=1.0, tpot_s=0.1)) as r:
        await r.worker("p0", Role.PREFILL, step_time=SLOW, steps_total=100)
        await r.worker("d0", Role.DECODE)
        streams = [r.core.generate(r.request(prompt=range(20))) for _ in range(20)]  # 0.2 s of work each
        firsts = [asyncio.create_task(anext(stream)) for stream in streams]
        await r.until(lambda: sum(first.done() for first in firsts) >= 10, "refusals")
        refused = [first.exception() for first in firsts if first.done()]
        assert all(isinstance(error, PromiseUnattainable) for error in refused)
        assert 1 <= 20 - len(refused) <= 5, "not more than about a second's work was let in"
        assert all(error.retry_after_s >= 1 for error in refused)
        assert r.metric("request_refusals_total", reason="slo_unattainable") == len(refused)
        for first in firsts:
            first.cancel()
        await asyncio.gather(*firsts, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        r.assert_nothing_left()
        assert not r.core._dispatcher.waiting_by_class()


@scenario
async def test_a_promise_that_nobody_can_keep_is_refused_from_the_first_request_on(rig: Any) -> None:
    """Workers know their step times before they have served: what their device's latency model says, or timed steps."""
    async with rig() as r:
        await r.worker("p0", Role.PREFILL, step_time=SLOW, learned_steps=8)
        await r.worker("d0", Role.DECODE, step_time=SLOW, learned_steps=8)
        with pytest.raises(PromiseUnattainable, match=r"own promise is 0\.001 s; even an idle cluster would need"):
            await anext(r.core.generate(r.request(promise=CLASSES.promise(ttft_s=0.001))))
        r.assert_nothing_left()


@scenario
async def test_a_prefill_worker_with_work_for_a_while_is_sent_no_more(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.worker("p0", Role.PREFILL, step_time=SLOW), await r.worker("d0", Role.DECODE)
        loose = CLASSES.promise(ttft_s=3600.0)
        asks = [r.request(prompt=range(i, i + 500), promise=loose) for i in range(1000, 6000, 1000)]
        long = [r.core.generate(replace(ask, request_id=f"q{i}")) for i, ask in enumerate(asks)]
        firsts = [asyncio.create_task(anext(stream)) for stream in long]
        await r.until(lambda: len(prefill.requests(pb.PrefillRequest)) == 2, "two of them to be sent")
        urgent = asyncio.create_task(r.collect(r.request(prompt=range(600, 605))))
        await r.until(lambda: r.core._dispatcher.waiting_by_class() == {"interactive": 4}, "the others")
        answer(r, prefill, decode)
        sent = prefill.requests(pb.PrefillRequest)
        prefill.send(r.event(sent[0].sequence, P, tokens=(0, list(b"a"), "")))
        await urgent
        third = prefill.requests(pb.PrefillRequest)[2].sequence
        assert len(third.prompt_token_ids) == 5, "who came last and is due first goes first when there is room"
        for first in firsts:
            first.cancel()
        await asyncio.gather(*firsts, return_exceptions=True)
        for stream in long:
            await stream.aclose()
        r.assert_nothing_left()


@scenario
async def test_everybody_who_waits_for_workers_hears_that_none_came(rig: Any) -> None:
    async with rig(unready_wait_s=0.1) as r:
        asked = [asyncio.create_task(r.collect(r.request())) for _ in range(5)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, Unavailable) for error in results)
        assert not r.core._dispatcher.waiting_by_class()


@scenario
async def test_many_are_dispatched_at_once_not_one_round_trip_after_the_other(rig: Any) -> None:
    async with rig() as r:
        _, decode = await r.split()
        decode.hold["Reserve"] = asyncio.Event()
        streams = [r.core.generate(r.request()) for _ in range(12)]
        firsts = [asyncio.create_task(anext(stream)) for stream in streams]
        await r.until(lambda: len(decode.requests(pb.ReserveRequest)) == 12, "all to ask while none is answered")
        for first in firsts:
            first.cancel()
        decode.hold["Reserve"].set()
        await asyncio.gather(*firsts, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        r.assert_nothing_left()


@scenario
async def test_who_was_refused_asks_again_soon_after_a_change_however_far_its_own_retry_is(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_policy, "RETRY_S", 3600.0)
    monkeypatch.setattr(dispatch_policy, "RETRY_CHANGED_S", 0.2)
    async with rig() as r:
        prefill, decode = await r.split()
        answer(r, prefill, decode)
        decode.refuse["Reserve"] = [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
        asked = asyncio.create_task(r.collect(r.request()))
        for refused in (1, 2):
            await r.until(lambda refused=refused: len(decode.requests(pb.ReserveRequest)) == refused, "a refusal")
            await r.until(lambda: r.core._dispatcher._turns._policy.retry_s() is not None, "the router to hear it")
            await r.heartbeat(decode)  # sooner than it may ask: its next try is moved forward
        await asked
        r.assert_nothing_left()


@scenario
async def test_those_behind_one_that_leaves_before_it_is_ready_have_their_turn(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        answer(r, prefill, decode)
        dispatcher = r.core._dispatcher
        work = Work(
            request_id="first",
            number=1,
            prompt_token_ids=(1,),
            output_token_ids=(),
            sampling=SamplingParams(max_tokens=1),
            urgency=Urgency(slo_class="interactive", share=0.9, deadline_s=0.0),
        )
        first = dispatcher.expect(work, 1)
        behind = asyncio.create_task(r.collect(r.request()))
        await r.until(lambda: sum(dispatcher.waiting_by_class().values()) == 2, "the other to wait")
        assert not decode.requests(pb.ReserveRequest)
        dispatcher.leave(first)
        await behind
        r.assert_nothing_left()


@pytest.mark.parametrize("status", [grpc.StatusCode.RESOURCE_EXHAUSTED])
@scenario
async def test_one_that_leaves_while_it_waits_is_out_of_the_queue(rig: Any, status: grpc.StatusCode) -> None:
    async with rig() as r:
        _, decode = await r.split()
        decode.refuse["Reserve"] = [status] * 1000
        waiting = [asyncio.create_task(r.collect(r.request(timeout_s=0.3 if i else 30.0))) for i in range(3)]
        await r.until(lambda: r.core._dispatcher.waiting_by_class() == {"interactive": 3}, "three to wait")
        await r.until(lambda: r.core._dispatcher.waiting_by_class() == {"interactive": 1}, "two to run out of time")
        waiting[0].cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error).__name__ for error in results] == ["CancelledError", "DeadlineExceeded", "DeadlineExceeded"]
        assert not r.core._dispatcher.waiting_by_class()
        r.assert_nothing_left()
