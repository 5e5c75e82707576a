"""When the manager restarts a member, and what it says: fake handles, a clock that the test sets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tandem.cluster.launch import manager as module
from tandem.cluster.launch.manager import LONGEST_PAUSE_S, SILENT_S, UNANSWERED_S, UNHEALTHY_S, Manager
from tandem.cluster.launch.state import MemberState, MemberView, Phase


class Handle:
    """A member as `MemberHandle` shows it; `restart` only counts."""

    def __init__(self) -> None:
        self.name, self.role = "decode-0", "decode"
        self.state = MemberState(phase=Phase.READY, stage="ready", healthy=True, pid=1, epoch=10)
        self.restarts = 0
        self.unanswered_s = 0.0
        self.ended = 0

    @property
    def view(self) -> MemberView:
        return MemberView(name=self.name, role=self.role, state=self.state, restarts=self.restarts)

    def restart(self) -> None:
        self.ended += 1


class Watched:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.handle = Handle()
        self.said: list[str] = []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)
        self.manager = Manager([self.handle], self.said.append)  # type: ignore[list-item]

    def look(self, *, after_s: float = 0.5, **changes: Any) -> list[str]:
        """What is said at the next look, the state having changed meanwhile."""
        self.now_s += after_s
        self.handle.state = self.handle.state.change(**changes)
        self.said.clear()
        self.manager._look(self.handle, self.manager._watches[0])  # type: ignore[arg-type]
        return list(self.said)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_a_member_that_died_is_left_to_ray_and_announced_when_it_is_back(watched: Watched) -> None:
    assert watched.look() == []
    assert watched.look(phase=Phase.LOST, healthy=False) == ["decode-0 died; Ray is restarting it"]
    assert watched.look(phase=Phase.LOST) == []
    watched.handle.restarts = 1
    assert watched.look(phase=Phase.STARTING) == []
    said = watched.look(after_s=2.0, phase=Phase.READY, healthy=True, pid=2, epoch=11)
    assert said == ["decode-0 is back after 3.0 s (pid 2, epoch b)"]
    assert watched.handle.ended == 0


def test_a_worker_of_several_ranks_is_back_with_all_of_them(watched: Watched) -> None:
    watched.look(phase=Phase.LOST, healthy=False)
    said = watched.look(phase=Phase.READY, healthy=True, pid=2, rank_pids=(3, 4), epoch=11)
    assert said == ["decode-0 is back after 0.5 s (pid 2, of its other ranks 3, 4, epoch b)"]


def test_a_death_between_two_looks_is_announced_too(watched: Watched) -> None:
    watched.handle.restarts = 1
    assert watched.look(pid=2) == ["decode-0 died and was restarted"]


def test_what_a_member_says_of_its_end_is_reported(watched: Watched) -> None:
    why = "rank 1 (pid 7 on 10.0.0.2): the other end of the link is closed"
    assert watched.look(error=why, healthy=False) == []
    assert watched.look(phase=Phase.LOST) == [f"decode-0 died ({why}); Ray is restarting it"]
    assert watched.look(phase=Phase.READY, error=None, healthy=True)[0].startswith("decode-0 is back")
    watched.look(error=why, healthy=False)
    watched.handle.restarts = 1
    assert watched.look(error=None, healthy=True) == [f"decode-0 died ({why}) and was restarted"]


def test_one_that_was_asked_to_restart_did_not_die(watched: Watched) -> None:
    assert watched.look(phase=Phase.LEAVING) == [
        "decode-0 was asked to restart: it finishes what it runs, and Ray starts it anew"
    ]
    assert watched.look(phase=Phase.LEAVING) == []
    assert watched.look(phase=Phase.LOST, healthy=False) == []
    watched.handle.restarts = 1
    assert watched.look(phase=Phase.STARTING) == []
    said = watched.look(after_s=2.0, phase=Phase.READY, healthy=True, pid=2, epoch=11)
    assert said == ["decode-0 is back after 3.5 s (pid 2, epoch b)"]
    assert watched.handle.ended == 0


def test_one_that_lives_but_does_not_serve_is_restarted(watched: Watched) -> None:
    assert watched.look(healthy=False) == []
    assert watched.look(after_s=UNHEALTHY_S - 1) == []
    assert watched.look(after_s=2.0) == [f"decode-0 has been unhealthy for {UNHEALTHY_S:.0f} s; restarting it"]
    assert watched.handle.ended == 1


def test_a_short_illness_is_none(watched: Watched) -> None:
    watched.look(healthy=False)
    watched.look(after_s=UNHEALTHY_S - 1, healthy=True)
    assert watched.look(after_s=UNHEALTHY_S, healthy=False) == []
    assert watched.handle.ended == 0


def test_silence_is_said_once_and_so_is_its_end(watched: Watched) -> None:
    watched.handle.unanswered_s = SILENT_S
    assert watched.look() == []
    watched.handle.unanswered_s = SILENT_S + 0.5
    assert watched.look() == [
        "decode-0 does not answer (stopped or hung?); it is restarted after 60 s of silence",
    ]
    watched.handle.unanswered_s = 20.0
    assert watched.look(after_s=14.5) == []
    watched.handle.unanswered_s = 0.0
    assert watched.look() == ["decode-0 answers again after 20.5 s"]
    assert watched.look() == []
    assert watched.handle.ended == 0


def test_one_that_dies_in_its_silence_does_not_answer_again(watched: Watched) -> None:
    watched.handle.unanswered_s = SILENT_S + 1
    watched.look()
    watched.handle.unanswered_s = 0.0
    assert watched.look(phase=Phase.LOST, healthy=False) == ["decode-0 died; Ray is restarting it"]
    watched.handle.restarts = 1
    said = watched.look(phase=Phase.READY, healthy=True, pid=2, epoch=11)
    assert said == ["decode-0 is back after 0.5 s (pid 2, epoch b)"]


def test_what_a_member_warns_of_is_said_when_it_changes(watched: Watched) -> None:
    assert watched.look(warning="the file holds no key") == ["decode-0: the file holds no key"]
    assert watched.look() == []
    assert watched.look(warning="the file is gone") == ["decode-0: the file is gone"]
    assert watched.look(warning="") == ["decode-0: mended: the file is gone"]


def test_one_that_does_not_answer_is_restarted(watched: Watched) -> None:
    watched.handle.unanswered_s = SILENT_S + 1
    watched.look()
    watched.handle.unanswered_s = UNANSWERED_S
    assert watched.look() == []
    watched.handle.unanswered_s = UNANSWERED_S + 1
    assert watched.look() == [f"decode-0 has not answered for {UNANSWERED_S:.0f} s; restarting it"]


def test_what_restarting_does_not_help_is_tried_less_and_less_often(watched: Watched) -> None:
    times = []
    for _ in range(200):
        before = watched.handle.ended
        watched.look(after_s=1.0, phase=Phase.FAILED, error="no memory", healthy=False)
        if watched.handle.ended > before:
            assert watched.said == ["decode-0 could not start (no memory); restarting it"]
            times.append(watched.now_s)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.0, LONGEST_PAUSE_S)
    watched.look(phase=Phase.READY, healthy=True)
    watched.look(after_s=LONGEST_PAUSE_S, phase=Phase.FAILED)
    assert watched.look(after_s=1.0), "health makes the pauses short again"
