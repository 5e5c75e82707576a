"""Watches the members of a running cluster: says when one died and is back, restarts one that has stopped answering.

Ray restarts a process that ended. What Ray cannot see is a process that lives and does not serve: one whose start
failed after a restart, that reports itself unhealthy, or that no longer answers. Those the manager ends, so that Ray
replaces them; with growing pauses where it does not help.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .handles import MemberHandle, poll
from .state import MemberView, Phase

INTERVAL_S = 0.5
UNHEALTHY_S = 10.0
SILENT_S = 5.0
"""After so long without an answer it is said once, for people; nothing is done yet."""
UNANSWERED_S = 60.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


@dataclass(slots=True)
class _Watch:
    """What the manager remembers about one member."""

    phase: Phase = Phase.READY
    restarts: int = 0
    lost_s: float = 0.0
    silent_since_s: float | None = None
    """Since when one that was said not to answer has not; None: it answers."""
    unhealthy_since_s: float | None = None
    error: str | None = None
    """What it said of its end while it still served."""
    warning: str = ""
    pause_s: float = FIRST_PAUSE_S
    next_restart_s: float = 0.0


class Manager:
    """A thread over the members' handles. `report` gets one line for people about every change; it may not block."""

    def __init__(self, handles: Sequence[MemberHandle], report: Callable[[str], None]) -> None:
        self._handles = handles
        self._report = report
        self._watches = [_Watch(restarts=handle.restarts) for handle in handles]
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._views = tuple(handle.view for handle in handles)
        self._thread = threading.Thread(target=self._run, name="cluster-manager", daemon=True)

    def start(self) -> None:
        """Starts watching."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends watching and returns when the thread no longer uses the handles, or after `timeout_s`. Idempotent."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def views(self) -> tuple[MemberView, ...]:
        """The members as last heard of."""
        with self._lock:
            return self._views

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            poll(self._handles, INTERVAL_S)
            for handle, watch in zip(self._handles, self._watches, strict=True):
                self._look(handle, watch)
            with self._lock:
                self._views = tuple(handle.view for handle in self._handles)

    def _look(self, handle: MemberHandle, watch: _Watch) -> None:
        now_s = time.monotonic()
        state = handle.state
        self._say_if_silent(handle, watch, now_s)
        if state.phase is Phase.LEAVING and watch.phase is not Phase.LEAVING:
            self._report(f"{handle.name} was asked to restart: it finishes what it runs, and Ray starts it anew")
            watch.lost_s = now_s
        if state.phase is Phase.LOST and watch.phase not in (Phase.LOST, Phase.LEAVING):
            self._report(f"{handle.name} died{_why(watch.error)}; Ray is restarting it")
            watch.lost_s, watch.error = now_s, None
        if handle.restarts > watch.restarts and watch.phase is Phase.READY:
            self._report(f"{handle.name} died{_why(watch.error)} and was restarted")  # faster than we asked
            watch.lost_s = now_s
        if state.phase is Phase.READY:
            watch.error = state.error
        watch.restarts = handle.restarts
        if state.phase is Phase.READY and watch.phase is not Phase.READY:
            ranks = f", of its other ranks {', '.join(map(str, state.rank_pids))}" if state.rank_pids else ""
            epoch = f", epoch {state.epoch:x}" if state.epoch else ""
            self._report(f"{handle.name} is back after {now_s - watch.lost_s:.1f} s (pid {state.pid}{ranks}{epoch})")
        if state.phase is Phase.READY and state.warning != watch.warning:
            self._report(f"{handle.name}: {state.warning or f'mended: {watch.warning}'}")
            watch.warning = state.warning
        watch.phase = state.phase
        self._restart_if_stuck(handle, watch, now_s)

    def _say_if_silent(self, handle: MemberHandle, watch: _Watch, now_s: float) -> None:
        """A process that is stopped or hangs is neither dead nor unhealthy: nobody else says anything about it."""
        if handle.state.phase is Phase.LOST or handle.restarts > watch.restarts:
            watch.silent_since_s = None  # that is reported in other words
        elif watch.silent_since_s is None and handle.unanswered_s > SILENT_S:
            watch.silent_since_s = now_s - handle.unanswered_s
            restarted = f"it is restarted after {UNANSWERED_S:.0f} s of silence"
            self._report(f"{handle.name} does not answer (stopped or hung?); {restarted}")
        elif watch.silent_since_s is not None and not handle.unanswered_s:
            self._report(f"{handle.name} answers again after {now_s - watch.silent_since_s:.1f} s")
            watch.silent_since_s = None

    def _restart_if_stuck(self, handle: MemberHandle, watch: _Watch, now_s: float) -> None:
        state = handle.state
        if state.phase is Phase.READY and not state.healthy:
            watch.unhealthy_since_s = watch.unhealthy_since_s or now_s
        else:
            watch.unhealthy_since_s = None
        why = None
        if state.phase is Phase.FAILED:
            why = f"could not start ({state.error})"
        elif watch.unhealthy_since_s is not None and now_s - watch.unhealthy_since_s > UNHEALTHY_S:
            why = f"has been unhealthy for {UNHEALTHY_S:.0f} s"
        elif handle.unanswered_s > UNANSWERED_S and state.phase is not Phase.LOST:
            why = f"has not answered for {UNANSWERED_S:.0f} s"
        if why is None:
            if state.phase is Phase.READY:
                watch.pause_s = FIRST_PAUSE_S
            return
        if now_s < watch.next_restart_s:
            return
        self._report(f"{handle.name} {why}; restarting it")
        watch.next_restart_s = now_s + watch.pause_s
        watch.pause_s = min(2 * watch.pause_s, LONGEST_PAUSE_S)
        watch.unhealthy_since_s = None
        watch.lost_s = now_s
        handle.restart()


def _why(error: str | None) -> str:
    return f" ({error})" if error else ""
