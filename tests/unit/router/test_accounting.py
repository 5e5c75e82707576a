"""Every request ends in exactly one of answered, refused, canceled, failed; a mass death leaves no clean-up behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import Role, Side
from tandem.router.errors import DeadlineExceeded, Overloaded, ServiceError, Unavailable

P, D = Side.PREFILL, Side.DECODE


def accounts(r: Any) -> tuple[float, float, float, float]:
    """(answered, refused, canceled, failed), of requests with one choice."""

    def total(name: str) -> float:
        return sum(
            sample.value
            for metric in r.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == f"tandem:{name}_total"
        )

    return (
        total("request_success"),
        total("request_refusals"),
        total("requests_canceled"),
        total("request_failures"),
    )


def answer(r: Any, prefill: Any, decode: Any) -> None:
    prefill.on_prefill = lambda request: [r.event(request.sequence, P, tokens=(0, list(b"a"), ""))]
    decode.on_decode = lambda request: [r.event(request.sequence, D, tokens=(0, list(b"abcd"), "length"))]


@scenario
async def test_each_way_to_end_is_counted_once(rig: Any) -> None:
    async with rig(max_waiting=1, max_attempts=2, unready_wait_s=0.01) as r:
        with pytest.raises(Unavailable):
            await r.collect(r.request())  # nobody is there
        assert accounts(r) == (0, 0, 0, 1)
        prefill, decode = await r.split()
        answer(r, prefill, decode)
        await r.collect(r.request())
        assert accounts(r) == (1, 0, 0, 1)
        prefill.on_prefill = decode.on_decode = lambda request: []
        task = asyncio.create_task(r.collect(r.request()))
        await r.until(lambda: r.core._admission.waiting == 1, "one to wait")
        with pytest.raises(Overloaded):
            await r.collect(r.request())
        assert accounts(r) == (1, 1, 0, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert accounts(r) == (1, 1, 1, 1)
        with pytest.raises(DeadlineExceeded):
            await r.collect(r.request(timeout_s=0.2))
        assert accounts(r) == (1, 1, 1, 2)
        prefill.on_prefill = lambda request: [r.event(request.sequence, P, failed=("prefill_failed", False))]
        with pytest.raises(ServiceError, match="prefill_failed"):
            await r.collect(r.request())
        assert accounts(r) == (1, 1, 1, 3)
        # A retry is no end; a client that leaves with its answer has not canceled.
        answer(r, prefill, decode)
        good = decode.on_decode

        def once(request: pb.DecodeRequest) -> list[pb.Event]:
            decode.on_decode = good
            return [r.event(request.sequence, D, failed=("corrupt", True))]

        decode.on_decode = once
        await r.collect(r.request())
        assert accounts(r) == (2, 1, 1, 3)
        r.assert_nothing_left()


@scenario
async def test_a_mass_death_loses_no_request_and_leaves_no_clean_up(rig: Any) -> None:
    async with rig() as r:
        prefill, decode = await r.split()
        count = 100
        requests = [replace(r.request(), request_id=f"q{i}") for i in range(count)]
        tasks = [asyncio.create_task(r.collect(request)) for request in requests]
        await r.until(lambda: len(decode.requests(pb.DecodeRequest)) >= 8, "several to be under way")
        answer(r, prefill, decode)
        spare = await r.worker("d1", Role.DECODE)
        answer(r, prefill, spare)
        await decode.die()
        for request in prefill.requests(pb.PrefillRequest):
            prefill.send(r.event(request.sequence, P, tokens=(0, list(b"a"), "")))
        deltas = await asyncio.gather(*tasks)
        assert ["".join(delta.text for delta in one) for one in deltas] == ["abcd"] * count
        assert accounts(r) == (count, 0, 0, 0)
        assert len(prefill.requests(pb.PrefillRequest)) == count, "no prompt was prefilled twice"
        await r.until(lambda: not r.core._cleanups, "the clean-ups")
        r.assert_nothing_left()


@scenario
async def test_a_request_that_is_canceled_twice_is_accounted_for_once_and_gives_its_place_back(rig: Any) -> None:
    """A client leaves, and the router stops while it still waits for the request to end."""
    async with rig() as r:
        await r.split()
        ended: list[str] = []
        r.core._log.record_end = lambda **fields: ended.append(fields["request_id"])
        for patience in range(12):  # steps of the event loop, up to where the workers have been asked
            leaving = asyncio.create_task(r.collect(replace(r.request(), request_id=f"q{patience}")))
            for _ in range(patience + 1):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await r.until(lambda: not r.core._dispatcher.waiting_by_class(), "its place to be free")
            assert accounts(r) == (0, 0, patience + 1, 0)
            assert len(ended) == patience + 1
        await r.until(lambda: not r.core._cleanups, "the clean-ups")
        r.assert_nothing_left()
