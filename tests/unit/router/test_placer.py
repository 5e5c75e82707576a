"""Finding workers: the credit first, the next where one refuses, waiting where all do, no credit left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import Refusal
from tandem.cluster.types import Role, SamplingParams
from tandem.router.attempt import Work
from tandem.router.dispatch import Dispatcher
from tandem.router.errors import Unavailable
from tandem.router.placer import Placer
from tandem.router.placing import Path


def work(tokens: int = 10, **fields: Any) -> Work:
    sampling = fields.pop("sampling", SamplingParams(max_tokens=9))
    values = {"request_id": "q", "number": 1, "output_token_ids": (), **fields}
    return Work(prompt_token_ids=tuple(range(tokens)), sampling=sampling, **values)


def placer(r: Any, *, threshold: int = 0, unready_wait_s: float = 20.0) -> Dispatcher:
    one = Placer(r.members, router_id="r", local_threshold_tokens=threshold, spawn=r.core._spawn)
    return Dispatcher(one, r.members, clock=r.clock, unready_wait_s=unready_wait_s)


def drop(attempt: Any) -> None:
    """Ends an attempt without telling anybody."""
    attempt.close(lambda work: work.close())


@scenario
async def test_the_credit_comes_before_any_prefill(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        attempt = await placer(r).place(work())
        assert attempt.path is Path.SPLIT
        [asked] = decode.requests(pb.ReserveRequest)
        assert (asked.context_tokens, asked.decode_attempt, asked.epoch) == (10, 1, decode.epoch)
        assert not prefill.calls
        drop(attempt)
        r.assert_nothing_left()


@scenario
async def test_a_decode_worker_that_refuses_is_passed_over(rig: Any) -> None:
    async with rig() as r:
        _, full = await r.split()
        other = await r.worker("d1", Role.DECODE, running=5)
        full.refuse["Reserve"] = [grpc.StatusCode.RESOURCE_EXHAUSTED]
        attempt = await placer(r).place(work())
        assert attempt.decode is r.link("d1")
        assert len(other.requests(pb.ReserveRequest)) == 1
        drop(attempt)


@scenario
async def test_while_all_refuse_the_request_waits(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        decode.refuse["Reserve"] = [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
        attempt = await placer(r).place(work())
        assert len(decode.requests(pb.ReserveRequest)) == 4
        assert not prefill.calls
        drop(attempt)


@scenario
async def test_what_is_wrong_everywhere_is_not_asked_twice(rig: Any) -> None:
    async with rig() as r:
        _, decode = await r.split()
        decode.refuse["Reserve"] = [grpc.StatusCode.INVALID_ARGUMENT]
        with pytest.raises(Refusal):
            await placer(r).place(work())
        assert len(decode.calls) == 1


@pytest.mark.parametrize(
    ("roles", "threshold", "fields", "path"),
    [
        ((Role.PREFILL, Role.DECODE), 10, {}, Path.SPLIT),
        ((Role.PREFILL, Role.DECODE), 11, {}, Path.LOCAL),
        ((Role.MIXED,), 0, {}, Path.MIXED),
        ((Role.PREFILL, Role.DECODE, Role.MIXED), 0, {}, Path.SPLIT),
        ((Role.PREFILL, Role.DECODE), 100, {"sampling": SamplingParams(max_tokens=1)}, Path.PREFILL_ONLY),
        ((Role.PREFILL, Role.DECODE), 0, {"output_token_ids": tuple(range(8))}, Path.PREFILL_ONLY),
    ],
)
@scenario
async def test_paths(rig: Any, roles: tuple[Role, ...], threshold: int, fields: dict[str, Any], path: Path) -> None:
    async with rig() as r:
        for role in roles:
            await r.worker(role.value, role)
        attempt = await placer(r, threshold=threshold).place(work(**fields))
        assert attempt.path is path
        assert (attempt.prefill is not None) == (path in (Path.SPLIT, Path.PREFILL_ONLY))
        assert (attempt.decode is not None) == (path is not Path.PREFILL_ONLY)
        drop(attempt)
        r.assert_nothing_left()


@scenario
async def test_a_prompt_cached_on_the_prefill_worker_alone_is_not_prefilled_by_decode(rig: Any) -> None:
    """The threshold counts what the worker that would compute lacks, not what another one has."""
    async with rig() as r:
        await r.split()
        place = placer(r, threshold=6)
        alone = await place.place(work(sampling=SamplingParams(max_tokens=1)))
        assert alone.path is Path.PREFILL_ONLY
        drop(alone)
        split = await place.place(work(number=2))
        assert split.path is Path.SPLIT
        drop(split)
        near = await place.place(work(number=3))
        assert near.path is Path.LOCAL, "it pulled the prompt before"
        drop(near)


@scenario
async def test_a_prompt_goes_where_its_prefix_went(rig: Any) -> None:
    async with rig() as r:
        await r.split()
        await r.worker("p1", Role.PREFILL)
        place = placer(r)
        first = await place.place(work())
        drop(first)
        r.link("p0").sent.prompt_sent(2, 0)  # less than what is cached there
        again = await place.place(work(number=2))
        assert again.prefill is r.link("p0")
        drop(again)
        other = await place.place(work(number=3, output_token_ids=(77,), avoid=frozenset({"p0"})))
        assert other.prefill is r.link("p1")
        drop(other)
        r.link("p0").sent.prompt_done(2, 0)


@scenario
async def test_who_refused_is_asked_again_where_there_is_nobody_else(rig: Any) -> None:
    async with rig() as r:
        await r.split()
        attempt = await placer(r).place(work(avoid=frozenset({"p0", "d0"})))
        assert (attempt.prefill, attempt.decode) == (r.link("p0"), r.link("d0"))
        drop(attempt)


@pytest.mark.parametrize("roles", [(), (Role.PREFILL,), (Role.DECODE,)])
@scenario
async def test_nobody_there_is_an_error_after_a_bounded_wait(rig: Any, roles: tuple[Role, ...]) -> None:
    async with rig() as r:
        for role in roles:
            await r.worker(role.value, role)
        with pytest.raises(Unavailable):
            await placer(r, unready_wait_s=0.01).place(work())


@scenario
async def test_different_kv_is_never_paired(rig: Any) -> None:
    async with rig() as r:
        await r.worker("p0", Role.PREFILL, fingerprint="f")
        await r.worker("d0", Role.DECODE, fingerprint="g")
        with pytest.raises(Unavailable, match="same KV fingerprint"):
            await placer(r, unready_wait_s=0.01).place(work())
        await r.worker("p1", Role.PREFILL, fingerprint="g")
        attempt = await placer(r).place(work())
        assert attempt.prefill is r.link("p1")
        drop(attempt)


@scenario
async def test_kv_of_another_layout_is_never_paired(rig: Any) -> None:
    """The same weights, other blocks: every pull would be refused, so no request is placed there."""
    async with rig() as r:
        await r.worker("p0", Role.PREFILL, kv_layout=b"blocks of 16")
        await r.worker("d0", Role.DECODE, kv_layout=b"blocks of 32")
        with pytest.raises(Unavailable, match="layout"):
            await placer(r, unready_wait_s=0.01).place(work())
        await r.worker("p1", Role.PREFILL, kv_layout=b"blocks of 32")
        attempt = await placer(r).place(work())
        assert attempt.prefill is r.link("p1")
        drop(attempt)


@scenario
async def test_a_worker_that_comes_ends_the_wait(rig: Any) -> None:
    async with rig() as r:
        await r.worker("p0", Role.PREFILL)
        waiting = asyncio.create_task(placer(r).place(work()))
        await asyncio.sleep(0)
        assert not waiting.done()
        await r.worker("d0", Role.DECODE)
        attempt = await waiting
        assert attempt.decode is r.link("d0")
        drop(attempt)


@scenario
async def test_a_credit_granted_to_nobody_is_given_back(rig: Any) -> None:
    async with rig() as r:
        _, decode = await r.split()
        decode.hold["Reserve"] = asyncio.Event()
        waiting = asyncio.create_task(placer(r).place(work()))
        await r.until(lambda: decode.requests(pb.ReserveRequest), "the credit to be asked for")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await r.until(lambda: decode.requests(pb.AbortRequest), "the credit to be given back")
        assert decode.requests(pb.AbortRequest)[0].decode_attempt == 1
        r.assert_nothing_left()


@scenario
async def test_a_worker_that_refused_is_told_when_another_one_granted(rig: Any) -> None:
    """Or it would keep back for a moment what nobody waits for any more."""
    async with rig() as r:
        _, full = await r.split()
        other = await r.worker("d1", Role.DECODE, running=5)
        full.refuse["Reserve"] = [grpc.StatusCode.RESOURCE_EXHAUSTED]
        attempt = await placer(r).place(work())
        await r.until(lambda: full.requests(pb.AbortRequest), "the want to be withdrawn")
        [told] = full.requests(pb.AbortRequest)
        assert (told.prefill_attempt, told.decode_attempt) == (0, 1)
        assert not other.requests(pb.AbortRequest)
        drop(attempt)


@scenario
async def test_a_request_that_leaves_withdraws_what_it_wants(rig: Any) -> None:
    async with rig() as r:
        _, decode = await r.split()
        decode.refuse["Reserve"] = [grpc.StatusCode.RESOURCE_EXHAUSTED] * 1000
        waiting = asyncio.create_task(placer(r).place(work()))
        await r.until(lambda: len(decode.requests(pb.ReserveRequest)) > 1, "the credit to be asked for again")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await r.until(lambda: decode.requests(pb.AbortRequest), "the want to be withdrawn")
        r.assert_nothing_left()
