"""The one thread that touches an engine: scheduler, block pool, prefix cache and device belong to it alone.

1. Others hand it commands (`submit`), plain functions of the scheduler; they run between two launches.
2. `schedule()` makes a plan and the device launches it. As long as fewer than `Device.plans_ahead` are under way, that
   is all, and the next one follows: what comes below then overlaps with what the device computes.
3. The oldest plan's output is collected, `complete()` takes it, and the scheduler's events of that step go out in one
   batch (`on_events`), so that a step costs one wake-up of the loop.
4. With nothing under way and nothing to compute it proves the block ledger (`check_integrity`) once and sleeps until
   the next command.

A new plan is made as soon as the device takes one, also while it is busy with earlier ones and a command comes: the
rule of virtual time (`sim.engine`), where a plan may begin when the first stage of a pipeline is free.

A failure of the device or of an invariant ends the thread and is reported once (`on_failure`): the process must go, and
whatever it promised is void. What concerns one sequence alone comes back in `RowOutput.error` and ends only that one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..engine.devices.base import Device
from ..engine.plan import StepPlan
from ..engine.scheduler import Scheduler
from ..engine.scheduler_events import SchedulerEvent
from ..latency.linear import OnlineStepTimeFit
from ..types import EngineLoad, StepTimeCoefficients
from .heard_steps import HeardSteps

R = TypeVar("R")
logger = logging.getLogger(__name__)

IDLE_CHECK_AFTER_S = 0.5


class EngineStopped(RuntimeError):
    """The engine has stopped or failed; commands have no effect any more."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for other threads, replaced whole after every step."""

    load: EngineLoad
    step_time: StepTimeCoefficients
    learned_steps: int = 0
    """Steps that `step_time` stands for; 0: it is a guess."""
    steps_total: int = 0
    computed_tokens_total: int = 0
    late_steps_total: int = 0
    """`Device.late_steps_total`."""
    proven_s: float = field(default_factory=time.monotonic)
    """When the block ledger was last proven; before the first time, when the engine was made."""

    @property
    def integrity_age_s(self) -> float:
        """Seconds since the last proof of the block ledger."""
        return time.monotonic() - self.proven_s


class EngineThread:
    """Runs one scheduler on one device. `submit` may be called from any thread; the callbacks run on the engine
    thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        *,
        on_events: Callable[[Sequence[SchedulerEvent]], None],
        on_failure: Callable[[BaseException], None],
        fit: OnlineStepTimeFit | None = None,
    ) -> None:
        """`fit`: what is known of the device's steps already; None: nothing is."""
        self._scheduler = scheduler
        self._device = device
        self._on_events = on_events
        self._on_failure = on_failure
        self._commands: deque[tuple[Callable[[Scheduler], Any], Future[Any]]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._ended = threading.Event()
        """Set before commands are refused for the last time."""
        self._failure: BaseException | None = None
        self._fit = fit or OnlineStepTimeFit()
        self.status = EngineStatus(
            load=scheduler.load(), step_time=self._fit.coefficients(), learned_steps=self._fit.steps
        )
        self._launched: deque[StepPlan] = deque()
        self._heard = HeardSteps(self._fit, 1 if device.looks_ahead else device.plans_ahead)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """False before `start`, after `stop` and after a failure."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Once."""
        self._thread.start()

    def submit(self, command: Callable[[Scheduler], R]) -> Future[R]:
        """Runs `command(scheduler)` between two launches; the future has its result or its exception. Never blocks.

        `EngineStopped` if it has.
        """
        future: Future[R] = Future()
        if self._stopping or self._failure is not None:
            future.set_exception(EngineStopped("the engine has stopped"))
            return future
        self._commands.append((command, future))
        self._wake.set()
        if self._ended.is_set():  # between the look above and the append: nobody else would answer it
            self._refuse_commands()
        return future

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after the steps that are under way; idempotent. Waits at most `timeout_s`."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._end()

    def _run(self) -> None:
        try:
            while not self._stopping:
                while self._launched and self._device.done():
                    self._collect()
                self._run_commands()
                plan = self._scheduler.schedule() if len(self._launched) < self._device.plans_ahead else None
                # Grants must not wait for the step: a decode worker may pull while it runs.
                self._publish()
                if plan is not None:
                    self._device.launch(plan)
                    self._launched.append(plan)
                    if len(self._launched) >= self._device.plans_ahead:
                        self._collect()
                elif self._launched:
                    if self._device.wait(self._wake):
                        self._collect()
                    else:
                        self._wake.clear()
                elif not self._commands:
                    self._idle()
            while self._launched:  # nothing is left under way when the device is closed
                self._collect()
        except BaseException as error:
            logger.exception("the engine failed")
            self._failure = error
            self._on_failure(error)
        finally:
            self._end()

    def _collect(self) -> None:
        output = self._device.collect()
        plan = self._launched.popleft()
        self._scheduler.complete(output)
        self._publish()
        self._heard.observe(plan, self._launched, output.duration_s)  # after its tokens have left
        self.status = replace(
            self.status,
            step_time=self._fit.coefficients(),
            learned_steps=self._fit.steps,
            steps_total=self.status.steps_total + 1,
            computed_tokens_total=self.status.computed_tokens_total + plan.num_tokens,
            late_steps_total=self._device.late_steps_total,
        )

    def _publish(self) -> None:
        events = self._scheduler.take_events()
        self.status = replace(self.status, load=self._scheduler.load())
        if events:
            self._on_events(events)

    def _idle(self) -> None:
        # The proof costs time in proportion to the pool: only when there is truly nothing to do.
        if not self._wake.wait(IDLE_CHECK_AFTER_S):
            self._scheduler.check_integrity()
            self.status = replace(self.status, proven_s=time.monotonic())
            self._wake.wait()
        self._wake.clear()

    def _run_commands(self) -> None:
        while self._commands:
            command, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = command(self._scheduler)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _end(self) -> None:
        self._ended.set()
        self._refuse_commands()

    def _refuse_commands(self) -> None:
        """Answers whatever nobody will run; from any thread, several at once."""
        while True:
            try:
                _, future = self._commands.popleft()
            except IndexError:
                return
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineStopped("the engine has stopped"))
