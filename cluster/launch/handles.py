"""The driver's end of a member's actor: asks for its state without ever waiting for one member only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .state import MemberState, MemberView, Phase


class MemberHandle:
    """One member's actor. At most one question is on its way at any time. Used by one thread at a time."""

    def __init__(self, name: str, role: str, actor: Any) -> None:
        self.name = name
        self.role = role
        self.state = MemberState(phase=Phase.STARTING, stage="placing")
        self.restarts = 0
        self._actor = actor
        self._question: Any = None
        self._asked_s = 0.0
        self._last_pid = 0

    @property
    def view(self) -> MemberView:
        """What is known now."""
        return MemberView(name=self.name, role=self.role, state=self.state, restarts=self.restarts)

    @property
    def unanswered_s(self) -> float:
        """How long the question on its way has waited; 0 where there is none."""
        return 0.0 if self._question is None else time.monotonic() - self._asked_s

    def ask(self) -> Any:
        """Sends the question for the state unless one is on its way; returns its reference."""
        if self._question is None:
            self._question = self._actor.state.remote()
            self._asked_s = time.monotonic()
        return self._question

    def hear(self) -> None:
        """Takes the answer if it is there. A member whose process is gone becomes LOST; a new process is a restart."""
        import ray

        if self._question is None or not ray.wait([self._question], timeout=0)[0]:
            return
        question, self._question = self._question, None
        try:
            state: MemberState = ray.get(question)
        except ray.exceptions.RayActorError:
            self.state = self.state.change(phase=Phase.LOST, stage="lost", healthy=False)
            return
        if self._last_pid and state.pid != self._last_pid:
            self.restarts += 1
        self._last_pid = state.pid
        self.state = state

    def begin(self, method: str, *args: Any) -> Any:
        """Starts `drain` or `stop` on the member; returns the reference to wait for."""
        return getattr(self._actor, method).remote(*args)

    def restart(self) -> None:
        """Ends the process; Ray makes a new one, with a new epoch."""
        import ray

        self._question = None
        ray.kill(self._actor, no_restart=False)

    def kill(self) -> None:
        """Ends the process for good."""
        import ray

        try:
            ray.kill(self._actor, no_restart=True)
        except (ray.exceptions.RayError, ValueError):  # already gone, or placed nowhere
            return


def poll(handles: Sequence[MemberHandle], timeout_s: float) -> None:
    """Asks every member for its state at the same time and waits for the answers, at most `timeout_s`."""
    import ray

    questions = [handle.ask() for handle in handles]
    ray.wait(questions, num_returns=len(questions), timeout=timeout_s)
    for handle in handles:
        handle.hear()


def answer(reference: Any) -> Any:
    """What a call made with `begin` that has ended returned; None where it was lost with its member, or with Ray."""
    import ray

    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.RayError:
        return None


def finished(references: Sequence[Any], timeout_s: float) -> bool:
    """Waits for calls made with `begin`; True when all have ended, well or not."""
    if not references:
        return True
    import ray

    try:
        ready, _ = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        return False
    return len(ready) == len(references)
