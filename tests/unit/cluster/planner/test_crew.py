"""The processes of a search: any of them may do a task, none is left, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass

import pytest
from plan_cases import mixed, opt
from tandem.cluster.planner.crew import Crew, Means, Search
from tandem.cluster.planner.goodput import Precision
from tandem.cluster.planner.setting import Setting, setting_of


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of(opt(workload__output_tokens=8))


@dataclass(frozen=True)
class Double:
    number: int

    def do(self, means: Means) -> int:
        return 2 * self.number


@dataclass(frozen=True)
class Fail:
    def do(self, means: Means) -> int:
        raise ValueError("rate: 0 is not allowed")


@dataclass(frozen=True)
class Vanish:
    def do(self, means: Means) -> int:
        os._exit(7)


@pytest.mark.parametrize("processes", [1, 3])
def test_answers_come_in_the_order_of_their_tasks(setting: Setting, processes: int) -> None:
    heard: dict[int, int] = {}
    with Crew(setting, processes, time.monotonic() + 60.0) as crew:
        assert crew.do([Double(number) for number in range(9)], heard.__setitem__) == list(range(0, 18, 2))
        assert crew.do([]) == []
        assert len(multiprocessing.active_children()) == (processes if processes > 1 else 0)
    assert heard == {number: 2 * number for number in range(9)}
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_task_raises_is_raised_here(setting: Setting, processes: int) -> None:
    with pytest.raises(ValueError, match="rate: 0"), Crew(setting, processes, time.monotonic() + 60.0) as crew:
        crew.do([Double(1), Fail()])
    assert multiprocessing.active_children() == []


def test_a_process_that_is_gone_is_told_of(setting: Setting) -> None:
    with pytest.raises(RuntimeError, match="exit code 7"), Crew(setting, 2, time.monotonic() + 60.0) as crew:
        crew.do([Vanish(), Double(1)])
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_is_begun_when_it_is_late(setting: Setting, processes: int) -> None:
    with Crew(setting, processes, time.monotonic() - 1.0) as crew:
        assert crew.do([Double(1), Double(2)]) == [None, None]
    with Crew(setting, processes, time.monotonic() + 60.0, lambda: True) as crew:
        assert crew.do([Double(1)]) == [None]


def test_a_run_is_cut_when_it_gets_late(setting: Setting) -> None:
    search = Search(what=mixed(), seed=0, near=20.0, precision=Precision(width=1.1, most=6))
    calls = iter([False] * 3)
    with Crew(setting, 1, time.monotonic() + 60.0) as crew:
        found = search.do(Means(crew._means.outlook, lambda: next(calls, True)))
    assert not found.complete
    assert (found.trials, found.goodput) == ((), 0.0)
