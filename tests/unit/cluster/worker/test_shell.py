"""The worker's shell: live sequences, deadlines, lost routers, and what one broken part may and may not take along."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from scenario import scenario
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.config import EngineConfig, WorkerConfig
from tandem.cluster.engine.scheduler import QueueFull
from tandem.cluster.engine.scheduler_events import Preempted, SchedulerEvent
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import Refusal
from tandem.cluster.types import EngineLoad, Role, SamplingParams, SequenceSpec, Side, StepTimeCoefficients
from tandem.cluster.worker import shell as module
from tandem.cluster.worker.engine_thread import EngineStatus, EngineStopped
from tandem.cluster.worker.services import LiveSequence, RoleService
from tandem.cluster.worker.shell import WorkerFacts, WorkerShell

FACTS = WorkerFacts(
    worker_id="w0",
    epoch=7,
    model="m",
    fingerprint="f",
    kv_layout=b"",
    block_size=16,
    max_model_len=100,
    vocab_size=50,
    device="none",
)
SPEC = SequenceSpec(seq_id="q/0/d1", prompt_token_ids=(1,), sampling=SamplingParams())


class FakeEngine:
    """Answers commands as the test says; the loop's own thread plays the engine's."""

    def __init__(self) -> None:
        self.status = EngineStatus(load=EngineLoad(num_blocks=8, free_blocks=8), step_time=StepTimeCoefficients())
        self.error: Exception | None = None
        self.hold = False
        self.submitted: list[Any] = []
        self.stopped = False

    def start(self) -> None:
        pass

    def stop(self, timeout_s: float) -> None:
        self.stopped = True

    def submit(self, command: Any) -> Any:
        from concurrent.futures import Future

        future: Future[None] = Future()
        self.submitted.append((command, future))
        if self.error is not None:
            future.set_exception(self.error)
        elif not self.hold:
            future.set_result(None)
        return future


class FakeService(RoleService):
    side = Side.DECODE
    roles = frozenset({Role.DECODE, Role.MIXED})

    def __init__(self, shell: WorkerShell) -> None:
        self.shell = shell
        self.events: list[SchedulerEvent] = []
        self.ended: list[tuple[str, str]] = []
        self.broken: Exception | None = None
        self.promised = 0
        self.ticks = 0
        self.closed = False

    def on_event(self, sequence: LiveSequence, event: SchedulerEvent) -> None:
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        self.events.append(event)

    def end(self, sequence: LiveSequence, reason: str) -> None:
        self.ended.append((sequence.seq_id, reason))
        self.shell.forget(sequence.seq_id)

    def tick(self, now_s: float) -> None:
        self.ticks += 1
        if self.broken is not None:
            raise self.broken

    def fill_status(self, status: pb.WorkerStatus) -> None:
        status.pulls += 3

    def idle(self) -> bool:
        return self.promised == 0

    async def close(self) -> None:
        self.closed = True


class Fixture:
    def __init__(self) -> None:
        config = WorkerConfig(worker_id="w0", role=Role.DECODE, engine=EngineConfig(model="dummy:tiny-llama"))
        self.shell = WorkerShell(config, FACTS, MonotonicClock())
        self.engine, self.service = FakeEngine(), FakeService(self.shell)
        self.shell.assemble(self.engine, (self.service,))  # type: ignore[arg-type]
        self.failures: list[BaseException] = []
        self.shell.start(self.failures.append)

    async def __aenter__(self) -> Fixture:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.shell.stop()
        await self.shell.stop()
        assert self.engine.stopped
        assert self.service.closed

    def admit(self, seq_id: str, router_id: str = "r", timeout_s: float = 60.0) -> LiveSequence:
        sequence = LiveSequence(
            seq_id=seq_id,
            request_id=seq_id,
            choice=0,
            attempt=1,
            router_id=router_id,
            side=Side.DECODE,
            owner=self.service,
        )
        self.shell.admit(sequence, timeout_s)
        return sequence


@pytest.mark.parametrize("turns", range(6))
def test_news_and_a_stop_that_come_together_end_the_heartbeats(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    """A worker that was drained with nothing to do stops in the same moment, however many turns of its loop later."""
    beaten = asyncio.Event()

    class Registry:
        def __init__(self, channel: None) -> None: ...

        async def Heartbeat(self, status: pb.WorkerStatus, timeout: float) -> None:
            beaten.set()

    @contextlib.asynccontextmanager
    async def no_channel(*_: object) -> AsyncIterator[None]:
        yield None

    monkeypatch.setattr(module, "open_channel", no_channel)
    monkeypatch.setattr(module, "RegistryStub", Registry)

    async def main() -> None:
        async with Fixture() as f:
            task = asyncio.create_task(f.shell._heartbeat_forever("registry"))
            await beaten.wait()
            await asyncio.sleep(0.01)
            f.shell.begin_drain()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=5)
            assert done

    asyncio.run(main())


@scenario
async def test_events_reach_the_sequences_owner_until_it_is_forgotten() -> None:
    async with Fixture() as f:
        f.admit("a")
        f.admit("b")
        f.shell._handle_events([Preempted(seq_id="a"), Preempted(seq_id="b"), Preempted(seq_id="stranger")])
        assert f.shell.forget("a") is not None
        assert f.shell.forget("a") is None
        f.shell._handle_events([Preempted(seq_id="a"), Preempted(seq_id="b")])
        assert [event.seq_id for event in f.service.events] == ["a", "b", "b"]
        f.shell.forget("b")
        assert f.shell.idle
        assert not f.shell._by_router


@scenario
async def test_an_event_that_breaks_ends_its_sequence_and_no_other() -> None:
    async with Fixture() as f:
        stream = f.shell.outbox.attach("r")
        f.admit("a")
        f.admit("b")
        f.service.broken = LookupError("a bug")
        f.shell._handle_events([Preempted(seq_id="a"), Preempted(seq_id="b")])
        assert f.service.ended == [("a", "internal")]
        assert [event.seq_id for event in f.service.events] == ["b"]
        frame = stream.frames.get_nowait()
        assert frame is not None
        assert [(event.request_id, event.failed.reason) for event in frame.events] == [("a", "internal")]
        assert not f.failures


@scenario
async def test_a_lost_router_takes_its_own_sequences_only() -> None:
    async with Fixture() as f:
        for seq_id, router_id in (("a", "r1"), ("b", "r2"), ("c", "r1")):
            f.admit(seq_id, router_id)
        f.shell.router_gone("r1")
        f.shell.router_gone("r1")
        f.shell.router_gone("unknown")
        assert sorted(f.service.ended) == [("a", "router_gone"), ("c", "router_gone")]
        assert [sequence.seq_id for sequence in f.shell.sequences_of("r2")] == ["b"]


@scenario
async def test_a_deadline_is_told_once_and_not_after_the_end() -> None:
    async with Fixture() as f:
        stream = f.shell.outbox.attach("r")
        f.admit("early", timeout_s=0.0)
        f.admit("gone", timeout_s=0.0)
        f.shell.forget("gone")
        frame = await stream.frames.get()
        assert frame is not None
        assert [(event.request_id, event.failed.reason, event.failed.retryable) for event in frame.events] == [
            ("early", "deadline", False)
        ]
        assert f.service.ended == [("early", "deadline")]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QueueFull("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (EngineStopped("stopped"), grpc.StatusCode.UNAVAILABLE),
    ],
)
@scenario
async def test_what_the_engine_refuses_is_a_refusal(error: Exception, code: grpc.StatusCode) -> None:
    async with Fixture() as f:
        f.engine.error = error
        with pytest.raises(Refusal) as refused:
            await f.shell.add_to_engine(SPEC)
        assert refused.value.code is code


@scenario
async def test_a_caller_that_leaves_takes_its_sequence_out_again() -> None:
    async with Fixture() as f:
        f.engine.hold = True
        adding = asyncio.create_task(f.shell.add_to_engine(SPEC))
        await asyncio.sleep(0)
        assert len(f.engine.submitted) == 1
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        assert len(f.engine.submitted) == 2  # the abort, behind the add
        f.engine.submitted[0][1].set_exception(QueueFull("full"))  # and nobody has to hear of it
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("error", "reason", "retryable"),
    [(None, "", False), (QueueFull("full"), "queue_full", True), (ValueError("never"), "invalid", False)],
)
@scenario
async def test_a_long_step_keeps_no_caller_and_its_answer_comes_later(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, reason: str, retryable: bool
) -> None:
    monkeypatch.setattr(module, "ADMIT_WAIT_S", 0.0)
    async with Fixture() as f:
        stream = f.shell.outbox.attach("r")
        f.engine.hold = True
        f.admit(SPEC.seq_id)
        await f.shell.add_to_engine(SPEC)
        future = f.engine.submitted[0][1]
        if error is None:
            future.set_result(None)
            await asyncio.sleep(0)
            assert f.shell.sequences_of("r")
            return
        future.set_exception(error)
        frame = await stream.frames.get()
        assert frame is not None
        assert [(e.failed.reason, e.failed.retryable) for e in frame.events] == [(reason, retryable)]
        assert f.service.ended == [(SPEC.seq_id, reason)]


@scenario
async def test_a_drain_is_over_when_nothing_lives_and_nothing_is_promised() -> None:
    async with Fixture() as f:
        f.admit("a")
        f.service.promised = 1
        f.shell.begin_drain()
        with pytest.raises(Refusal, match="draining"):
            f.shell.check_takes_work(f.service, "r", f.shell.facts.epoch)
        idle = asyncio.create_task(f.shell.wait_idle())
        f.shell.forget("a")
        await asyncio.sleep(0)
        assert not idle.done()
        f.service.promised = 0
        await idle


@scenario
async def test_a_failed_engine_ends_streams_and_refuses() -> None:
    async with Fixture() as f:
        stream = f.shell.outbox.attach("r")
        f.shell.failure_from_engine(RuntimeError("on fire"))
        assert await stream.frames.get() is None
        assert [str(error) for error in f.failures] == ["on fire"]
        with pytest.raises(Refusal, match="on fire") as refused:
            f.shell.check_takes_work(f.service, "r", f.shell.facts.epoch)
        assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        assert not f.shell.status().integrity_ok


@scenario
async def test_ticks_that_break_are_a_failure_not_a_silence() -> None:
    """Without them leases, credits and waits would never end."""
    async with Fixture() as f:
        stream = f.shell.outbox.attach("r")
        f.service.broken = LookupError("a bug")
        assert await stream.frames.get() is None
        assert isinstance(f.failures[0], LookupError)


@scenario
async def test_status_says_who_and_how_loaded() -> None:
    async with Fixture() as f:
        f.admit("a")
        load = EngineLoad(num_blocks=8, free_blocks=8, prefix_queries_tokens_total=32, prefix_hits_tokens_total=16)
        f.engine.status = EngineStatus(
            load=load, step_time=StepTimeCoefficients(), steps_total=3, computed_tokens_total=20
        )
        status = f.shell.status()
        assert (status.worker_id, status.epoch, status.role, status.num_blocks) == ("w0", 7, "decode", 8)
        assert (status.streams, status.pulls, status.integrity_ok, status.draining) == (1, 3, True, False)
        assert (status.prefix_queries_tokens_total, status.prefix_hits_tokens_total) == (32, 16)
        assert (status.steps_total, status.computed_tokens_total) == (3, 20)


@scenario
async def test_the_wrong_role_and_strangers_are_turned_away() -> None:
    async with Fixture() as f:
        with pytest.raises(Refusal, match="not attached"):
            f.shell.check_takes_work(f.service, "r", f.shell.facts.epoch)
        f.shell.outbox.attach("r")
        f.shell.check_takes_work(f.service, "r", f.shell.facts.epoch)
        f.shell.role = Role.PREFILL
        with pytest.raises(Refusal, match="role prefill now"):
            f.shell.check_takes_work(f.service, "r", f.shell.facts.epoch)


@pytest.mark.parametrize(
    ("draining", "busy", "leaves"), [(True, False, True), (True, True, False), (False, False, False)]
)
@scenario
async def test_only_who_has_drained_says_that_it_leaves(draining: bool, busy: bool, leaves: bool) -> None:
    """What is cut off while it runs is lost, and its routers must hear that."""
    async with Fixture() as f:
        stream = f.shell.outbox.attach("r")
        if draining:
            f.shell.begin_drain()
        if busy:
            f.admit("a")
        await f.shell.stop()
        frames = [stream.frames.get_nowait() for _ in range(stream.frames.qsize())]
        assert [frame is not None and frame.leaving for frame in frames] == [True, False][not leaves :]
