"""A process of this machine that is no child of this one, held so that a signal never reaches another one that has been
given its number since (`pidfd_open(2)`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
import weakref
from pathlib import Path

_POLL_S = 0.02


class LocalProcess:
    """The process at the other end of a Unix socket. Any thread."""

    def __init__(self, pid: int, link: socket.socket) -> None:
        """`link`: ends with the process, which alone has its other end and says nothing yet."""
        self._pid = pid
        self._gone = False
        self._handle: int | None = None
        """None where the system has no such handles, or gives none out: the number must do."""
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone = True
            return
        except (AttributeError, OSError):
            return
        weakref.finalize(self, os.close, self._handle)
        # It had its number when the handle was opened if it lives still.
        self._gone = _has_hung_up(link)

    def kill(self) -> None:
        """At once; idempotent, does not wait."""
        if self._gone:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._handle is None:
                os.kill(self._pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end; False where it lives still."""
        deadline_s = time.monotonic() + timeout_s
        while not self._has_ended():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def _has_ended(self) -> bool:
        if not self._gone:
            self._gone = not _lives(self._pid) if self._handle is None else _is_over(self._handle)
        return self._gone


def _is_over(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


def _lives(pid: int) -> bool:
    """Whether there is a process of that number that is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def _has_hung_up(link: socket.socket) -> bool:
    try:
        return not link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
