"""The engine's thread: commands between steps, events in order, and no future that hangs whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.devices.paced import PacedDevice
from tandem.cluster.engine.integrity import IntegrityError
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import SchedulerEvent, TokensEmitted
from tandem.cluster.types import Role, SamplingParams, SequenceSpec, StepTimeCoefficients
from tandem.cluster.worker import engine_thread as module
from tandem.cluster.worker.engine_thread import EngineStopped, EngineThread

WAIT_S = 20.0


class Engine:
    """An engine thread on a paced device that the test can hold and break."""

    def __init__(self, gated: Callable[[Any], Any]) -> None:
        self.pool = BlockPool(64, 16)
        self.scheduler = Scheduler(
            block_pool=self.pool,
            prefix_cache=PrefixCache(self.pool, True),
            policy=policy_for(Role.MIXED),
            clock=MonotonicClock(),
            max_batched_tokens=64,
            max_running=4,
            max_waiting=8,
            max_model_len=512,
            eos_token_ids=(),
        )
        self.device = gated(PacedDevice(1000, num_blocks=64, coefficients=StepTimeCoefficients(step_s=1e-5)))
        self.events: list[SchedulerEvent] = []
        self.finished = threading.Event()
        self.failures: list[BaseException] = []
        self.failed = threading.Event()
        self.thread = EngineThread(self.scheduler, self.device, on_events=self.on_events, on_failure=self.on_failure)

    def on_events(self, events: Sequence[SchedulerEvent]) -> None:
        self.events += events
        if any(isinstance(event, TokensEmitted) and event.finish_reason for event in events):
            self.finished.set()

    def on_failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()

    def add(self, seq_id: str, max_tokens: int = 3) -> Future[None]:
        spec = SequenceSpec(
            seq_id=seq_id, prompt_token_ids=(1, 2, 3), sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens)
        )
        return self.thread.submit(lambda scheduler: scheduler.add(spec))


@pytest.fixture
def engine(gated: Callable[[Any], Any]) -> Iterator[Engine]:
    engine = Engine(gated)
    yield engine
    engine.device.gate.set()
    engine.thread.stop(WAIT_S)
    assert not engine.thread.alive


def test_a_sequence_runs_to_its_end_and_its_events_come_in_order(engine: Engine) -> None:
    engine.thread.start()
    engine.add("a").result(WAIT_S)
    assert engine.finished.wait(WAIT_S)
    assert [event.index for event in engine.events if isinstance(event, TokensEmitted)] == [0, 1, 2]
    assert engine.thread.submit(lambda scheduler: scheduler.load().running).result(WAIT_S) == 0
    status = engine.thread.status
    assert (status.steps_total, status.computed_tokens_total) == (3, 5)
    assert status.load.free_blocks + status.load.cached_blocks == 64


def test_commands_given_before_the_start_run_after_it(engine: Engine) -> None:
    early = engine.add("a")
    assert not early.done()
    engine.thread.start()
    early.result(WAIT_S)


def test_a_command_that_raises_harms_only_its_caller(engine: Engine) -> None:
    engine.thread.start()
    with pytest.raises(ZeroDivisionError):
        engine.thread.submit(lambda scheduler: 1 // 0).result(WAIT_S)
    assert engine.thread.submit(lambda scheduler: 5).result(WAIT_S) == 5


def test_a_cancelled_command_does_not_run(engine: Engine) -> None:
    ran: list[int] = []
    first, second = (engine.thread.submit(lambda scheduler, i=i: ran.append(i)) for i in (1, 2))  # type: ignore[misc]
    assert first.cancel()
    engine.thread.start()
    second.result(WAIT_S)
    assert ran == [2]


def test_stopping_waits_for_the_step_and_answers_what_it_leaves_undone(engine: Engine) -> None:
    engine.thread.start()
    engine.device.gate.clear()
    engine.add("a").result(WAIT_S)
    assert engine.device.computing.wait(WAIT_S)
    pending = engine.add("b")
    stopper = threading.Thread(target=engine.thread.stop, args=(WAIT_S,))
    stopper.start()
    engine.device.gate.set()
    stopper.join(WAIT_S)
    assert not engine.thread.alive
    with pytest.raises(EngineStopped):
        pending.result(WAIT_S)
    with pytest.raises(EngineStopped):
        engine.add("c").result(WAIT_S)
    engine.thread.stop(WAIT_S)
    assert not engine.failures


def test_stopping_an_engine_that_never_started_answers_its_callers(engine: Engine) -> None:
    early = engine.add("a")
    engine.thread.stop(WAIT_S)
    with pytest.raises(EngineStopped):
        early.result(WAIT_S)


def test_a_device_that_fails_is_reported_once_and_leaves_no_caller_waiting(engine: Engine) -> None:
    engine.thread.start()
    engine.device.gate.clear()
    engine.add("a").result(WAIT_S)
    assert engine.device.computing.wait(WAIT_S)
    pending = engine.add("b")
    engine.device.error = RuntimeError("on fire")
    engine.device.gate.set()
    assert engine.failed.wait(WAIT_S)
    for future in (pending, engine.add("c")):
        with pytest.raises(EngineStopped):
            future.result(WAIT_S)
    assert [str(error) for error in engine.failures] == ["on fire"]


def test_no_command_hangs_that_races_with_the_failure(gated: Callable[[Any], Any]) -> None:
    """Between the look whether the engine lives and the queue there is a gap; whoever falls into it is answered."""
    for _ in range(20):
        engine = Engine(gated)
        engine.device.error = RuntimeError("on fire")
        engine.thread.start()
        futures: list[Future[None]] = []
        begin = threading.Barrier(5)

        def submit(engine: Engine = engine, begin: Any = begin, futures: Any = futures) -> None:
            begin.wait(WAIT_S)
            futures.extend(engine.add(f"{threading.get_ident()}/{i}") for i in range(50))

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        begin.wait(WAIT_S)
        for thread in threads:
            thread.join(WAIT_S)
        for future in futures:
            future.exception(WAIT_S)
        assert engine.failed.wait(WAIT_S)
        engine.thread.stop(WAIT_S)


def test_a_callback_that_raises_is_a_failure_too(engine: Engine) -> None:
    def broken(events: Sequence[SchedulerEvent]) -> None:
        raise LookupError("nobody listens")

    engine.thread._on_events = broken
    engine.thread.start()
    engine.add("a")
    assert engine.failed.wait(WAIT_S)
    assert isinstance(engine.failures[0], LookupError)


def test_an_idle_engine_proves_its_ledger(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_CHECK_AFTER_S", 0.0)
    engine.pool.allocate(1, "nobody that the scheduler knows")
    engine.thread.start()
    assert engine.failed.wait(WAIT_S)
    assert isinstance(engine.failures[0], IntegrityError)
