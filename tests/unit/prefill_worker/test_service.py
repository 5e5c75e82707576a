"""The prefill service: first token at once, KV kept under a lease, and every way out gives the blocks back."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc import aio
from scenario import scenario
from tandem.cluster.types import Role


@scenario
async def test_the_first_token_is_told_and_the_kv_is_kept(bench: Any) -> None:
    async with bench(Role.PREFILL) as worker:
        await worker.prefill(worker.sequence())
        await worker.until(lambda: worker.tokens() and worker.leftovers().get("leases") == 1, "the lease")
        [event] = worker.events
        assert list(worker.tokens()) == [0]
        assert event.tokens.HasField("prefill")
        assert not event.tokens.finish_reason
        assert worker.leftovers()["held_blocks"] == 2
        assert not worker.shell.idle
        await worker.abort()
        await worker.clean()


@scenario
async def test_kv_that_nobody_reads_goes_when_its_lease_ends(bench: Any) -> None:
    async with bench(Role.PREFILL, lease_s=0.05) as worker:
        await worker.prefill(worker.sequence())
        await worker.until(worker.tokens, "the first token")
        await worker.clean()
        assert worker.failed() == []


@pytest.mark.parametrize(("handoff", "sampling"), [(False, {"max_tokens": 1}), (True, {"max_tokens": 1})])
@scenario
async def test_a_first_token_that_ends_the_answer_leaves_nothing(
    bench: Any, handoff: bool, sampling: dict[str, Any]
) -> None:
    async with bench(Role.PREFILL) as worker:
        await worker.prefill(worker.sequence(sampling=sampling), handoff=handoff)
        await worker.until(worker.finished, "the answer")
        assert worker.events[0].tokens.finish_reason == "length"
        await worker.clean()


@pytest.mark.parametrize("when", ["before", "computing", "held", "twice"])
@scenario
async def test_an_abort_at_any_time_frees_everything(bench: Any, when: str) -> None:
    async with bench(Role.PREFILL) as worker:
        if when == "before":
            await worker.abort()
            with pytest.raises(aio.AioRpcError) as error:
                await worker.prefill(worker.sequence())
            assert error.value.code() is grpc.StatusCode.ABORTED
        elif when == "computing":
            worker.device.gate.clear()
            await worker.prefill(worker.sequence())
            await worker.until(worker.device.computing.is_set, "the step")
            await worker.abort()
            worker.device.gate.set()
        else:
            await worker.prefill(worker.sequence())
            await worker.until(lambda: worker.leftovers().get("held"), "the KV to be held")
            await worker.abort()
            if when == "twice":
                await worker.abort()
        await worker.clean()
        await worker.prefill(worker.sequence(attempt=2, sampling={"max_tokens": 1}))
        await worker.until(worker.finished, "the next attempt")


@scenario
async def test_a_full_queue_refuses_and_keeps_nothing(bench: Any) -> None:
    async with bench(Role.PREFILL, engine={"max_waiting": 1, "max_running": 1}) as worker:
        worker.device.gate.clear()
        await worker.prefill(worker.sequence(choice=0))
        await worker.until(worker.device.computing.is_set, "the first to compute")
        calls = []
        for choice in (1, 2):  # one after the other: which of two calls at once comes first is nobody's promise
            calls.append(asyncio.create_task(worker.prefill(worker.sequence(choice=choice))))
            known = 1 + choice
            await worker.until(lambda known=known: len(worker.shell.sequences_of("r")) == known, "it to be admitted")
        # Both are with the engine, which looks at them after its step.
        worker.device.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        await worker.until(lambda: len(worker.shell.sequences_of("r")) == 2, "one to be refused")
        refused = [r.code().name for r in results if isinstance(r, aio.AioRpcError)]
        await worker.until(lambda: refused or worker.failed(), "the router to be told")
        assert (refused, worker.failed()) in ((["RESOURCE_EXHAUSTED"], []), ([], ["queue_full"]))
        await worker.abort(choice=0)
        await worker.abort(choice=1)
        await worker.clean()


@scenario
async def test_the_same_attempt_twice_is_refused(bench: Any) -> None:
    async with bench(Role.PREFILL) as worker:
        await worker.prefill(worker.sequence())
        with pytest.raises(aio.AioRpcError):
            await worker.prefill(worker.sequence())
        await worker.until(lambda: worker.tokens(), "the first one to be unharmed")
        await worker.abort()
        await worker.clean()


@scenario
async def test_a_caller_that_leaves_while_it_is_admitted_leaves_nothing(bench: Any) -> None:
    async with bench(Role.PREFILL) as worker:
        worker.device.gate.clear()
        await worker.prefill(worker.sequence(choice=0))
        await worker.until(worker.device.computing.is_set, "a step that holds the engine")
        call = asyncio.create_task(worker.prefill(worker.sequence(choice=1)))
        await worker.until(lambda: len(worker.shell.sequences_of("r")) == 2, "the second to be admitted")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await worker.until(lambda: len(worker.shell.sequences_of("r")) == 1, "the call's end to be noticed")
        worker.device.gate.set()
        await worker.abort(choice=0)
        await worker.clean()
        assert not worker.tokens(choice=1)


@scenario
async def test_a_sequence_the_device_cannot_compute_fails_alone(bench: Any) -> None:
    async with bench(Role.PREFILL) as worker:
        await worker.prefill(worker.sequence(40))
        await worker.until(lambda: worker.leftovers().get("held"), "the prefix to be cached")
        await worker.abort()
        await worker.clean()
        worker.device._device.kv.slots[:] = 0  # what the prefix cache now offers is not KV
        await worker.prefill(worker.sequence(40, attempt=2))
        await worker.until(worker.failed, "the failure")
        assert worker.failed() == ["prefill_failed"]
        await worker.clean()
        assert not worker.failures
