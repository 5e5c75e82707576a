"""A process that is signaled, and never another one of its number."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tandem.cluster.launch.local_process import LocalProcess

WAIT_S = 20.0


class Started:
    """A process that waits for the end of its link."""

    def __init__(self) -> None:
        self.link, theirs = socket.socketpair()
        program = f"import socket; socket.socket(fileno={theirs.fileno()}).recv(1)"
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-S", "-c", program], pass_fds=(theirs.fileno(),))
        self.pid = self.process.pid

    def end(self) -> None:
        """Its number is free."""
        self.process.kill()
        self.process.wait(WAIT_S)


@pytest.fixture
def started() -> Iterator[Started]:
    one = Started()
    yield one
    one.end()
    one.link.close()


@pytest.fixture(params=["handles", "numbers"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Handles, or what is done where the system has none."""
    if request.param == "numbers":
        monkeypatch.delattr(os, "pidfd_open")
    return str(request.param)


def test_a_process_is_ended(by: str, started: Started) -> None:
    held = LocalProcess(started.pid, started.link)
    assert not held.wait(0.0)
    held.kill()
    assert held.wait(WAIT_S), "a zombie has ended"
    assert started.process.wait(WAIT_S) == -signal.SIGKILL
    held.kill()
    assert held.wait(0.0)


def test_nobody_is_signaled_once_it_has_ended(by: str, started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its number may be another process's by then."""
    held = LocalProcess(started.pid, started.link)
    started.end()
    if by == "numbers":
        assert held.wait(WAIT_S)  # whose number is free is known only so
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a process was signaled by its number"))
    held.kill()
    assert held.wait(0.0)


def test_who_has_a_number_but_not_the_link_is_not_signaled(started: Started) -> None:
    """The process ended, and its number went to another one, before it could be held."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        held = LocalProcess(started.pid, ours)
    held.kill()
    assert held.wait(0.0)
    assert started.process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        started.process.wait(0.2)


def test_a_number_that_is_nobodys_is_no_process(started: Started) -> None:
    started.end()
    held = LocalProcess(started.pid, started.link)
    held.kill()
    assert held.wait(0.0)


def test_its_handle_is_closed_with_it(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = os.pidfd_open

    def open_one(pid: int) -> int:
        opened.append(real(pid))
        return opened[-1]

    monkeypatch.setattr(os, "pidfd_open", open_one)
    held = LocalProcess(started.pid, started.link)
    os.fstat(opened[0])
    del held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
