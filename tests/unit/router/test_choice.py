"""One choice, from placement to its last token, across every way in which workers refuse, fail, die and babble."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from router_rig import D, P, answers, ids_of, text_of
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import FinishReason, Role, Side
from tandem.router.errors import DeadlineExceeded, InvalidRequest, ServiceError, Unavailable


@scenario
async def test_first_token_from_prefill_the_rest_from_decode(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        answers(r, prefill, decode, list(b"abcd"))
        deltas = await r.collect(r.request())
        assert (text_of(deltas), deltas[-1].finish_reason) == ("abcd", FinishReason.LENGTH)
        assert [token.token_id for token in deltas[0].tokens] == [ord("a")]
        timings = deltas[-1].timings
        assert (timings.path, timings.prefill_worker, timings.decode_worker) == ("split", "p0", "d0")
        assert timings.output_tokens == 4
        kinds = [type(call).__name__ for call in decode.calls]
        assert kinds == ["ReserveRequest", "DecodeRequest"]
        assert decode.calls[1].peer.worker_id == "p0"
        assert decode.calls[1].peer.epoch == prefill.epoch
        assert not prefill.requests(pb.AbortRequest)
        r.assert_nothing_left()


@scenario
async def test_decode_may_be_heard_before_prefill(rig: Any) -> None:
    """The two streams are two connections: nothing orders them. The first token comes on both, and is shown once."""
    async with rig() as r:
        prefill, decode = await r.split()

        def on_decode(request: pb.DecodeRequest) -> list[pb.Event]:
            return [r.event(request.sequence, D, tokens=(0, list(b"ab"), ""))]

        decode.on_decode = on_decode
        stream = r.core.generate(r.request())
        first = await anext(stream)
        assert first.text == "ab"
        [submitted] = prefill.requests(pb.PrefillRequest)
        prefill.send(r.event(submitted.sequence, P, tokens=(0, list(b"a"), "")))
        decode.send(r.event(submitted.sequence, D, tokens=(2, list(b"cd"), "length")))
        assert text_of([delta async for delta in stream]) == "cd"
        assert r.metric("request_retries_total", reason="output_gap") == 0
        r.assert_nothing_left()


@scenario
async def test_duplicates_and_late_events_are_dropped(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()

        def on_decode(request: pb.DecodeRequest) -> list[pb.Event]:
            sequence = request.sequence
            older = pb.Sequence()
            older.CopyFrom(sequence)
            older.decode_attempt = 99
            return [
                r.event(sequence, D, tokens=(0, list(b"ab"), "")),
                r.event(older, D, tokens=(2, list(b"XX"), "")),
                r.event(sequence, D, tokens=(1, list(b"bc"), "")),
                r.event(sequence, D, tokens=(0, list(b"abc"), "")),
                r.event(sequence, D, tokens=(3, list(b"d"), "length")),
                r.event(sequence, D, tokens=(4, list(b"e"), "")),
            ]

        decode.on_decode = on_decode
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        assert text_of(await r.collect(r.request())) == "abcd"
        r.assert_nothing_left()


@pytest.mark.parametrize("side", [P, D])
@scenario
async def test_a_retryable_failure_before_the_first_token_is_tried_again(rig: Any, side: Side) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        answers(r, prefill, decode, list(b"abcd"))
        worker, name = (prefill, "on_prefill") if side is P else (decode, "on_decode")
        good = getattr(worker, name)

        def once(request: Any) -> list[pb.Event]:
            setattr(worker, name, good)
            return [r.event(request.sequence, side, failed=("peer_lost", True))]

        setattr(worker, name, once)
        assert text_of(await r.collect(r.request())) == "abcd"
        r.assert_nothing_left()


@scenario
async def test_what_prefill_says_after_the_first_token_does_not_matter(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()

        def on_prefill(request: pb.PrefillRequest) -> list[pb.Event]:
            sequence = request.sequence
            return [
                r.event(sequence, P, tokens=(0, list(b"a"), "")),
                r.event(sequence, P, failed=("expired", True)),
            ]

        prefill.on_prefill = on_prefill
        stream = r.core.generate(r.request())
        assert (await anext(stream)).text == "a"
        await prefill.die()
        await r.until(lambda: not r.link("p0").attached, "the break to be noticed")
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode")
        [request] = decode.requests(pb.DecodeRequest)
        decode.send(r.event(request.sequence, D, tokens=(0, list(b"abcd"), "length")))
        assert text_of([delta async for delta in stream]) == "bcd"
        assert r.metric("handoff_failures_total", reason="expired") == 0
        r.assert_nothing_left()


@scenario
async def test_a_first_token_that_ends_the_answer_makes_the_refused_pull_no_failure(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        decode.on_decode = lambda request: [r.event(request.sequence, D, failed=("finished", False))]
        stream = r.core.generate(r.request())
        asked = asyncio.create_task(anext(stream))
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode")
        [request] = prefill.requests(pb.PrefillRequest)
        prefill.send(r.event(request.sequence, P, tokens=(0, list(b"a"), "stop")))
        delta = await asked
        assert (ids_of([delta]), delta.finish_reason) == (list(b"a"), FinishReason.STOP)
        assert [delta async for delta in stream] == []
        assert r.metric("handoff_failures_total", reason="finished") == 0
        r.assert_nothing_left()


@scenario
async def test_a_final_failure_is_an_error_at_once(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, failed=("prefill_failed", False))]
        with pytest.raises(ServiceError, match="prefill_failed") as error:
            await r.collect(r.request())
        assert error.value.http_status == 500
        assert len(prefill.requests(pb.PrefillRequest)) == 1
        assert r.metric("request_retries_total", reason="prefill_failed") == 0
        assert r.metric("handoff_failures_total", reason="prefill_failed") == 1
        await r.until(lambda: decode.requests(pb.AbortRequest), "the other half to be aborted")
        r.assert_nothing_left()


@scenario
async def test_attempts_are_bounded_and_refusals_are_not_attempts(rig: Any) -> None:
    async with rig(max_attempts=2) as r:
        prefill, decode = await r.split()
        prefill.refuse["Prefill"] = [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION]
        decode.refuse["Decode"] = [grpc.StatusCode.UNAVAILABLE]
        decode.on_decode = lambda request: [r.event(request.sequence, D, failed=("corrupt", True))]
        with pytest.raises(Unavailable, match="gave up after 2 attempts"):
            await r.collect(r.request())
        assert [request.sequence.prefill_attempt for request in prefill.requests(pb.PrefillRequest)] == [1, 2, 3]
        # The prefill that was taken serves the decode attempts after it.
        tries = [(r.sequence.prefill_attempt, r.sequence.decode_attempt) for r in decode.requests(pb.DecodeRequest)]
        assert tries == [(3, 3), (3, 4), (3, 5)]
        assert r.metric("request_retries_total", reason="corrupt") == 1
        assert r.metric("handoff_failures_total", reason="corrupt") == 2
        r.assert_nothing_left()


@scenario
async def test_a_worker_whose_code_breaks_is_not_asked_for_ever(rig: Any) -> None:
    async with rig(max_attempts=2) as r:
        prefill, _ = await r.split()
        prefill.refuse["Prefill"] = [grpc.StatusCode.UNKNOWN] * 5
        with pytest.raises(Unavailable, match="worker_error"):
            await r.collect(r.request())
        assert len(prefill.requests(pb.PrefillRequest)) == 2
        r.assert_nothing_left()


@scenario
async def test_a_refusal_moves_the_next_try_to_another_worker(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        other = await r.worker("p1", Role.PREFILL, queued_prefill_tokens=5000)
        answers(r, other, decode, list(b"abcd"))
        prefill.refuse["Prefill"] = [grpc.StatusCode.FAILED_PRECONDITION] * 5
        deltas = await r.collect(r.request())
        assert deltas[-1].timings.prefill_worker == "p1"
        assert len(prefill.requests(pb.PrefillRequest)) == 1
        r.assert_nothing_left()


@scenario
async def test_what_no_worker_can_do_is_the_requests_own_fault(rig: Any) -> None:
    async with rig() as r:
        _, decode = await r.split()
        decode.refuse["Reserve"] = [grpc.StatusCode.INVALID_ARGUMENT]
        with pytest.raises(InvalidRequest, match="refused by the script"):
            await r.collect(r.request())
        r.assert_nothing_left()


@pytest.mark.parametrize("who", ["router", "worker"])
@scenario
async def test_time_that_runs_out_is_one_error_and_ends_both_halves(rig: Any, who: str) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        if who == "worker":
            decode.on_decode = lambda request: [r.event(request.sequence, D, failed=("deadline", False))]
        with pytest.raises(DeadlineExceeded):
            await r.collect(r.request(timeout_s=0.2 if who == "router" else 60.0))
        await r.until(lambda: prefill.requests(pb.AbortRequest), "prefill to be aborted")
        assert r.metric("request_failures_total", reason="deadline_exceeded") == 1
        r.assert_nothing_left()


@scenario
async def test_a_worker_replaced_while_it_is_asked_cuts_no_answer_short(rig: Any) -> None:
    """Closing the old life's channel cancels the call in flight; that must not pass for the request's own end."""
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.hold["Prefill"] = asyncio.Event()
        stream = r.core.generate(r.request())
        asked = asyncio.create_task(anext(stream))
        await r.until(lambda: prefill.requests(pb.PrefillRequest), "prefill to be asked")
        await prefill.die()
        reborn = await r.worker("p0", Role.PREFILL)
        answers(r, reborn, decode, list(b"abcd"))
        deltas = [await asked] + [delta async for delta in stream]
        assert (text_of(deltas), deltas[-1].finish_reason) == ("abcd", FinishReason.LENGTH)
        r.assert_nothing_left()


@pytest.mark.parametrize("method", ["Reserve", "Prefill", "Decode"])
@scenario
async def test_leaving_while_a_worker_is_asked_takes_everything_back(rig: Any, method: str) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        worker = prefill if method == "Prefill" else decode
        worker.hold[method] = asyncio.Event()
        task = asyncio.create_task(r.collect(r.request()))
        kind = {"Reserve": pb.ReserveRequest, "Prefill": pb.PrefillRequest, "Decode": pb.DecodeRequest}[method]
        await r.until(lambda: worker.requests(kind), f"{method} to be in flight")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.until(lambda: decode.requests(pb.AbortRequest), "the credit to be given back")
        if method == "Decode":
            await r.until(lambda: prefill.requests(pb.AbortRequest), "the prefill to be ended")
        elif method == "Reserve":
            assert not prefill.requests(pb.AbortRequest), "nothing was asked of it"
        assert r.metric("requests_canceled_total") == 1
        r.assert_nothing_left()


def tapped(rig: Any, request: Any, *, takes: int = 1000) -> tuple[list[Any], asyncio.Task[list[Any]]]:
    """What the tap takes, at most so many deltas, and what is iterated."""
    taken: list[Any] = []

    def tap(delta: Any) -> bool:
        if len(taken) >= takes:
            return False
        taken.append(delta)
        return True

    async def iterate() -> list[Any]:
        return [delta async for delta in rig.core.generate(request, tap)]

    return taken, asyncio.create_task(iterate())


@scenario
async def test_tokens_are_offered_where_they_arrive_and_the_end_is_iterated(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        decode.on_decode = lambda request: [r.event(request.sequence, D, tokens=(0, list(b"ab"), ""))]
        taken, iterating = tapped(r, r.request())
        await r.until(lambda: text_of(taken) == "ab", "two tokens")
        [submitted] = decode.requests(pb.DecodeRequest)
        events = [r.event(submitted.sequence, D, tokens=(2, list(b"c"), "")) for _ in range(2)]
        decode.send(*events, r.event(submitted.sequence, D, tokens=(3, list(b"d"), "length")))
        rest = await iterating
        assert text_of(taken + rest) == "abcd"
        assert all(delta.finish_reason is None for delta in taken)
        assert rest[-1].finish_reason is FinishReason.LENGTH
        r.assert_nothing_left()


@scenario
async def test_tokens_of_one_frame_are_one_delta(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        taken, iterating = tapped(r, r.request())
        await r.until(lambda: decode.requests(pb.DecodeRequest) and text_of(taken) == "a", "the first token")
        [submitted] = decode.requests(pb.DecodeRequest)
        decode.send(*[r.event(submitted.sequence, D, tokens=(i, [ids], "")) for i, ids in enumerate(b"abc")])
        await r.until(lambda: text_of(taken) == "abc", "three tokens")
        assert [delta.text for delta in taken] == ["a", "bc"]
        decode.send(r.event(submitted.sequence, D, tokens=(3, list(b"d"), "length")))
        assert text_of(await iterating) == "d"


@scenario
async def test_what_a_tap_leaves_is_iterated_in_order(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        taken, iterating = tapped(r, r.request(), takes=1)
        await r.until(lambda: decode.requests(pb.DecodeRequest) and text_of(taken) == "a", "the first token")
        [submitted] = decode.requests(pb.DecodeRequest)
        for index, token in enumerate(b"bcd", start=1):
            decode.send(r.event(submitted.sequence, D, tokens=(index, [token], "length" if index == 3 else "")))
        assert text_of(await iterating) == "bcd"


@scenario
async def test_a_stop_string_ends_a_tapped_choice(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        decode.on_decode = lambda request: [r.event(request.sequence, D, tokens=(0, list(b"abXYZ"), ""))]
        taken, iterating = tapped(r, r.request(stop=("XY",), sampling={"max_tokens": 9}))
        rest = await iterating
        assert text_of(taken + rest) == "ab"
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == (FinishReason.STOP, "XY")
        await r.until(lambda: decode.requests(pb.AbortRequest), "the abort")
        r.assert_nothing_left()


@scenario
async def test_tokens_that_cannot_be_taken_fail_their_own_request(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the worker's stream, on which others run."""
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        decode.on_decode = lambda request: [r.event(request.sequence, D, tokens=(0, [97, 299], ""))]

        def broken(token_id: int) -> bytes:
            if token_id == 299:
                raise LookupError("no such token")
            return bytes([token_id])

        monkeypatch.setattr(r.core._tokenizer, "token_bytes", broken)
        monkeypatch.setattr(r.core._tokenizer, "is_special", lambda token_id: False)
        _, iterating = tapped(r, r.request())
        with pytest.raises(ServiceError, match="internal error: LookupError"):
            await iterating
        assert r.link("d0").attached
        await r.until(lambda: decode.requests(pb.AbortRequest), "the abort")
        r.assert_nothing_left()
