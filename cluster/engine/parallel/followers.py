"""The processes of a worker's other ranks: started, told things, watched, ended. Loads no torch.

A thread listens to all of them. One that has ended, says that it failed, or answers no PING for `PONG_S` takes the
others with it: a step needs all of them, and its KV is gone. Whoever owns the worker hears of it once (`watch`). A rank
that waits for a dead one needs no telling, for the connection between them breaks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .messages import Kind, RankLost, Setup, encode_setup, receive, send

logger = logging.getLogger(__name__)

START_S = 120.0
"""Until a follower's interpreter and its libraries are there."""
LOAD_SILENCE_S = 600.0
"""Loading weights, a follower says how far it is; so long without a word is too long."""
PING_S, PONG_S = 2.0, 10.0
"""How often a follower is asked whether it lives, and how long it may take."""
STOP_S = 5.0
Lost = Callable[[BaseException], None]


@dataclass(slots=True)
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    link: socket.socket
    heard_s: float


class Followers:
    """Ranks 1 … n - 1. `start`, `say`, `close` are the owner's thread's; `watch` may be called from any."""

    def __init__(self, setups: Sequence[Setup], kv_fds: Sequence[int]) -> None:
        """Starts a process for each setup; each is lent the KV memory of its descriptor. OSError if one cannot be
        started.
        """
        self._members: list[_Follower] = []
        self._failure: BaseException | None = None
        self._on_lost: Lost | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="followers", daemon=True)
        try:
            for setup, kv_fd in zip(setups, kv_fds, strict=True):
                self._members.append(_spawn(setup, kv_fd))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes, by rank."""
        return tuple(member.process.pid for member in self._members)

    def gather(self) -> None:
        """Returns when every process runs and knows what it is to be. Raises RankLost."""
        for member in self._members:
            self._await(member, Kind.HERE, START_S, lambda share: None)

    def connect(self) -> None:
        """Tells them to meet the other ranks, and to load then. Raises RankLost."""
        self.say(Kind.CONNECT)

    def ready(self, progress: Callable[[float], None]) -> None:
        """Returns when all have loaded; from now on they are watched. `progress`: the share that is loaded. Raises
        RankLost.
        """
        for member in self._members:
            self._await(member, Kind.READY, LOAD_SILENCE_S, progress)
            member.heard_s = time.monotonic()
        self._watcher.start()

    def say(self, kind: Kind, payload: bytes = b"") -> None:
        """Tells all of them. Raises RankLost, also for one that was lost before."""
        self.check()
        for member in self._members:
            try:
                with self._sending:
                    send(member.link, kind, payload)
            except OSError as error:
                self._lose(self._lost(member, str(error)))
                self.check()

    def check(self) -> None:
        """Raises what was lost."""
        if self._failure is not None:
            raise self._failure

    def watch(self, on_lost: Lost) -> None:
        """`on_lost` is called once, from any thread, when a follower is lost; at once where one was."""
        with self._lock:
            self._on_lost = on_lost
            failure = self._failure
        if failure is not None:
            on_lost(failure)

    def close(self) -> None:
        """Ends the processes and returns when they are gone; idempotent."""
        self._closing = True
        for member in self._members:
            with contextlib.suppress(OSError):
                member.link.shutdown(socket.SHUT_RDWR)  # its end is the follower's, and wakes the watcher
        deadline_s = time.monotonic() + STOP_S
        for member in self._members:
            try:
                member.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join(STOP_S)
        for member in self._members:
            member.link.close()

    def _await(self, member: _Follower, wanted: Kind, silence_s: float, progress: Callable[[float], None]) -> None:
        """The next message but PROGRESS, which must be `wanted`."""
        while True:
            if not _readable([member.link], silence_s):
                raise self._lost(member, f"no word for {silence_s:g} s")
            try:
                kind, payload = receive(member.link)
            except (EOFError, OSError, ValueError) as error:
                raise self._lost(member, str(error)) from None
            if kind is wanted:
                return
            if kind is not Kind.PROGRESS:
                raise self._lost(member, payload.decode(errors="replace") or f"{kind.name} came, not {wanted.name}")
            progress(float(payload))

    def _watch(self) -> None:
        """Until they end."""
        links = {member.link: member for member in self._members}
        asked_s = time.monotonic()
        while not self._closing and self._failure is None:
            try:
                for link in _readable(list(links), PING_S / 4):
                    self._heard(links[link])
                now_s = time.monotonic()
                if now_s - asked_s >= PING_S:
                    asked_s = now_s
                    self._ping(now_s)
            except RankLost as lost:
                self._lose(lost)
            except (OSError, ValueError):
                if not self._closing:
                    raise

    def _heard(self, member: _Follower) -> None:
        try:
            kind, payload = receive(member.link)
        except (EOFError, OSError, ValueError) as error:
            raise self._lost(member, str(error)) from None
        member.heard_s = time.monotonic()
        if kind is not Kind.PONG:
            raise self._lost(member, payload.decode(errors="replace"))

    def _ping(self, now_s: float) -> None:
        for member in self._members:
            if now_s - member.heard_s > PONG_S:
                raise self._lost(member, f"no answer for {PONG_S:g} s")
            if self._sending.acquire(blocking=False):  # a plan is on its way: that will be answered too, or time out
                try:
                    send(member.link, Kind.PING)
                except OSError as error:
                    raise self._lost(member, str(error)) from None
                finally:
                    self._sending.release()

    def _lost(self, member: _Follower, why: str) -> RankLost:
        with contextlib.suppress(subprocess.TimeoutExpired):  # the end of its socket may be seen before its own
            member.process.wait(0.2)
        status = member.process.poll()
        ended = "" if status is None else f", ended with {status}"
        return RankLost(f"rank {member.rank} (pid {member.process.pid}{ended}): {why}")

    def _lose(self, lost: RankLost) -> None:
        """The first loss ends the others too, and is told."""
        with self._lock:
            if self._closing or self._failure is not None:
                return
            self._failure, on_lost = lost, self._on_lost
        logger.error("the worker has lost a rank: %s", lost)
        for member in self._members:
            member.process.kill()
        if on_lost is not None:
            on_lost(lost)


def _readable(links: Sequence[socket.socket], timeout_s: float) -> list[socket.socket]:
    """Those with something to read, or whose other end has ended; waits for the first."""
    by_number = {link.fileno(): link for link in links}
    poll = select.poll()
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(timeout_s * 1000)]


def _spawn(setup: Setup, kv_fd: int) -> _Follower:
    """One process, and its first message."""
    link, theirs = socket.socketpair()
    link.settimeout(PONG_S)  # of what is said to one that does not read
    numbers = (theirs.fileno(), kv_fd)
    module = "tandem.cluster.engine.parallel.follower"
    command = [sys.executable, "-P", "-m", module, *map(str, numbers)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        # A group of its own: Ctrl-C is for the worker, which drains first.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=numbers,
            process_group=0,
            env=paths,
        )
        send(link, Kind.SETUP, encode_setup(setup))
    except BaseException:
        link.close()
        raise
    finally:
        theirs.close()
    return _Follower(setup.rank, process, link, time.monotonic())
