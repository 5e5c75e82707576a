"""The engine's thread with several plans under way: what is launched when, and how it ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.plan import DRAWN, RowOutput, StepOutput, StepPlan
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import BlocksGranted, SchedulerEvent, TokensEmitted
from tandem.cluster.latency.linear import OnlineStepTimeFit
from tandem.cluster.types import Handoff, Role, SampledToken, SamplingParams, SequenceSpec
from tandem.cluster.worker import engine_thread as module
from tandem.cluster.worker.engine_thread import EngineStopped, EngineThread
from tandem.cluster.worker.heard_steps import HeardSteps

WAIT_S = 20.0


class Ahead:
    """A device that takes several plans, ends them when the test says so, and draws 100 + index."""

    late_steps_total = 0

    def __init__(self, plans_ahead: int, looks_ahead: bool) -> None:
        self.plans_ahead, self.looks_ahead = plans_ahead, looks_ahead
        self.log: list[str] = []
        self.plans: deque[StepPlan] = deque()
        self.changed = threading.Condition()
        self.may_end = 0
        self.error: Exception | None = None
        self._wake: threading.Event | None = None

    def launch(self, plan: StepPlan) -> None:
        rows = " ".join(f"{row.seq_id}{'?' if list(row.token_ids) == [DRAWN] else row.start}" for row in plan.rows)
        with self.changed:
            self.plans.append(plan)
            assert len(self.plans) <= self.plans_ahead
            self.log.append(f"launch {rows}")
            self.changed.notify_all()

    def done(self) -> bool:
        return False

    def wait(self, wake: threading.Event) -> bool:
        self._wake = wake
        if not self.may_end:
            wake.wait(WAIT_S)
        return self.may_end > 0

    def collect(self) -> StepOutput:
        with self.changed:
            assert self.changed.wait_for(lambda: self.may_end > 0, WAIT_S)
            if self.error is not None:
                raise self.error
            self.may_end -= 1
            plan = self.plans.popleft()
            self.log.append(f"collect {plan.plan_id}")
            self.changed.notify_all()
        tokens = [(row.seq_id, row.sample) for row in plan.rows]
        drawn = [(SampledToken(100 + spec.output_index),) if spec is not None else () for _, spec in tokens]
        rows = [RowOutput(seq_id, token) for (seq_id, _), token in zip(tokens, drawn, strict=True)]
        return StepOutput(plan.plan_id, tuple(rows), 0.001)

    def end(self, plans: int = 1) -> None:
        with self.changed:
            self.may_end += plans
            self.changed.notify_all()
        if self._wake is not None:
            self._wake.set()

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S), self.log


class Engine:
    """An engine thread on such a device."""

    def __init__(self, plans_ahead: int = 2, *, looks_ahead: bool = False, role: Role = Role.MIXED) -> None:
        self.pool = BlockPool(64, 16)
        self.device: Any = Ahead(plans_ahead, looks_ahead)
        self.events: list[SchedulerEvent] = []
        self.failures: list[BaseException] = []
        scheduler = Scheduler(
            block_pool=self.pool,
            prefix_cache=PrefixCache(self.pool, True),
            policy=policy_for(role),
            clock=MonotonicClock(),
            max_batched_tokens=16,
            max_running=4,
            max_waiting=8,
            max_model_len=512,
            eos_token_ids=(),
            max_outstanding_plans=plans_ahead,
            looks_ahead=looks_ahead,
        )
        self.thread = EngineThread(
            scheduler, self.device, on_events=self.events.extend, on_failure=self.failures.append
        )

    def add(self, seq_id: str, prompt: int = 3, max_tokens: int = 3, handoff: Handoff = Handoff.NONE) -> None:
        spec = SequenceSpec(
            seq_id=seq_id,
            prompt_token_ids=tuple(range(1, prompt + 1)),
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            handoff=handoff,
        )
        self.thread.submit(lambda scheduler: scheduler.add(spec)).result(WAIT_S)

    def ask(self, question: Callable[[Scheduler], Any]) -> Any:
        return self.thread.submit(question).result(WAIT_S)


@pytest.fixture
def made() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*args: Any, **fields: Any) -> Engine:
        engines.append(Engine(*args, **fields))
        engines[-1].thread.start()
        return engines[-1]

    yield make
    for engine in engines:
        engine.device.end(100)
        engine.thread.stop(WAIT_S)
        assert not engine.thread.alive


def test_the_next_plan_is_launched_before_the_oldest_is_collected(made: Callable[..., Engine]) -> None:
    engine = made(looks_ahead=True)
    engine.add("a", max_tokens=4)
    engine.device.until(lambda: len(engine.device.plans) == 2)
    assert engine.device.log == ["launch a0", "launch a?"]
    engine.device.end()
    engine.device.until(lambda: len(engine.device.log) == 4)
    assert engine.device.log[2:] == ["collect 0", "launch a?"]
    engine.device.end(3)
    engine.device.until(lambda: engine.device.log[-1] == "collect 3")
    assert engine.ask(lambda scheduler: scheduler.load().running) == 0
    tokens = [event.tokens[0].token_id for event in engine.events if isinstance(event, TokensEmitted)]
    assert tokens == [100, 101, 102, 103]
    assert engine.thread.status.steps_total == 4


def test_a_command_is_taken_up_while_a_plan_is_under_way(made: Callable[..., Engine]) -> None:
    """As in virtual time: a plan may begin as soon as the device takes one."""
    engine = made(2)
    engine.add("a")
    engine.device.until(lambda: engine.device.log == ["launch a0"])
    engine.add("b", handoff=Handoff.OUT)
    engine.device.until(lambda: engine.device.log == ["launch a0", "launch b0"])
    grants = [event.seq_id for event in engine.events if isinstance(event, BlocksGranted)]
    assert grants == ["b"]  # told before its step, which waits for a's


def test_one_plan_ahead_is_one_step_after_another(made: Callable[..., Engine]) -> None:
    engine = made(1)
    engine.add("a")
    for step in range(3):
        engine.device.until(lambda step=step: len(engine.device.log) == 2 * step + 1)
        engine.device.end()
        engine.device.until(lambda step=step: len(engine.device.log) >= 2 * step + 2)
    assert engine.device.log == ["launch a0", "collect 0", "launch a3", "collect 1", "launch a4", "collect 2"]


def test_a_sequence_aborted_in_two_plans_says_nothing_and_frees_its_blocks_with_the_second(
    made: Callable[..., Engine],
) -> None:
    engine = made(3, looks_ahead=True)
    engine.add("a", max_tokens=3)
    engine.device.until(lambda: len(engine.device.plans) == 3)
    aborted = engine.thread.submit(lambda scheduler: scheduler.abort("a"))
    engine.device.end()  # the thread waits for the oldest, then takes the command up
    assert aborted.result(WAIT_S)
    held = engine.ask(lambda scheduler: (engine.pool.num_held, scheduler.check_integrity()))[0]
    assert held == 1
    told = len(engine.events)
    engine.device.end(2)
    engine.device.until(lambda: engine.device.log[-1] == "collect 2")
    assert engine.ask(lambda scheduler: engine.pool.num_held) == 0
    assert len(engine.events) == told


def test_stopping_collects_what_is_under_way(made: Callable[..., Engine]) -> None:
    engine = made(2, looks_ahead=True)
    engine.add("a", max_tokens=9)
    engine.device.until(lambda: len(engine.device.plans) == 2)
    stopper = threading.Thread(target=engine.thread.stop, args=(WAIT_S,))
    stopper.start()
    engine.device.end(100)
    stopper.join(WAIT_S)
    assert not engine.device.plans
    assert not engine.failures
    with pytest.raises(EngineStopped):
        engine.add("b")


def test_a_device_that_fails_with_two_plans_under_way_is_reported_once(made: Callable[..., Engine]) -> None:
    engine = made(2, looks_ahead=True)
    engine.add("a", max_tokens=9)
    engine.device.until(lambda: len(engine.device.plans) == 2)
    pending = engine.thread.submit(lambda scheduler: None)
    engine.device.error = RuntimeError("on fire")
    engine.device.end()
    with pytest.raises(EngineStopped):
        pending.result(WAIT_S)
    assert [str(error) for error in engine.failures] == ["on fire"]


def test_the_ledger_is_proven_only_when_nothing_is_under_way(
    made: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_CHECK_AFTER_S", 0.0)
    proven: list[int] = []
    engine = made(2)
    monkeypatch.setattr(Scheduler, "check_integrity", lambda scheduler: proven.append(len(engine.device.plans)))
    engine.add("a", max_tokens=2)
    engine.device.until(lambda: len(engine.device.plans) == 1)
    engine.add("b", max_tokens=1)
    engine.device.end(100)
    engine.device.until(lambda: sum(line.startswith("collect") for line in engine.device.log) == 3)
    for _ in range(1000):
        engine.ask(lambda scheduler: None)
        if proven:
            break
    assert set(proven) == {0}


class Heard(OnlineStepTimeFit):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Sequence[float]] = []

    def observe(self, prefill_tokens: int, decode_rows: int, context_tokens: int, duration_s: float) -> None:
        self.told.append((prefill_tokens, decode_rows, context_tokens, duration_s))


def test_of_a_pipelines_steps_routers_hear_what_virtual_time_tells_them() -> None:
    """Rows: all that decode, and how long a token takes. Prompts: how fast they come out of the pipeline."""
    engine, times_s = Engine(), iter([10.0, 10.5, 10.9, 20.0])
    fit = Heard()
    heard = HeardSteps(fit, 2, lambda: next(times_s))
    scheduler = engine.thread._scheduler
    specs = [
        SequenceSpec(seq_id=str(n), prompt_token_ids=(1,) * 4, sampling=SamplingParams(max_tokens=5)) for n in range(3)
    ]
    for spec in specs:
        scheduler.add(spec)
    prompts = scheduler.schedule()
    assert prompts is not None
    heard.observe(prompts, (), 2.0)  # alone: it went through both stages
    heard.observe(prompts, (), 2.0)  # behind another: 0.5 s after it
    assert fit.told == [(12, 0, 0, 1.0), (12, 0, 0, 0.5)]
    row = replace(prompts, rows=(prompts.rows[0]._replace(start=4, token_ids=[7]),))
    rows = replace(prompts, rows=tuple(one._replace(start=5, token_ids=[7]) for one in prompts.rows[1:]))
    heard.observe(row, (rows,), 0.8)
    assert fit.told[2] == (0, 3, 5 + 6 + 6, 0.8)
