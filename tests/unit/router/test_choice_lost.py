"""One choice whose worker is lost: it goes on behind the tokens sent, with the prefill that was begun where that can
still be had."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from router_rig import D, P, answers, ids_of, text_of
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import FinishReason, Role, Side
from tandem.router.errors import Unavailable


@scenario
async def test_a_lost_decode_worker_is_replaced_behind_the_tokens_sent(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        spare = await r.worker("d1", Role.DECODE, running=7)  # ranked behind d0
        answers(r, prefill, spare, list(b"abcd"))
        decode.on_decode = lambda request: [r.event(request.sequence, D, tokens=(0, list(b"ab"), ""))]
        sampling = {"seed": 7, "presence_penalty": 1.5, "temperature": 0.7}
        stream = r.core.generate(r.request(sampling=sampling))
        seen = ""
        while seen != "ab":
            seen += (await anext(stream)).text
        await decode.die()
        rest = [delta async for delta in stream]
        assert seen + text_of(rest) == "abcd"
        [resumed] = spare.requests(pb.DecodeRequest)
        assert list(resumed.sequence.output_token_ids) == list(b"ab")
        assert list(resumed.sequence.prompt_token_ids) == [1, 2, 3, 4, 5]
        assert (resumed.sequence.sampling.seed, resumed.sequence.sampling.presence_penalty) == (7, 1.5)
        assert resumed.sequence.decode_attempt == 2
        # The dead worker may not have confirmed: the prefill worker is told.
        await r.until(lambda: prefill.requests(pb.AbortRequest), "prefill to be told")
        assert prefill.requests(pb.AbortRequest)[0].prefill_attempt == 1
        assert r.metric("request_retries_total", reason="worker_lost") == 1
        r.assert_nothing_left()


@pytest.mark.parametrize("half", ["Prefill", "Decode"])
@scenario
async def test_a_worker_lost_before_it_answered_is_lost_and_did_not_refuse(rig: Any, half: str) -> None:
    """Whether its answer was under way when its stream broke must not decide how the try is counted."""
    async with rig() as r:
        prefill, decode = await r.split()
        answers(r, prefill, decode, list(b"abcd"))
        broken = prefill if half == "Prefill" else decode
        broken.hold[half] = asyncio.Event()
        asked = asyncio.create_task(r.collect(r.request()))
        kind = pb.PrefillRequest if half == "Prefill" else pb.DecodeRequest
        await r.until(lambda: broken.requests(kind), "the command to be there")
        del broken.hold[half]
        broken.break_streams()
        assert text_of(await asked) == "abcd"
        assert r.metric("request_retries_total", reason="worker_lost") == 1
        r.assert_nothing_left()


@scenario
async def test_a_stop_string_across_two_attempts_is_found(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        spare = await r.worker("d1", Role.DECODE, running=7)
        answers(r, prefill, spare, list(b"abSTOPxyz"))
        decode.on_decode = lambda request: [r.event(request.sequence, D, tokens=(0, list(b"abST"), ""))]
        stream = r.core.generate(r.request(stop=("STOP",), sampling={"max_tokens": 9}))
        deltas = [await anext(stream)]
        while len(ids_of(deltas)) < 4:
            deltas.append(await anext(stream))
        assert text_of(deltas) == "ab"
        await decode.die()
        deltas += [delta async for delta in stream]
        assert text_of(deltas) == "ab"
        assert ids_of(deltas) == list(b"abSTOP")
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "STOP")
        await r.until(lambda: not r.core._cleanups, "the clean-ups")
        r.assert_nothing_left()


@scenario
async def test_the_last_token_of_a_resumed_answer_needs_no_decode_worker(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        answers(r, prefill, decode, list(b"abcd"))

        def on_decode(request: pb.DecodeRequest) -> list[pb.Event]:
            sequence = request.sequence
            return [
                r.event(sequence, D, tokens=(0, list(b"abc"), "")),
                r.event(sequence, D, failed=("corrupt", True)),
            ]

        decode.on_decode = on_decode
        deltas = await r.collect(r.request())
        assert (text_of(deltas), deltas[-1].timings.path) == ("abcd", "prefill_only")
        assert not prefill.requests(pb.PrefillRequest)[-1].handoff
        r.assert_nothing_left()


@scenario
async def test_a_hole_in_the_output_costs_an_attempt_and_no_token(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        answers(r, prefill, decode, list(b"abcd"))
        good = decode.on_decode

        def on_decode(request: pb.DecodeRequest) -> list[pb.Event]:
            if request.sequence.decode_attempt > 1:
                return good(request)
            return [r.event(request.sequence, D, tokens=(3, list(b"d"), ""))]

        decode.on_decode = on_decode
        assert text_of(await r.collect(r.request())) == "abcd"
        assert r.metric("request_retries_total", reason="output_gap") == 1
        await r.until(lambda: decode.requests(pb.AbortRequest), "the old attempt to be aborted")
        r.assert_nothing_left()


# --- a decode worker that is lost before its first step ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["refused", "corrupt", "died"])
@scenario
async def test_a_decode_worker_lost_before_its_first_step_costs_no_second_prefill(rig: Any, how: str) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        spare = await r.worker("d1", Role.DECODE, running=7)  # ranked behind d0
        answers(r, prefill, spare, list(b"abcd"))
        if how == "refused":
            decode.refuse["Decode"] = [grpc.StatusCode.RESOURCE_EXHAUSTED]
        elif how == "corrupt":
            decode.on_decode = lambda request: [r.event(request.sequence, D, failed=("corrupt", True))]
        stream = r.core.generate(r.request())
        deltas = [await anext(stream)]
        if how == "died":
            await decode.die()
        deltas += [delta async for delta in stream]
        assert (text_of(deltas), deltas[-1].finish_reason) == ("abcd", FinishReason.LENGTH)
        assert len(prefill.requests(pb.PrefillRequest)) == 1
        [redeemed] = spare.requests(pb.DecodeRequest)
        assert (redeemed.sequence.prefill_attempt, redeemed.sequence.decode_attempt) == (1, 2)
        assert list(redeemed.sequence.output_token_ids) == [], "the ticket counts what was prefilled"
        assert not prefill.requests(pb.AbortRequest)
        assert r.metric("prefills_kept_total") == 1
        assert deltas[-1].timings.decode_worker == "d1"
        r.assert_nothing_left()


@scenario
async def test_the_first_token_comes_though_no_decode_worker_is_left(rig: Any) -> None:
    """And where it ends the answer, none is needed."""
    async with rig() as r:
        prefill, decode = await r.split()
        stream = r.core.generate(r.request())
        asked = asyncio.create_task(anext(stream))
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode")
        await decode.die()
        await r.until(lambda: not r.link("d0").attached, "the break")
        [request] = prefill.requests(pb.PrefillRequest)
        prefill.send(r.event(request.sequence, P, tokens=(0, list(b"a"), "stop")))
        delta = await asked
        assert (ids_of([delta]), delta.finish_reason) == (list(b"a"), FinishReason.STOP)
        assert [delta async for delta in stream] == []
        assert not prefill.requests(pb.AbortRequest)
        r.assert_nothing_left()


@scenario
async def test_a_prefill_that_is_lost_while_a_decode_worker_is_looked_for_is_begun_anew(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        stream = r.core.generate(r.request())
        asked = asyncio.create_task(anext(stream))
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode")
        await decode.die()
        await r.until(lambda: not r.link("d0").attached, "the break")
        await prefill.die()
        await r.until(lambda: r.metric("request_retries_total", reason="worker_lost") == 2, "both to be lost")
        one, other = await r.split()
        answers(r, one, other, list(b"abcd"))
        deltas = [await asked] + [delta async for delta in stream]
        assert text_of(deltas) == "abcd"
        assert len(one.requests(pb.PrefillRequest)) == 1
        assert r.metric("prefills_kept_total") == 0
        r.assert_nothing_left()


@scenario
async def test_leaving_while_a_decode_worker_is_looked_for_ends_the_prefill(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        task = asyncio.create_task(r.collect(r.request()))
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode")
        await decode.die()
        await r.until(lambda: r.metric("request_retries_total", reason="worker_lost") == 1, "it to be lost")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.until(lambda: prefill.requests(pb.AbortRequest), "the prefill to be aborted")
        r.assert_nothing_left()


@pytest.mark.parametrize("side", [P, D])
@scenario
async def test_nobody_came_back_within_the_deadline_is_unavailable(rig: Any, side: Side) -> None:
    async with rig(unready_wait_s=0.01) as r:
        prefill, decode = await r.split()
        task = asyncio.create_task(r.collect(r.request(timeout_s=1.5)))
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode")
        await (prefill if side is P else decode).die()
        with pytest.raises(Unavailable, match=f"no {side} worker came back within the request's 1.5 s") as error:
            await task
        assert error.value.retry_after_s is not None
        assert r.metric("request_failures_total", reason="unavailable") == 1
        r.assert_nothing_left()
