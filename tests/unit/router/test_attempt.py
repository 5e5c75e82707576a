"""One attempt: what is open, what is aborted, and that the router's own counts return to zero."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import Role, SamplingParams, Side
from tandem.router.attempt import Attempt, PrefillHalf, Work
from tandem.router.placing import Path
from tandem.router.tries import AttemptLost

P, D = Side.PREFILL, Side.DECODE
WORK = Work(
    request_id="q",
    number=3,
    prompt_token_ids=(1, 2, 3, 4, 5),
    output_token_ids=(6,),
    sampling=SamplingParams(max_tokens=9, choice=2),
)


async def split(r: Any) -> tuple[Attempt, Any, Any]:
    prefill, decode = await r.split()
    half = PrefillHalf(WORK, r.link("p0"), router_id="r", kv_address="h:1", fingerprint="f", uncached_tokens=6)
    return on(r, WORK, half, decode), prefill, decode


def on(r: Any, work: Work, half: PrefillHalf, decode: Any) -> Attempt:
    """An attempt on that decode worker, with its credit."""
    return Attempt(
        work,
        Path.SPLIT,
        router_id="r",
        clock=r.clock,
        half=half,
        decode=r.link(decode.worker_id),
        credit=pb.ReserveReply(credit_id=1, epoch=decode.epoch),
    )


def counts(r: Any) -> tuple[int, int, int, int]:
    p, d = r.link("p0").sent, r.link("d0").sent
    return p.queued_prefill_tokens, p.decode_rows, d.queued_prefill_tokens, d.decode_rows


async def submit(r: Any, attempt: Attempt) -> None:
    """Submits and waits for the decode worker to hear of it, as the attempt itself does not."""
    assert attempt.decode is not None
    worker = next(worker for worker in r.workers if worker.worker_id == attempt.decode.worker_id)
    before = len(worker.requests(pb.DecodeRequest))
    await attempt.submit(60.0)
    await r.until(lambda: len(worker.requests(pb.DecodeRequest)) > before, "the decode worker to be asked")


async def close(r: Any, attempt: Attempt) -> None:
    """Closes and waits for the aborts."""
    aborts: list[asyncio.Task[None]] = []
    attempt.close(lambda work: aborts.append(asyncio.create_task(work)))
    await asyncio.gather(*aborts)
    assert counts(r) == (0, 0, 0, 0)
    r.assert_nothing_left()


@scenario
async def test_counts_follow_the_attempt(rig: Any) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        assert counts(r) == (6, 0, 0, 1)
        await submit(r, attempt)
        [asked], [redeemed] = prefill.requests(pb.PrefillRequest), decode.requests(pb.DecodeRequest)
        assert (asked.handoff, asked.epoch) == (True, prefill.epoch)
        assert asked.sequence == redeemed.sequence
        assert (asked.sequence.choice, asked.sequence.prefill_attempt, asked.sequence.decode_attempt) == (2, 3, 3)
        assert (redeemed.credit_id, redeemed.epoch, redeemed.peer.kv_address) == (1, decode.epoch, "h:1")
        prefill.send(r.event(asked.sequence, P, tokens=(1, [7], "")))
        await attempt.next_event()
        assert counts(r) == (0, 0, 0, 1)
        decode.send(r.event(asked.sequence, D, tokens=(1, [7, 8], "stop")))
        assert (await attempt.next_event()).finish_reason == "stop"
        await close(r, attempt)
        assert not prefill.requests(pb.AbortRequest)
        assert not decode.requests(pb.AbortRequest)


@scenario
async def test_never_submitted_gives_the_credit_back(rig: Any) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        await close(r, attempt)
        assert not prefill.requests(pb.AbortRequest)
        [abort] = decode.requests(pb.AbortRequest)
        assert (abort.request_id, abort.choice, abort.decode_attempt, abort.router_id) == ("q", 2, 3, "r")


@scenario
async def test_an_early_end_aborts_both_sides(rig: Any) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        await submit(r, attempt)
        await close(r, attempt)
        assert len(prefill.requests(pb.AbortRequest)) == len(decode.requests(pb.AbortRequest)) == 1


@scenario
async def test_after_decodes_first_tokens_prefill_frees_itself(rig: Any) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        await submit(r, attempt)
        [asked] = decode.requests(pb.DecodeRequest)
        decode.send(r.event(asked.sequence, D, tokens=(1, [7, 8], "")))
        await attempt.next_event()
        assert counts(r) == (0, 0, 0, 1)
        await close(r, attempt)
        assert not prefill.requests(pb.AbortRequest)
        assert len(decode.requests(pb.AbortRequest)) == 1


@pytest.mark.parametrize(("side", "after_first", "lost"), [(P, False, True), (P, True, False), (D, True, True)])
@scenario
async def test_which_lost_stream_ends_it(rig: Any, side: Side, after_first: bool, lost: bool) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        await submit(r, attempt)
        [asked] = decode.requests(pb.DecodeRequest)
        if after_first:
            prefill.send(r.event(asked.sequence, P, tokens=(1, [7], "")))
            await attempt.next_event()
        link = r.link("p0" if side is P else "d0")
        (prefill if side is P else decode).break_streams()
        await r.until(lambda: not link.attached, "the break")
        await r.until(lambda: link.attached, "the stream to be back")
        if lost:
            with pytest.raises(AttemptLost, match=f"{side} worker") as error:
                await attempt.next_event()
            assert (error.value.reason, error.value.retryable) == ("worker_lost", True)
        else:
            decode.send(r.event(asked.sequence, D, tokens=(1, [7, 8], "")))
            assert (await attempt.next_event()).index == 1
        await close(r, attempt)
        # The stream is back, and the worker may not have noticed that it was gone: it is told.
        assert len((prefill if side is P else decode).requests(pb.AbortRequest)) == int(lost)


@scenario
async def test_a_submit_accepted_on_the_next_stream_is_aborted(rig: Any) -> None:
    """The decode worker's stream breaks and is back while prefill is asked: the decode half runs, unheard."""
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        prefill.hold["Prefill"] = asyncio.Event()
        submitting = asyncio.create_task(attempt.submit(60.0))
        await r.until(lambda: prefill.requests(pb.PrefillRequest), "prefill to be asked")
        decode.break_streams()
        await r.until(lambda: not r.link("d0").attached, "the break")
        await r.until(lambda: r.link("d0").attached, "the stream to be back")
        prefill.hold["Prefill"].set()
        await submitting
        await r.until(lambda: decode.requests(pb.DecodeRequest), "decode to be asked")
        with pytest.raises(AttemptLost):
            await attempt.next_event()
        await close(r, attempt)
        assert len(decode.requests(pb.AbortRequest)) == 1
        assert len(prefill.requests(pb.AbortRequest)) == 1


@pytest.mark.parametrize(
    ("side", "reason", "retryable", "lost"),
    [(D, "corrupt", True, True), (P, "prefill_failed", False, True), (P, "deadline", False, True)],
)
@scenario
async def test_failures_carry_their_reason(rig: Any, side: Side, reason: str, retryable: bool, lost: bool) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        await submit(r, attempt)
        [asked] = decode.requests(pb.DecodeRequest)
        failing, other = (prefill, decode) if side is P else (decode, prefill)
        failing.send(r.event(asked.sequence, side, failed=(reason, retryable)))
        with pytest.raises(AttemptLost) as error:
            await attempt.next_event()
        assert (error.value.reason, error.value.retryable) == (reason, retryable)
        await close(r, attempt)
        # The side that failed has ended by itself.
        assert not failing.requests(pb.AbortRequest)
        assert len(other.requests(pb.AbortRequest)) == 1


# --- a prefill outlives its decode attempt ----------------------------------------------------------------------------


async def lose_decode(r: Any, attempt: Attempt, how: str, decode: Any) -> PrefillHalf | None:
    """The decode half ends that way; what is left of the prefill."""
    [asked] = decode.requests(pb.DecodeRequest)
    if how == "stream":
        decode.break_streams()
    elif how == "spoke first":
        decode.send(r.event(asked.sequence, D, tokens=(1, [7, 8], "")))
        await attempt.next_event()
        decode.break_streams()
    else:
        decode.send(r.event(asked.sequence, D, failed=(how, True)))
    with pytest.raises(AttemptLost) as lost:
        await attempt.next_event()
    assert lost.value.worker_id == "d0"
    return attempt.close(spawned, keep_prefill=True)


def spawned(work: Any) -> None:
    task = asyncio.create_task(work)
    ABORTS.add(task)
    task.add_done_callback(ABORTS.discard)


ABORTS: set[asyncio.Task[None]] = set()


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("stream", True),
        ("queue_full", True),
        ("corrupt", True),
        ("peer_lost", True),
        ("expired", False),
        ("unknown_ticket", False),
        ("stale_attempt", False),
        ("wrong_epoch", False),
        ("spoke first", False),
    ],
)
@scenario
async def test_what_is_left_of_the_prefill(rig: Any, how: str, kept: bool) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        await submit(r, attempt)
        half = await lose_decode(r, attempt, how, decode)
        assert (half is not None) == kept
        await r.until(lambda: not ABORTS, "the aborts")
        if half is None:
            assert prefill.requests(pb.AbortRequest)
            assert counts(r) == (0, 0, 0, 0)
            return
        assert not prefill.requests(pb.AbortRequest)
        # The decode worker is told to leave the KV where it is: no prefill attempt is named.
        assert all((a.prefill_attempt, a.decode_attempt) == (0, 3) for a in decode.requests(pb.AbortRequest))
        assert counts(r) == (6, 0, 0, 0), "its first token is still waited for"
        half.close(spawned)
        half.close(spawned)
        await r.until(lambda: not ABORTS, "the abort")
        [abort] = prefill.requests(pb.AbortRequest)
        assert (abort.prefill_attempt, abort.decode_attempt) == (3, 0)
        assert counts(r) == (0, 0, 0, 0)
        r.assert_nothing_left()


@scenario
async def test_the_next_decode_attempt_names_the_same_prefill_and_hears_what_it_said_meanwhile(rig: Any) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        spare = await r.worker("d1", Role.DECODE)
        await submit(r, attempt)
        [asked] = prefill.requests(pb.PrefillRequest)
        half = await lose_decode(r, attempt, "corrupt", decode)
        assert half is not None
        prefill.send(r.event(asked.sequence, P, tokens=(1, [7], "")))
        await r.until(lambda: not half._inbox.empty(), "the first token")
        second = on(r, replace(WORK, number=4, half=half), half, spare)
        await submit(r, second)
        assert len(prefill.requests(pb.PrefillRequest)) == 1
        [redeemed] = spare.requests(pb.DecodeRequest)
        sequence = redeemed.sequence
        assert (sequence.prefill_attempt, sequence.decode_attempt) == (3, 4)
        assert (sequence.prompt_token_ids, sequence.output_token_ids) == ([1, 2, 3, 4, 5], [6])
        assert (redeemed.peer.worker_id, redeemed.peer.epoch) == ("p0", prefill.epoch)
        assert [token.token_id for token in (await second.next_event()).tokens] == [7]
        spare.send(r.event(sequence, D, tokens=(1, [7, 8], "stop")))
        assert (await second.next_event()).finish_reason == "stop"
        await close(r, second)
        assert not prefill.requests(pb.AbortRequest)


@scenario
async def test_a_second_decode_worker_that_cannot_reach_the_prefill_worker_is_believed(rig: Any) -> None:
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        spare = await r.worker("d1", Role.DECODE)
        await submit(r, attempt)
        half = await lose_decode(r, attempt, "peer_lost", decode)
        assert half is not None
        second = on(r, replace(WORK, number=4, half=half), half, spare)
        await submit(r, second)
        [redeemed] = spare.requests(pb.DecodeRequest)
        spare.send(r.event(redeemed.sequence, D, failed=("peer_lost", True)))
        with pytest.raises(AttemptLost, match="by the script"):
            await second.next_event()
        assert second.close(spawned, keep_prefill=True) is None
        await r.until(lambda: prefill.requests(pb.AbortRequest), "the prefill to be aborted")


@pytest.mark.parametrize(("silent", "lost"), [(True, True), (False, False)])
@scenario
async def test_a_prefill_worker_that_fell_silent_is_not_waited_for(rig: Any, silent: bool, lost: bool) -> None:
    """After the first token: a broken connection the decode worker sees for itself, silence it does not."""
    async with rig() as r:
        attempt, prefill, decode = await split(r)
        await submit(r, attempt)
        [asked] = decode.requests(pb.DecodeRequest)
        prefill.send(r.event(asked.sequence, P, tokens=(1, [7], "")))
        await attempt.next_event()
        if silent:
            r.link("p0").give_up("no heartbeat for 1 s")
        else:
            prefill.break_streams()
            await r.until(lambda: not r.link("p0").attached, "the break")
            await r.until(lambda: r.link("p0").attached, "the stream to be back")
        decode.send(r.event(asked.sequence, D, tokens=(1, [7, 8], "")))
        if lost:
            with pytest.raises(AttemptLost, match="no heartbeat"):
                await attempt.next_event()
            assert attempt.close(spawned, keep_prefill=True) is None
        else:
            assert (await attempt.next_event()).index == 1
            attempt.close(spawned)
        await r.until(lambda: not ABORTS, "the aborts")
