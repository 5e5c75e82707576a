"""The processes that simulate: started afresh, bounded in number, gone when the search is, whatever ends it."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from ..parent import die_with_parent
from .goodput import Precision, find_goodput
from .result import Candidate, Pool
from .setting import Setting
from .trial import Trial, run_candidate, run_phase

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Goodput of one candidate, or of one pool as a phase alone, under one seed."""

    what: Candidate | Pool
    seed: int
    start: float
    """A rate near which it is expected."""
    slope: float
    """About what of the attainment a doubled rate would cost there."""
    precision: Precision
    spare_nodes: int = 0
    """Beside those that there are: for what one worker more would bring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    search: Search
    goodput: float
    trials: tuple[Trial, ...]
    complete: bool = True
    """False: time ran out."""

    @property
    def requests(self) -> int:
        """That were simulated."""
        return sum(trial.requests for trial in self.trials)

    @property
    def cpu_s(self) -> float:
        """Processor seconds."""
        return sum(trial.cpu_s for trial in self.trials)


def carry_out(setting: Setting, search: Search, deadline_s: float) -> Found:
    """Searches, in this process, no longer than until the monotonic clock's `deadline_s` and one run more."""
    what = search.what
    if search.spare_nodes:
        setting = replace(setting, nodes=setting.nodes + search.spare_nodes)
    cells = what.cells if isinstance(what, Candidate) else 1
    requests = setting.run_requests(search.start / cells)
    late = False

    def run(rate: float) -> Trial:
        if isinstance(what, Pool):
            return run_phase(setting, what, rate, search.seed, requests)
        return run_candidate(setting, what, rate, search.seed, requests)

    def go_on() -> bool:
        nonlocal late
        late = time.monotonic() > deadline_s
        return not late

    goodput, trials = find_goodput(
        run,
        start=search.start,
        target=setting.target,
        slope=search.slope,
        precision=search.precision,
        go_on=go_on,
    )
    return Found(search=search, goodput=goodput, trials=tuple(trials), complete=not late)


_setting: Setting | None = None
"""Of this process, where it is one of a crew."""


def _begin(setting: Setting) -> None:
    global _setting
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who began this process ends it
    die_with_parent()
    _setting = setting


def _carry_out(search: Search, deadline_s: float) -> Found:
    assert _setting is not None
    return carry_out(_setting, search, deadline_s)


def _call(function: Callable[[Setting, Item], Answer], item: Item) -> Answer:
    assert _setting is not None
    return function(_setting, item)


def _ready() -> None:
    """Nothing: a process that does it has started."""


class Crew:
    """A context manager: outside of it no process is left. With one process everything runs in this one."""

    def __init__(self, setting: Setting, processes: int, deadline_s: float) -> None:
        """`deadline_s`: on the monotonic clock."""
        self._setting = setting
        self._processes = processes
        self._deadline_s = deadline_s
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        if self._processes > 1:
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self._setting,),
            )
            for _ in range(self._processes):  # they start while this one still thinks
                self._pool.submit(_ready)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        children = multiprocessing.active_children() if error is not None else []
        pool.shutdown(wait=error is None, cancel_futures=True)
        for child in children:
            child.terminate()
        for child in children:
            child.join()

    @property
    def apart(self) -> bool:
        """Whether simulations run in other processes than this one."""
        return self._pool is not None

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._deadline_s

    def each(self, function: Callable[[Setting, Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
        """`function`, one that a module names, of every item; answers in their order, as they come. None is begun once
        the time is up: there are fewer answers then.
        """
        if self._pool is None:
            for item in items:
                if self.late:
                    return
                yield function(self._setting, item)
            return
        waiting: deque[Future[Answer]] = deque()
        for item in items:
            if self.late:
                break
            waiting.append(self._pool.submit(_call, function, item))
            if len(waiting) > 2 * self._processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def run(self, searches: Sequence[Search], on_found: Callable[[Found], None]) -> list[Found]:
        """Carries out all, in any order; answers in theirs. `on_found` hears of each as it comes."""
        if self._pool is None:
            found = []
            for search in searches:
                found.append(carry_out(self._setting, search, self._deadline_s))
                on_found(found[-1])
            return found
        futures: list[Future[Found]] = [self._pool.submit(_carry_out, one, self._deadline_s) for one in searches]
        results = []
        for future in futures:
            results.append(future.result())
            on_found(results[-1])
        return results
