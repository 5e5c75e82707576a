"""The decode service: credits, pulled and local KV, and every way out gives credits and blocks back."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc import aio
from scenario import scenario
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import PROTOCOL_VERSION
from tandem.cluster.types import Role

Code = grpc.StatusCode


def expected(tokens: int, n: int) -> list[int]:
    config = resolve_model("dummy:tiny-llama").config
    prompt = range(1, tokens + 1)
    return list(expected_tokens(prompt, n, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(aio.AioRpcError) as error:
        await call
    code: grpc.StatusCode = error.value.code()
    return code


@scenario
async def test_a_handoff_says_the_first_token_again_and_goes_on(bench: Any) -> None:
    async with bench(Role.PREFILL) as prefill, bench(Role.DECODE) as decode:
        sequence = decode.sequence()
        credit = await decode.reserve(sequence)
        assert decode.leftovers()["credited_blocks"] == 2
        await prefill.prefill(sequence)
        await decode.decode(sequence, credit, prefill)
        await decode.until(decode.finished, "the answer")
        assert [decode.tokens()[i] for i in range(4)] == expected(20, 4)
        assert prefill.tokens() == {0: expected(20, 1)[0]}
        told = [event.tokens for event in decode.events if event.tokens.HasField("decode")]
        assert len(told) == 1
        assert told[0].decode.transferred_bytes > 0
        # The confirmation ends the lease long before its time.
        await prefill.clean()
        await decode.clean()


@scenario
async def test_decode_may_come_before_its_prefill(bench: Any) -> None:
    async with bench(Role.PREFILL) as prefill, bench(Role.DECODE) as decode:
        sequence = decode.sequence()
        await decode.decode(sequence, await decode.reserve(sequence), prefill)
        await prefill.until(lambda: prefill.leftovers().get("pulls"), "the pull to wait")
        await prefill.prefill(sequence)
        await decode.until(decode.finished, "the answer")
        assert [decode.tokens()[i] for i in range(4)] == expected(20, 4)
        await prefill.clean()
        await decode.clean()


@scenario
async def test_a_request_resumed_behind_its_output(bench: Any) -> None:
    async with bench(Role.PREFILL) as prefill, bench(Role.DECODE) as decode:
        answer = expected(20, 6)
        sequence = decode.sequence(output_token_ids=answer[:2], sampling={"max_tokens": 6})
        await prefill.prefill(sequence)
        await decode.decode(sequence, await decode.reserve(sequence), prefill)
        await decode.until(decode.finished, "the answer")
        assert decode.tokens() == {i: answer[i] for i in range(2, 6)}
        await prefill.clean()
        await decode.clean()


@scenario
async def test_without_a_peer_it_prefills_itself(bench: Any) -> None:
    async with bench(Role.DECODE) as decode:
        sequence = decode.sequence()
        await decode.decode(sequence, await decode.reserve(sequence))
        await decode.until(decode.finished, "the answer")
        assert [decode.tokens()[i] for i in range(4)] == expected(20, 4)
        assert [e.tokens.HasField("prefill") for e in decode.events] == [True, False, False, False]
        await decode.clean()


@scenario
async def test_credits_are_bounded_and_lapse(bench: Any) -> None:
    async with bench(Role.DECODE, credit_ttl_s=0.2, credit_factor=0.1) as decode:
        most = 500  # alone it may pass the limit
        assert await decode.reserve(decode.sequence(), context_tokens=most)
        assert await decode.reserve(decode.sequence(), context_tokens=most)  # the same one again
        second = decode.sequence(request_id="q2")
        assert await code_of(decode.reserve(second, context_tokens=most)) is Code.RESOURCE_EXHAUSTED
        await decode.clean()
        assert await decode.reserve(second, context_tokens=most)
        await decode.clean()


@scenario
async def test_credits_end_with_the_stream_of_the_router_that_has_not_redeemed_them(bench: Any) -> None:
    async with bench(Role.DECODE, credit_ttl_s=600.0) as worker:
        mine, theirs = worker.sequence(), worker.sequence(request_id="theirs", router_id="s")
        other = worker.stub.Attach(
            iter([pb.RouterFrame(router_id="s", protocol_version=PROTOCOL_VERSION, epoch=worker.shell.facts.epoch)])
        )
        await other.read()
        credit = await worker.reserve(mine)
        await worker.reserve(theirs, router_id="s")
        assert worker.leftovers() == {"credited_blocks": 4}
        await worker.detach()
        await worker.until(
            lambda: worker.leftovers() == {"credited_blocks": 2}, "its credit to end, and the other's to stay"
        )
        await worker.attach()
        assert await code_of(worker.decode(mine, credit)) is Code.FAILED_PRECONDITION
        await worker.reserve(mine)
        await worker.attach()  # a new stream before the old one is known to be broken
        assert worker.leftovers() == {"credited_blocks": 2}
        other.cancel()
        await worker.clean()


@scenario
async def test_a_refusal_says_how_full_it_is_and_keeps_a_place_for_who_asks_again(bench: Any) -> None:
    async with bench(Role.DECODE, credit_factor=0.1) as decode:
        limit = decode.shell.status().credit_limit_blocks
        first, large, small = (decode.sequence(request_id=name) for name in ("first", "large", "small"))
        assert await decode.reserve(first, context_tokens=(limit - 2) * 16 - 1)
        with pytest.raises(aio.AioRpcError) as refused:
            await decode.reserve(large, context_tokens=4 * 16 - 1)
        assert refused.value.code() is Code.RESOURCE_EXHAUSTED
        want = (
            f"worker decode: no credit of 4 blocks: {limit - 2} of {limit} blocks are promised to 1 sequences, 1 wait"
        )
        assert (refused.value.details() or "").startswith(want)
        assert await code_of(decode.reserve(small, context_tokens=1)) is Code.RESOURCE_EXHAUSTED
        urgent = {"slo_class": "interactive", "share": 8.0, "ttft_left_s": 1.0}
        assert await decode.reserve(decode.sequence(request_id="u"), context_tokens=1, urgency=pb.Urgency(**urgent))
        await decode.stub.Abort(pb.AbortRequest(request_id="large", decode_attempt=1, router_id="r"))
        assert await decode.reserve(small, context_tokens=1)


@pytest.mark.parametrize("urgency", [{"share": -1.0}, {"share": float("nan")}, {"ttft_left_s": float("nan")}])
@scenario
async def test_an_urgency_that_no_router_sends_is_refused(bench: Any, urgency: dict[str, float]) -> None:
    async with bench(Role.DECODE) as decode:
        sequence = decode.sequence()
        assert await code_of(decode.reserve(sequence, urgency=pb.Urgency(**urgency))) is Code.INVALID_ARGUMENT
        sequence.urgency.CopyFrom(pb.Urgency(**urgency))
        assert await code_of(decode.decode(sequence, await decode.reserve(sequence))) is Code.INVALID_ARGUMENT


@scenario
async def test_places_in_the_queue_are_promised_with_the_credit(bench: Any) -> None:
    """Two of them, though neither sequence has come yet; one that is prefilled here takes one as well."""
    async with bench(Role.DECODE, engine={"max_waiting": 2, "max_running": 1}) as decode:
        running, waiting = decode.sequence(choice=0, sampling={"max_tokens": 400}), decode.sequence(choice=1)
        await decode.decode(running, await decode.reserve(running))
        await decode.until(lambda: decode.leftovers().get("running") == 1, "the only place in the batch to be taken")
        await decode.decode(waiting, await decode.reserve(waiting))
        await decode.until(lambda: decode.leftovers().get("waiting") == 1, "one to wait")
        assert await decode.reserve(decode.sequence(choice=2))
        assert await code_of(decode.reserve(decode.sequence(choice=3))) is Code.RESOURCE_EXHAUSTED
        for choice in range(4):
            await decode.abort(choice=choice)
        await decode.clean()


@pytest.mark.parametrize("tokens", [0, 10**6])
@scenario
async def test_a_context_that_never_fits_gets_no_credit(bench: Any, tokens: int) -> None:
    async with bench(Role.DECODE) as decode:
        assert await code_of(decode.reserve(decode.sequence(), context_tokens=tokens)) is Code.INVALID_ARGUMENT


@scenario
async def test_a_full_queue_promises_nothing(bench: Any) -> None:
    """Or prefill would compute for a queue that then refuses."""
    async with bench(Role.DECODE, engine={"max_waiting": 1, "max_running": 1}) as decode:
        for choice in (0, 1):
            sequence = decode.sequence(choice=choice, sampling={"max_tokens": 400})
            await decode.decode(sequence, await decode.reserve(sequence))
        await decode.until(lambda: decode.leftovers().get("waiting") == 1, "the queue to be full")
        assert await code_of(decode.reserve(decode.sequence(choice=2))) is Code.RESOURCE_EXHAUSTED
        await decode.abort(choice=0)
        await decode.abort(choice=1)
        await decode.clean()


@scenario
async def test_a_credit_is_good_for_its_life_its_attempt_and_once(bench: Any) -> None:
    async with bench(Role.DECODE) as decode:
        sequence = decode.sequence()
        credit = await decode.reserve(sequence)
        assert await code_of(decode.decode(sequence, credit, epoch=7)) is Code.FAILED_PRECONDITION
        assert await code_of(decode.decode(decode.sequence(attempt=2), credit)) is Code.FAILED_PRECONDITION
        await decode.decode(sequence, credit)
        await decode.until(decode.finished, "the answer")
        assert await code_of(decode.decode(sequence, credit)) is not Code.OK
        await decode.clean()


@pytest.mark.parametrize("when", ["before", "credited", "pulling", "running"])
@scenario
async def test_an_abort_at_any_time_frees_everything(bench: Any, when: str) -> None:
    async with bench(Role.PREFILL) as prefill, bench(Role.DECODE) as decode:
        sequence = decode.sequence(sampling={"max_tokens": 400})
        if when == "before":
            await decode.abort()
            assert await code_of(decode.reserve(sequence)) is Code.ABORTED
        else:
            credit = await decode.reserve(sequence)
            if when in ("pulling", "running"):
                await decode.decode(sequence, credit, prefill)
                await prefill.until(lambda: prefill.leftovers().get("pulls"), "the pull")
            if when == "running":
                await prefill.prefill(sequence)
                await decode.until(lambda: len(decode.tokens()) > 2, "tokens")
            await decode.abort()
            if when == "credited":
                assert await code_of(decode.decode(sequence, credit)) is Code.ABORTED
        await decode.clean()
        await prefill.clean()
        assert not decode.finished()


@scenario
async def test_a_refused_prefill_peer_fails_the_attempt_with_its_reason(bench: Any) -> None:
    async with bench(Role.PREFILL) as prefill, bench(Role.DECODE) as decode:
        sequence = decode.sequence()
        await prefill.abort()  # what it will pull was aborted
        await decode.decode(sequence, await decode.reserve(sequence), prefill)
        await decode.until(decode.failed, "the failure")
        assert decode.failed() == ["aborted"]
        assert next(event.failed.retryable for event in decode.events if event.HasField("failed"))
        await decode.clean()


@scenario
async def test_another_life_of_the_peer_is_refused_not_read(bench: Any) -> None:
    async with bench(Role.PREFILL) as prefill, bench(Role.DECODE) as decode:
        sequence = decode.sequence()
        peer = pb.PrefillPeer(worker_id="prefill", epoch=5, kv_address=prefill.shell.kv_address)
        request = pb.DecodeRequest(
            sequence=sequence, credit_id=await decode.reserve(sequence), epoch=decode.shell.facts.epoch, peer=peer
        )
        await decode.stub.Decode(request)
        await decode.until(decode.failed, "the failure")
        assert decode.failed() == ["wrong_epoch"]
        await decode.clean()
