"""The core: one request's choices, its place in the queue, what is counted once, and that closing leaves nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import FinishReason, Role, SampledToken, Side
from tandem.router.core import next_delta
from tandem.router.errors import Overloaded, ServiceError, Unavailable
from tandem.router.mailbox import Mailbox
from tandem.router.service import Delta

P, D = Side.PREFILL, Side.DECODE


def echo(r: Any, prefill: Any, decode: Any, *, fail_choice: int = -1) -> None:
    """Every choice answers its own letter four times; one fails for good."""

    def letter(sequence: pb.Sequence) -> int:
        return ord("a") + sequence.choice

    def on_prefill(request: pb.PrefillRequest) -> list[pb.Event]:
        return [r.event(request.sequence, P, tokens=(0, [letter(request.sequence)], ""))]

    def on_decode(request: pb.DecodeRequest) -> list[pb.Event]:
        if request.sequence.choice == fail_choice:
            return [r.event(request.sequence, D, failed=("decode_failed", False))]
        if fail_choice >= 0:
            return []
        return [r.event(request.sequence, D, tokens=(0, [letter(request.sequence)] * 4, "length"))]

    prefill.on_prefill, decode.on_decode = on_prefill, on_decode


@scenario
async def test_the_first_choice_goes_alone_and_the_others_follow_its_first_token(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        stream = r.core.generate(r.request(n=3))
        first = asyncio.create_task(anext(stream))
        await r.until(lambda: decode.requests(pb.DecodeRequest), "the first choice")
        assert [call.sequence.choice for call in prefill.requests(pb.PrefillRequest)] == [0]
        echo(r, prefill, decode)
        sequence = prefill.requests(pb.PrefillRequest)[0].sequence
        decode.send(r.event(sequence, D, tokens=(0, list(b"aaaa"), "length")))
        deltas = [await first] + [delta async for delta in stream]
        texts = {c: "".join(delta.text for delta in deltas if delta.choice == c) for c in range(3)}
        assert texts == {0: "aaaa", 1: "bbbb", 2: "cccc"}
        assert sum(delta.finish_reason is FinishReason.LENGTH for delta in deltas) == 3
        assert r.metric("request_success_total", finished_reason="length") == 3
        assert r.metric("choices_by_path_total", path="split") == 3
        assert r.metric("prompt_tokens_total") == 5
        r.assert_nothing_left()


@scenario
async def test_one_choice_that_fails_ends_the_others_and_is_counted_once(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        echo(r, prefill, decode, fail_choice=1)
        with pytest.raises(ServiceError, match="decode_failed"):
            await r.collect(r.request(n=3))
        assert r.metric("request_failures_total", reason="internal_error") == 1
        assert r.metric("requests_canceled_total") == 0
        # The one that failed has ended by itself on decode; the others are told on both sides.
        await r.until(lambda: {a.choice for a in decode.requests(pb.AbortRequest)} >= {0, 2}, "the others' aborts")
        r.assert_nothing_left()


@scenario
async def test_a_client_that_leaves_is_counted_once_and_everything_ends(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        stream = r.core.generate(r.request(n=2))
        await anext(stream)
        assert r.metric("requests_in_flight") == 1
        await stream.aclose()
        assert r.metric("requests_canceled_total") == 1
        assert r.metric("request_failures_total", reason="internal_error") == 0
        await r.until(lambda: decode.requests(pb.AbortRequest), "decode to be told")
        r.assert_nothing_left()


@scenario
async def test_a_client_that_leaves_after_the_end_has_not_left(rig: Any) -> None:
    async with rig() as r:
        echo(r, *await r.split())
        stream = r.core.generate(r.request())
        async for delta in stream:
            if delta.finish_reason:
                break
        await stream.aclose()
        assert r.metric("requests_canceled_total") == 0
        assert r.metric("request_success_total", finished_reason="length") == 1
        r.assert_nothing_left()


@scenario
async def test_cancelling_twice_still_gives_the_place_back(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        task = asyncio.create_task(r.collect(r.request()))
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode")
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await r.until(lambda: prefill.requests(pb.AbortRequest), "the abort")
        r.assert_nothing_left()


@scenario
async def test_beyond_the_queues_bound_is_refused_and_costs_nothing(rig: Any) -> None:
    async with rig(max_waiting=1) as r:
        prefill, _ = await r.split()
        waiting = asyncio.create_task(r.collect(r.request()))
        await r.until(lambda: prefill.requests(pb.PrefillRequest), "the first to wait")
        with pytest.raises(Overloaded) as refused:
            await r.collect(r.request())
        assert refused.value.retry_after_s >= 1
        assert r.metric("request_refusals_total", reason="overloaded") == 1
        assert r.metric("requests_in_flight") == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        r.assert_nothing_left()


@scenario
async def test_a_place_is_given_on_with_the_first_token(rig: Any) -> None:
    async with rig(max_waiting=1) as r:
        prefill, _ = await r.split()
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
        streams = [r.core.generate(r.request()) for _ in range(2)]
        for stream in streams:
            assert (await anext(stream)).text == "a"
        for stream in streams:
            await stream.aclose()
        r.assert_nothing_left()


@scenario
async def test_no_worker_is_an_error_that_is_counted(rig: Any) -> None:
    async with rig(unready_wait_s=0.01) as r:
        with pytest.raises(Unavailable):
            await r.collect(r.request())
        assert r.metric("request_failures_total", reason="unavailable") == 1
        r.assert_nothing_left()


@scenario
async def test_ready_says_what_is_missing(rig: Any) -> None:
    async with rig() as r:
        assert r.core.readiness().reason == "no worker is ready"
        prefill = await r.worker("p0", Role.PREFILL)
        assert r.core.readiness().reason == "no decode worker is ready"
        await r.worker("d0", Role.DECODE, fingerprint="other")
        assert "fingerprint" in r.core.readiness().reason
        await r.worker("d1", Role.DECODE)
        assert r.core.readiness().ready
        await r.heartbeat(prefill, draining=True)
        readiness = r.core.readiness()
        assert (readiness.ready, readiness.reason) == (False, "no prefill worker is ready")
        assert [worker["state"] for worker in readiness.workers] == ["draining", "ready", "ready"]
        json.dumps(readiness.workers)
        assert readiness.workers[0].keys() >= {"holder_states", "pulls_total", "integrity_age_s", "heartbeat_age_s"}
        await r.worker("m0", Role.MIXED)
        assert r.core.readiness().ready


@scenario
async def test_the_context_is_what_every_worker_holds(rig: Any) -> None:
    async with rig() as r:
        assert r.core.models()[0].max_model_len == 1000
        await r.worker("p0", Role.PREFILL, max_model_len=800)
        await r.worker("d0", Role.DECODE, max_model_len=300)
        assert r.core.models()[0].max_model_len == 300


@scenario
async def test_deltas_that_wait_for_their_reader_become_one_up_to_another_choice_or_the_end() -> None:
    deltas: Mailbox[Delta | None] = Mailbox()
    for choice, text, finish in ((0, "a", None), (0, "b", None), (1, "c", None), (0, "d", None)):
        token = SampledToken(ord(text))
        deltas.put_nowait(Delta(choice=choice, text=text, tokens=(token,), finish_reason=finish))
    deltas.put_nowait(Delta(choice=0, text="e", finish_reason=FinishReason.STOP, stop_reason="!"))
    deltas.put_nowait(None)
    got = []
    while (delta := await next_delta(deltas)) is not None:
        got.append((delta.choice, delta.text, len(delta.tokens), delta.finish_reason, delta.stop_reason))
    assert got == [(0, "ab", 2, None, None), (1, "c", 1, None, None), (0, "de", 1, FinishReason.STOP, "!")]
