"""A worker's other ranks as its leader has them: told things, watched, ended. Loads no torch.

A thread listens to all of them. One that has ended, says that it failed, or answers no PING for `PONG_S` takes the
others with it: a step needs all of them, and its KV is gone. Whoever owns the worker hears of it once (`watch`). A rank
that waits for a dead one needs no telling, for the connection between them breaks. While the ranks meet, the same
thread keeps the table in which they find each other (`meeting`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from .meeting import Meeting
from .messages import Kind, RankLost, Setup, decode_put, encode_setup, receive, send
from .rank_process import RankProcess

logger = logging.getLogger(__name__)

START_S = 120.0
"""Until a follower's interpreter and its libraries are there."""
LOAD_SILENCE_S = 600.0
"""Loading weights, a follower says how far it is; so long without a word is too long."""
PING_S, PONG_S = 2.0, 10.0
"""How often a follower is asked whether it lives, and how long it may take."""
STOP_S = 5.0
GIFT = b"K"
"""Before the first message: one byte, and with it the descriptor of the KV memory that the follower is lent, if any."""
Lost = Callable[[BaseException], None]


@dataclass(slots=True)
class _Member:
    process: RankProcess
    heard_s: float
    """When anything came of it."""
    spoke_s: float
    """When it last said something by itself."""
    ready: bool = False
    sending: threading.Lock = field(default_factory=threading.Lock)


class Followers:
    """Ranks 1 … n - 1. `start`, `say`, `close` are the owner's thread's; `watch` may be called from any."""

    def __init__(self, processes: Sequence[RankProcess], setups: Sequence[Setup], kv_fds: Sequence[int | None]) -> None:
        """Tells each process what it is to be, and lends it the KV memory of its descriptor; None: it has its own. The
        processes are this object's from now on. Raises RankLost.
        """
        now_s = time.monotonic()
        self._members = [_Member(process, now_s, now_s) for process in processes]
        self.meeting = Meeting()
        """Where this worker's ranks find each other."""
        self._failure: BaseException | None = None
        self._on_lost: Lost | None = None
        self.on_kv: dict[int, Callable[[bytes], None]] = {}
        """By rank, called with what it says of KV between workers, from a thread that must not wait."""
        self.on_kv_lost: list[Callable[[str], None]] = []
        """Called, once, when a follower is lost or this is closed; must not wait."""
        self.on_blocks: dict[int, Callable[[bytes], None]] = {}
        """As `on_kv`, with blocks of its KV memory."""
        self._closing = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._watcher = threading.Thread(target=self._watch, name="followers", daemon=True)
        try:
            for member, setup, kv_fd in zip(self._members, setups, kv_fds, strict=True):
                member.process.link.settimeout(PONG_S)  # of what is said to one that does not read
                _give(member.process, setup, kv_fd)
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
            if not _readable([member.process.link], START_S):
                raise _lost(member, f"no word for {START_S:g} s")
            kind, payload = _received(member)
            if kind is not Kind.HERE:
                raise _lost(member, payload.decode(errors="replace") or f"{kind.name} came, not HERE")

    def connect(self) -> None:
        """Tells them to meet the other ranks, and to load then; from now on they are watched. Raises RankLost."""
        now_s = time.monotonic()
        for member in self._members:
            member.heard_s = member.spoke_s = now_s
        self._watcher.start()
        self.say(Kind.CONNECT)

    def ready(self) -> None:
        """Returns when all have loaded. Raises RankLost."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or all(one.ready for one in self._members))
        self.check()

    def say(self, kind: Kind, payload: bytes = b"") -> None:
        """Tells all of them. Raises RankLost, also for one that was lost before."""
        self.check()
        for member in self._members:
            try:
                with member.sending:
                    send(member.process.link, kind, payload)
            except OSError as error:
                self._lose(_lost(member, str(error)))
                self.check()

    def say_kv(self, rank: int, command: bytes) -> None:
        """Tells one of them something about KV between workers. One that is lost is told elsewhere (`watch`)."""
        self._say_one(rank, Kind.KV, command)

    def say_blocks(self, rank: int, request: bytes) -> None:
        """Asks one of them something about blocks of its KV memory; the same."""
        self._say_one(rank, Kind.BLOCKS, request)

    def _say_one(self, rank: int, kind: Kind, payload: bytes) -> None:
        member = self._members[rank - 1]
        try:
            with member.sending:
                send(member.process.link, kind, payload)
        except OSError as error:
            self._lose(_lost(member, str(error)))

    def lose(self, rank: int, why: str) -> NoReturn:
        """That rank is of no use any more: the worker ends. Raises what was lost, or had been before."""
        lost = _lost(self._members[rank - 1], why)
        self._lose(lost)
        self.check()
        raise lost  # the worker is closing anyway

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
        with self._lock:
            told = self._closing or self._failure is not None
            self._closing = True
        if not told:
            self._end_kv("the worker is closing")
        for member in self._members:
            _hang_up(member.process)  # its end is the follower's, and wakes the watcher
        deadline_s = time.monotonic() + STOP_S
        for member in self._members:
            if not member.process.wait(max(0.0, deadline_s - time.monotonic())):
                member.process.kill()
                member.process.wait(STOP_S)
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join(STOP_S)
        for member in self._members:
            member.process.link.close()
            if member.process.kv_link is not None:
                member.process.kv_link.close()

    def _watch(self) -> None:
        """Until they end."""
        links = {member.process.link: member for member in self._members}
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

    def _heard(self, member: _Member) -> None:
        kind, payload = _received(member)
        member.heard_s = time.monotonic()
        if kind is Kind.PONG:
            return
        member.spoke_s = member.heard_s
        if kind is Kind.PROGRESS:
            return
        try:
            if kind is Kind.READY:
                with self._changed:
                    member.ready = True
                    self._changed.notify_all()
            elif kind is Kind.PUT:
                self.meeting.put(*decode_put(payload))
            elif kind is Kind.KV:
                self.on_kv[self._members.index(member) + 1](payload)
            elif kind is Kind.BLOCKS:
                self.on_blocks[self._members.index(member) + 1](payload)
            elif kind is Kind.ASK:
                self.meeting.ask(payload.decode(), functools.partial(self._answer, member))
            else:
                raise _lost(member, payload.decode(errors="replace") or f"{kind.name} came unasked")
        except ValueError as error:
            raise _lost(member, str(error)) from None

    def _answer(self, member: _Member, value: bytes) -> None:
        try:
            with member.sending:
                send(member.process.link, Kind.VALUE, value)
        except OSError as error:
            self._lose(_lost(member, str(error)))

    def _ping(self, now_s: float) -> None:
        for member in self._members:
            silence_s = now_s - (member.heard_s if member.ready else member.spoke_s)
            most_s = PONG_S if member.ready else LOAD_SILENCE_S
            if silence_s > most_s:
                raise _lost(member, f"no answer for {most_s:g} s")
            if member.sending.acquire(blocking=False):  # a plan is on its way: that will be answered too, or time out
                try:
                    send(member.process.link, Kind.PING)
                except OSError as error:
                    raise _lost(member, str(error)) from None
                finally:
                    member.sending.release()

    def _lose(self, lost: RankLost) -> None:
        """The first loss ends the others too, and is told."""
        with self._changed:
            if self._closing or self._failure is not None:
                return
            self._failure, on_lost = lost, self._on_lost
            self._changed.notify_all()
        logger.error("the worker has lost a rank: %s", lost)
        self.meeting.fail(lost)
        self._end_kv(str(lost))
        for member in self._members:
            member.process.kill()
            _hang_up(member.process)  # who waits for its KV waits no longer
        if on_lost is not None:
            on_lost(lost)

    def _end_kv(self, why: str) -> None:
        """Who waits for what a follower says of KV waits no longer."""
        for on_kv_lost in self.on_kv_lost:
            on_kv_lost(why)


def _give(process: RankProcess, setup: Setup, kv_fd: int | None) -> None:
    """What a follower hears first."""
    try:
        if kv_fd is None:
            process.link.sendall(GIFT)
        else:
            socket.send_fds(process.link, [GIFT], [kv_fd])
        send(process.link, Kind.SETUP, encode_setup(setup))
    except OSError as error:
        raise RankLost(f"{process}: {error}") from error


def _hang_up(process: RankProcess) -> None:
    for link in (process.link, process.kv_link):
        if link is not None:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


def _received(member: _Member) -> tuple[Kind, bytes]:
    try:
        return receive(member.process.link)
    except (EOFError, OSError, ValueError) as error:
        raise _lost(member, str(error)) from None


def _lost(member: _Member, why: str) -> RankLost:
    return RankLost(f"{member.process}: {why}")


def _readable(links: Sequence[socket.socket], timeout_s: float) -> list[socket.socket]:
    """Those with something to read, or whose other end has ended; waits for the first."""
    by_number = {link.fileno(): link for link in links}
    poll = select.poll()
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(timeout_s * 1000)]
