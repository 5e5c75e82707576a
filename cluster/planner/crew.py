"""The processes that simulate and estimate: copies of this one, bounded in number, gone when the search is, whatever
ends it.

A process of the crew is told a task at a time, through a pipe, and has nothing else: no queue, no lock, no semaphore
that somebody would have to clean up. It dies with this process. What a task comes to follows from the task alone, so
that it does not matter who does it, or when.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ..parent import die_with_parent
from .goodput import Precision, find_goodput
from .outlook import Outlook
from .result import Candidate
from .setting import Setting
from .shape import Shape
from .trial import OutOfTime, Saw, Trial, run_candidate

TICK_S = 0.1
"""How often a waiting search looks whether it is to end."""
DEATH_S = 5.0
"""For a process whose pipe has ended to be gone."""


@dataclass(frozen=True, slots=True)
class Means:
    """What a process works with."""

    outlook: Outlook
    late: Callable[[], bool]
    """Whether a task that is under way should give up."""

    @property
    def setting(self) -> Setting:
        """What is planned."""
        return self.outlook.setting


Answer = TypeVar("Answer")
Given = TypeVar("Given", covariant=True)


class Task(Protocol[Given]):
    """Plain data that says what to do."""

    def do(self, means: Means) -> Given:
        """Its answer, a function of the task and the setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A `Task`: goodput of one candidate under one seed, simulated."""

    what: Candidate
    seed: int
    near: float
    """A rate near which its estimate is expected."""
    shape: Shape | None = None
    """Of its estimate under that seed; None: still to be worked out."""
    start: float = 0.0
    """Where the search begins, and what requests saw there is told; 0: where the estimate says."""
    scale: float = 1.0
    """Goodput over estimate, as seen under another seed: the search begins at the estimate times that."""
    precision: Precision
    spare_nodes: int = 0
    """Beside those that there are: for what one worker more would bring."""
    lasts: bool = False
    """Whether its runs are long enough to be reported, not only to be compared."""

    def do(self, means: Means) -> Found:
        """Searches, until it is late."""
        outlook, setting, what = means.outlook, means.setting, self.what
        if self.spare_nodes:
            setting = replace(setting, nodes=setting.nodes + self.spare_nodes)
        shape, target = self.shape or outlook.shape(what, self.seed, self.near), setting.target
        start = self.start or self.scale * min(shape.where(target), outlook.bound(what)) or outlook.bound(what) / 2
        count = setting.lasting_requests if self.lasts else setting.run_requests
        requests = count(start / what.cells)
        trials: list[Trial] = []

        def run(rate: float) -> Trial:
            telling = rate == self.start
            trials.append(run_candidate(setting, what, rate, self.seed, requests, means.late, telling=telling))
            return trials[-1]

        def lead(rate: float, score: float) -> float:
            return shape.where(target - score + shape.at(rate))  # as far above or below the estimate everywhere

        try:
            goodput, _ = find_goodput(
                run, start=start, target=target, lead=lead, precision=self.precision, ceiling=outlook.bound(what)
            )
        except OutOfTime:
            kept = [trial.rate for trial in trials if trial.score >= setting.target]
            return Found(search=self, goodput=max(kept, default=0.0), trials=tuple(trials), complete=False)
        return Found(search=self, goodput=goodput, trials=tuple(trials))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    search: Search
    goodput: float
    trials: tuple[Trial, ...]
    complete: bool = True
    """False: time ran out. `goodput` is then the highest rate that was kept, 0 where none was yet."""

    @property
    def requests(self) -> int:
        """That were simulated."""
        return sum(trial.requests for trial in self.trials)

    @property
    def cpu_s(self) -> float:
        """Processor seconds."""
        return sum(trial.cpu_s for trial in self.trials)

    @property
    def saw(self) -> tuple[Saw, ...]:
        """Of each request at the rate where the search was told to begin; none where that overloads by far."""
        return next((trial.saw for trial in self.trials if trial.saw), ())


@dataclass(frozen=True, slots=True)
class _Done:
    """What a process says of a task."""

    answer: object
    error: Exception | None
    cpu_s: float


def _serve(pipe: Connection, outlook: Outlook, deadline_s: float) -> None:
    """The life of a process of the crew."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who began this process ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    means = Means(outlook, lambda: time.monotonic() > deadline_s)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        begun_s = time.process_time()
        try:
            done = _Done(task.do(means), None, time.process_time() - begun_s)
        except Exception as error:  # raised again by who gave the task
            done = _Done(None, error, time.process_time() - begun_s)
        pipe.send(done)


class Crew:
    """A context manager: outside of it no process is left. With one process everything is done in this one; several
    begin with the first task, as copies of this one that know what it has worked out by then.
    """

    def __init__(
        self, setting: Setting, processes: int, deadline_s: float, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """`deadline_s`: on the monotonic clock; `stopped`: whether somebody wants it to end before."""
        self._processes = processes
        self._deadline_s = deadline_s
        self._stopped = stopped
        self._members: dict[Connection, BaseProcess] = {}
        self.outlook = Outlook(setting)
        self._means = Means(self.outlook, lambda: self.late)
        self.cpu_s = 0.0
        """Processor seconds of the other processes, for tasks."""

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _begin(self) -> None:
        context = multiprocessing.get_context(
            "fork"
        )  # nothing to import again; it takes no lock that a thread may hold
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.outlook, self._deadline_s), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the threads that draw progress
            process.start()
        theirs.close()
        self._members[ours] = process

    def _end(self) -> None:
        """They hold nothing, so nothing is waited for; a pipe's end they would not see, because forks of each other
        hold it too.
        """
        members, self._members = self._members, {}
        for pipe, process in members.items():
            process.kill()
            pipe.close()
        for process in members.values():
            process.join()
            process.close()

    @property
    def late(self) -> bool:
        """Whether the time is up, or somebody wants it to end."""
        return self._stopped() or time.monotonic() > self._deadline_s

    def do(
        self, tasks: Sequence[Task[Answer]], on_answer: Callable[[int, Answer], None] = lambda place, answer: None
    ) -> list[Answer | None]:
        """Does all, in any order, and answers in theirs; None where it was late. `on_answer` hears of each answer as
        it comes, with its place. What a task raises is raised here.
        """
        answers: list[Answer | None] = [None] * len(tasks)
        if self._processes <= 1:
            for place, task in enumerate(tasks):
                if self.late:
                    break
                answers[place] = answer = task.do(self._means)
                on_answer(place, answer)
            return answers
        if tasks and not self.late:
            for _ in range(self._processes - len(self._members)):
                self._begin()
        waiting, busy = deque(range(len(tasks))), dict[Connection, int]()
        while busy or (waiting and self._members and not self.late):
            for pipe in self._members:
                if waiting and pipe not in busy and not self.late:
                    busy[pipe] = waiting.popleft()
                    pipe.send(tasks[busy[pipe]])
            ready = wait(list(busy), TICK_S)
            for pipe in [pipe for pipe in busy if pipe in ready]:
                place = busy.pop(pipe)
                found: Answer = self._hear(pipe)
                answers[place] = found
                on_answer(place, found)
            if self._stopped():
                self._end()
                break
        return answers

    def _hear(self, pipe: Connection) -> Any:
        """What a process says, or raises what its task did."""
        try:
            done: _Done = pipe.recv()
        except EOFError:
            process = self._members[pipe]
            process.join(DEATH_S)
            raise RuntimeError(f"a process that simulated ended with exit code {process.exitcode}") from None
        self.cpu_s += done.cpu_s
        if done.error is not None:
            raise done.error
        return done.answer
