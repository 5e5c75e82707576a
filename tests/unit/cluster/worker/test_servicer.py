"""The Worker service over real gRPC: who is turned away, whose stream hears what, and what a broken one takes along."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc import aio
from scenario import scenario
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import PROTOCOL_VERSION
from tandem.cluster.types import Role
from tandem.cluster.worker import servicer
from tandem.cluster.worker.commands import Commands

Code = grpc.StatusCode


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"protocol_version": 9}, Code.FAILED_PRECONDITION, "protocol_version: 9"),
        ({"epoch": 5}, Code.FAILED_PRECONDITION, "an earlier life"),
        ({"router_id": ""}, Code.INVALID_ARGUMENT, "router_id"),
    ],
)
@scenario
async def test_a_router_that_means_another_worker_is_refused(
    bench: Any, changes: dict[str, Any], code: grpc.StatusCode, message: str
) -> None:
    async with bench(Role.PREFILL) as worker:
        fields = {"router_id": "r2", "protocol_version": PROTOCOL_VERSION, "epoch": worker.shell.facts.epoch}
        stream = worker.stub.Attach(iter([pb.RouterFrame(**{**fields, **changes})]))
        got, details = await refusal(stream.read())
        assert got is code
        assert message in details
        assert len(worker.shell.outbox) == 1


@scenario
async def test_who_opens_a_stream_and_does_not_say_who_it_is_is_turned_away(bench: Any) -> None:
    async with bench(Role.PREFILL) as worker:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(servicer, "INTRODUCTION_S", 0.05)
            code, details = await refusal(worker.stub.Attach().read())
        assert (code, "no first frame within 0.05 s" in details) == (Code.DEADLINE_EXCEEDED, True)
        assert len(worker.shell.outbox) == 1


@scenario
async def test_a_stream_whose_commands_cannot_be_read_ends(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_: Any, frames: Any) -> None:
        await anext(frames, None)
        raise RuntimeError("no such frame")

    async with bench(Role.PREFILL) as worker:
        fields = {"router_id": "r2", "protocol_version": PROTOCOL_VERSION, "epoch": worker.shell.facts.epoch}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Commands, "read", broken)
            stream = worker.stub.Attach(iter([pb.RouterFrame(**fields)]))
            assert [frame.epoch async for frame in stream] == [worker.shell.facts.epoch]
        assert "the commands of router r2 cannot be read" in caplog.text
        assert len(worker.shell.outbox) == 1


@scenario
async def test_work_is_for_attached_routers_and_the_right_role(bench: Any) -> None:
    async with bench(Role.PREFILL) as worker:
        code, details = await refusal(worker.prefill(worker.sequence(router_id="stranger")))
        assert (code, "not attached" in details) == (Code.FAILED_PRECONDITION, True)
        code, details = await refusal(worker.reserve(worker.sequence()))
        assert (code, "role" in details) == (Code.FAILED_PRECONDITION, True)
        await worker.clean()


@pytest.mark.parametrize("off", [0, 1], ids=["no epoch", "another life's epoch"])
@scenario
async def test_work_for_another_life_of_the_worker_is_refused(bench: Any, off: int) -> None:
    async with bench(Role.MIXED) as worker:
        sequence, epoch = worker.sequence(), off and worker.shell.facts.epoch + off
        credit_id = await worker.reserve(sequence)
        wrong = pb.DecodeRequest(sequence=sequence, credit_id=credit_id, epoch=epoch)
        for call in (
            worker.prefill(worker.sequence(choice=1), epoch=epoch),
            worker.reserve(worker.sequence(choice=2), epoch=epoch),
            worker.stub.Decode(wrong, timeout=20),
        ):
            code, details = await refusal(call)
            assert (code, details.startswith(f"epoch: {epoch} ")) == (Code.FAILED_PRECONDITION, True)
        assert worker.leftovers() == {"credited_blocks": 2}
        await worker.decode(sequence, credit_id)
        await worker.until(worker.finished, "the answer of the life that was meant")
        await worker.clean()


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf"), 86401.0])
@scenario
async def test_a_time_to_leave_that_is_none_changes_nothing(bench: Any, timeout_s: float) -> None:
    async with bench(Role.MIXED) as worker:
        worker.shell.on_leave = lambda timeout_s: pytest.fail("it leaves")
        code, details = await refusal(worker.stub.Drain(pb.DrainRequest(exit=True, timeout_s=timeout_s)))
        assert (code, "timeout_s" in details) == (Code.INVALID_ARGUMENT, True)
        assert not worker.shell.draining


@scenario
async def test_a_worker_leaves_when_its_process_can_end(bench: Any) -> None:
    async with bench(Role.MIXED) as worker:
        code, details = await refusal(worker.stub.Drain(pb.DrainRequest(exit=True, timeout_s=1)))
        assert (code, "no process of its own" in details) == (Code.FAILED_PRECONDITION, True)
        assert not worker.shell.draining
        left: list[float] = []
        worker.shell.on_leave = left.append
        await worker.stub.Drain(pb.DrainRequest(exit=True, timeout_s=1.5))
        assert (left, worker.shell.draining) == ([1.5], True)


@scenario
async def test_a_draining_worker_finishes_and_takes_nothing_new(bench: Any) -> None:
    async with bench(Role.MIXED) as worker:
        sequence = worker.sequence()
        worker.device.gate.clear()
        await worker.decode(sequence, await worker.reserve(sequence))
        await worker.stub.Drain(pb.DrainRequest())
        assert (await worker.stub.Status(pb.StatusRequest())).draining
        code, details = await refusal(worker.reserve(worker.sequence(request_id="q2")))
        assert (code, "draining" in details) == (Code.FAILED_PRECONDITION, True)
        idle = asyncio.create_task(worker.shell.wait_idle())
        assert not worker.shell.idle
        worker.device.gate.set()
        await idle
        assert len(worker.tokens()) == 4
        await worker.clean()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "prompt_token_ids: empty"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"sampling": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling": {"temperature": float("nan")}}, "temperature"),
        ({"sampling": {"logit_bias": ((10**6, 1.0),)}}, "logit_bias: 1000000"),
        ({"output_token_ids": [10**6]}, "output_token_ids: 1000000"),
        ({"tokens": 100_000}, "prompt_token_ids"),
    ],
)
@scenario
async def test_what_could_never_run_is_refused_before_it_reaches_the_engine(
    bench: Any, fields: dict[str, Any], message: str
) -> None:
    async with bench(Role.PREFILL) as worker:
        code, details = await refusal(worker.prefill(worker.sequence(**fields)))
        assert code is Code.INVALID_ARGUMENT
        assert message in details
        await worker.clean()
        await worker.prefill(worker.sequence(request_id="good"), handoff=False)
        await worker.until(worker.finished, "the engine to go on")


@scenario
async def test_a_broken_stream_ends_what_it_had_asked_for(bench: Any) -> None:
    async with bench(Role.MIXED) as worker:
        sequence = worker.sequence(sampling={"max_tokens": 200})
        worker.device.gate.clear()
        await worker.decode(sequence, await worker.reserve(sequence))
        in_flight = asyncio.create_task(worker.prefill(worker.sequence(choice=1)))
        await worker.until(lambda: len(worker.shell.sequences_of("r")) == 2, "a call that waits for the engine")
        await worker.detach()
        await worker.until(lambda: not worker.shell.outbox.attached("r"), "the break to be noticed")
        worker.device.gate.set()
        await in_flight
        await worker.clean()


@scenario
async def test_a_second_stream_ends_what_the_first_had_asked_for(bench: Any) -> None:
    """The router opens one when it has lost the old one, though this side may not have noticed."""
    async with bench(Role.MIXED) as worker:
        sequence = worker.sequence(sampling={"max_tokens": 200})
        worker.device.gate.clear()
        await worker.decode(sequence, await worker.reserve(sequence))
        older = worker._reader
        await worker.attach()
        assert not worker.shell.sequences_of("r")
        await older
        worker.device.gate.set()
        await worker.clean()
        again = worker.sequence(attempt=2)
        await worker.decode(again, await worker.reserve(again))
        await worker.until(worker.finished, "the new stream to be heard")
        assert len(worker.tokens(attempt=2)) == 4


@scenario
async def test_an_engine_that_fails_is_the_end_of_the_worker(bench: Any) -> None:
    async with bench(Role.MIXED) as worker:
        sequence = worker.sequence(sampling={"max_tokens": 200})
        credit = await worker.reserve(sequence)
        worker.device.error = RuntimeError("the device is on fire")
        await asyncio.gather(worker.decode(sequence, credit), return_exceptions=True)
        await worker.until(lambda: worker.failures, "the failure to be reported")
        assert [str(error) for error in worker.failures] == ["the device is on fire"]
        await worker.until(lambda: worker.stream_ended, "the router to be told")
        code, details = await refusal(worker.reserve(worker.sequence(request_id="q2")))
        assert (code, "on fire" in details) == (Code.UNAVAILABLE, True)
        stream = worker.stub.Attach(
            iter([pb.RouterFrame(router_id="r", protocol_version=PROTOCOL_VERSION, epoch=worker.shell.facts.epoch)])
        )
        assert (await refusal(stream.read()))[0] is Code.UNAVAILABLE
        status = await worker.stub.Status(pb.StatusRequest())
        assert (status.integrity_ok, status.draining) == (False, True)


@scenario
async def test_the_time_of_a_request_runs_out_on_the_worker_too(bench: Any) -> None:
    async with bench(Role.MIXED) as worker:
        sequence = worker.sequence(timeout_s=0.05, sampling={"max_tokens": 200})
        credit = await worker.reserve(sequence)
        worker.device.gate.clear()
        await worker.decode(sequence, credit)
        await worker.until(worker.failed, "the router to be told")
        assert worker.failed() == ["deadline"]
        worker.device.gate.set()
        await worker.clean()
        assert worker.failed() == ["deadline"]
