"""How the ranks of a worker that are no children of its leader come to it: `RankDoor` at the leader, `join` there.

1. The leader opens a door and has an `Offer` given to each rank, by a way that members trust (Ray's arguments).
2. A rank of the same node comes by a Unix socket (one without a file, which goes with its owner however that ends); a
   rank of another node by TCP, with two links: one for steps, one for blocks of its KV.
3. Before anything else is read, both prove that they know the offer's key, which was drawn for this life of the worker,
   and the cluster's secret: each answers the other's challenge by a MAC over both challenges and over what it says.
   Strangers hear no more than that they are none of the ranks, and cannot keep others from coming: those in the door
   are bounded in number and time, and where no place is left, the address that holds the most of them loses its
   oldest. Other users of the node take none. A rank that loses its place so comes again, within its own time.
4. The door is closed once all are there.

Links over TCP are neither encrypted nor signed after that, nor is what ranks say to each other (Gloo, NCCL): who may
change packets between two nodes can change a worker's results. Where members are told to use TLS, ranks stay on one
node (`cluster.launch.rank_actors`). Loads no torch.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ...auth import MemberCredentials
from ...ports import bind
from .messages import RankLost

logger = logging.getLogger(__name__)

MAX_IN_DOOR = 64
"""Who has come and not proved yet."""
PROOF_S = 5.0
CHALLENGE_BYTES = 32
STEPS, BLOCKS = 0, 1
_POLL_S = 0.2
_COME_AGAIN_S = 0.05
_SAY_AGAIN_S = 10.0
_UCRED = struct.Struct("3i")
"""Of SO_PEERCRED: process, user, group."""
_SAYS = struct.Struct("<8sBII32s32s")
_MAGIC = b"TANDEMR1"
_NO = bytes(CHALLENGE_BYTES)
"""What a leader says instead of its own proof to one that is not its rank: it need not come again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a rank must know to come."""

    rank: int
    key: bytes = field(repr=False)
    name: str
    """Of the Unix socket, in Linux's abstract namespace; empty for a rank of another node."""
    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether the rank stands on the leader's node."""
        return bool(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A rank that has come."""

    rank: int
    pid: int
    link: socket.socket
    kv_link: socket.socket | None
    host: str
    """Its address, and the leader's as it has it; empty on the same node."""
    leader_host: str


class RankDoor:
    """The leader's side, for one start of a worker. `close` when all have come, or will not."""

    def __init__(self, remote: dict[int, bool], host: str, credentials: MemberCredentials) -> None:
        """`remote`: by rank, whether it stands on another node; `host`: where those reach this one. Raises OSError."""
        self._remote = remote
        self._credentials = credentials
        self._key = secrets.token_bytes(32)
        self._came: dict[tuple[int, int], tuple[int, socket.socket]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._name = f"tandem-ranks-{secrets.token_hex(16)}"
        self._host, self._port = host, 0
        self._listeners: list[socket.socket] = []
        self._in_door: dict[socket.socket, tuple[str, threading.Thread]] = {}
        """Who has not proved yet, in the order in which they came: from which address, and who listens to it."""
        self._turned_away, self._said_s = 0, -_SAY_AGAIN_S
        try:
            if not all(remote.values()):
                local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._listeners.append(local)
                local.bind(f"\0{self._name}")
            if any(remote.values()):
                self._listeners.append(bind(host, 0))
                self._port = int(self._listeners[-1].getsockname()[1])
            for listener in self._listeners:
                listener.listen(MAX_IN_DOOR)
                listener.settimeout(_POLL_S)
                threading.Thread(target=self._accept, args=(listener,), name="rank-door", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def offer(self, rank: int) -> Offer:
        """For one rank."""
        name = "" if self._remote[rank] else self._name
        return Offer(rank=rank, key=self._key, name=name, host=self._host, port=self._port)

    def wait(self, timeout_s: float, check: Callable[[], None]) -> list[Joined]:
        """All ranks, in order. `check` is called now and then and raises where one will not come. Raises RankLost."""
        deadline_s = time.monotonic() + timeout_s
        wanted = {(rank, STEPS) for rank in self._remote} | {
            (rank, BLOCKS) for rank in self._remote if self._remote[rank]
        }
        while True:
            with self._changed:
                self._changed.wait_for(lambda: wanted <= self._came.keys(), _POLL_S)
                missing = sorted({rank for rank, _ in wanted - self._came.keys()})
                if not missing:
                    return [self._joined(rank) for rank in sorted(self._remote)]
            check()
            if time.monotonic() > deadline_s:
                raise RankLost(f"rank {missing[0]} did not come within {timeout_s:g} s")

    def close(self) -> None:
        """Nobody comes any more; links that `wait` has not handed over are closed. Idempotent."""
        with self._changed:
            self._closed = True
            for link in self._in_door:
                _hang_up(link)
            for _, link in self._came.values():
                link.close()
            self._came.clear()
        for listener in self._listeners:
            _hang_up(listener)  # whoever waits in `accept` keeps the port open otherwise
            listener.close()

    def _joined(self, rank: int) -> Joined:
        pid, link = self._came.pop((rank, STEPS))
        _, kv_link = self._came.pop((rank, BLOCKS), (0, None))
        host, ours = ("", "") if kv_link is None else (link.getpeername()[0], link.getsockname()[0])
        return Joined(rank=rank, pid=pid, link=link, kv_link=kv_link, host=host, leader_host=ours)

    def _accept(self, listener: socket.socket) -> None:
        """Until the door is closed."""
        while not self._closed:
            try:
                link, address = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._closed:
                    return
                time.sleep(_POLL_S)  # no descriptor left
                continue
            try:
                _check_same_user(link)
            except OSError as error:
                self._turn_away(link, error)
                continue
            self._enter(link, address[0] if listener.family != socket.AF_UNIX else "")

    def _enter(self, link: socket.socket, host: str) -> None:
        """Whoever must give up its place for that is gone when this returns."""
        thread = threading.Thread(target=self._admit, args=(link,), name="rank-admit", daemon=True)
        while True:
            with self._changed:
                if len(self._in_door) < MAX_IN_DOOR:
                    self._in_door[link] = host, thread
                    thread.start()
                    return
                ((crowd, _),) = Counter(host for host, _ in self._in_door.values()).most_common(1)
                oldest = next(link for link, (host, _) in self._in_door.items() if host == crowd)
                _, listening = self._in_door.pop(oldest)
                _hang_up(oldest)
            listening.join()

    def _leave(self, link: socket.socket) -> bool:
        """Whether it had its place still."""
        with self._changed:
            return self._in_door.pop(link, None) is not None

    def _turn_away(self, link: socket.socket, error: Exception) -> None:
        """One line now and then: a stranger who keeps knocking does not fill the log."""
        link.close()
        with self._changed:
            self._turned_away += 1
            if time.monotonic() - self._said_s < _SAY_AGAIN_S:
                return
            self._said_s = time.monotonic()
        logger.warning("somebody who came to be a rank was turned away (%d so far): %s", self._turned_away, error)

    def _admit(self, link: socket.socket) -> None:
        try:
            rank, kind, pid = self._prove(link)
        except (OSError, EOFError, ValueError) as error:
            self._turn_away(link, error)
            return
        finally:
            self._leave(link)
        with self._changed:
            if self._closed or (rank, kind) in self._came:
                link.close()
                return
            self._came[rank, kind] = pid, link
            self._changed.notify_all()

    def _prove(self, link: socket.socket) -> tuple[int, int, int]:
        deadline_s = time.monotonic() + PROOF_S
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        link.settimeout(PROOF_S)
        link.sendall(challenge)
        magic, kind, rank, pid, theirs, proof = _SAYS.unpack(_exactly(link, _SAYS.size, deadline_s))
        said = _said(kind, rank, pid)
        wrong = ""
        if magic != _MAGIC or not hmac.compare_digest(
            proof, _rank_proof(self._credentials, self._key, challenge, theirs, said)
        ):
            wrong = "it does not know this worker's key and the cluster's secret"
        elif rank not in self._remote or kind not in (STEPS, BLOCKS)[: 1 + self._remote[rank]]:
            wrong = f"link {kind} of rank {rank} is not expected here"
        if wrong:
            link.sendall(_NO)
            raise ValueError(wrong)
        if not self._leave(link):
            raise EOFError("others came, and it had not proved itself yet")
        link.sendall(_leader_proof(self._credentials, self._key, challenge, theirs))
        link.settimeout(None)
        _no_delay(link)
        return rank, kind, pid


def join(offer: Offer, credentials: MemberCredentials, timeout_s: float) -> tuple[socket.socket, socket.socket | None]:
    """The rank's side: its links for steps and, from another node, for blocks. Raises OSError, RankLost where the other
    is not this rank's leader.
    """
    link = _come(offer, STEPS, credentials, timeout_s)
    if offer.is_local:
        return link, None
    try:
        return link, _come(offer, BLOCKS, credentials, timeout_s)
    except BaseException:
        link.close()
        raise


def _come(offer: Offer, kind: int, credentials: MemberCredentials, timeout_s: float) -> socket.socket:
    """A link to the leader, which both ends have proved. Comes again where it is sent away without a word, but not to a
    door that is closed.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return _proved(offer, kind, credentials, deadline_s)
        except ConnectionRefusedError:
            raise
        except (EOFError, ConnectionError, BlockingIOError) as error:  # the last: too many wait before a Unix socket
            if time.monotonic() + _COME_AGAIN_S > deadline_s:
                raise RankLost(f"the leader sent this rank away each time it came: {error}") from error
            time.sleep(_COME_AGAIN_S)


def _proved(offer: Offer, kind: int, credentials: MemberCredentials, deadline_s: float) -> socket.socket:
    link, challenge = _challenged(offer, deadline_s)
    try:
        ours = secrets.token_bytes(CHALLENGE_BYTES)
        pid = os.getpid()
        proof = _rank_proof(credentials, offer.key, challenge, ours, _said(kind, offer.rank, pid))
        link.sendall(_SAYS.pack(_MAGIC, kind, offer.rank, pid, ours, proof))
        answer = _exactly(link, CHALLENGE_BYTES, deadline_s)
        if answer == _NO:
            raise RankLost("the leader turned this rank away: is the cluster's secret the same on both nodes?")
        if not hmac.compare_digest(answer, _leader_proof(credentials, offer.key, challenge, ours)):
            raise RankLost("whoever answers is not this rank's leader")
        link.settimeout(None)
        _no_delay(link)
    except BaseException:
        link.close()
        raise
    return link


def _challenged(offer: Offer, deadline_s: float) -> tuple[socket.socket, bytes]:
    left_s = max(0.001, deadline_s - time.monotonic())
    if offer.is_local:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    else:
        link = socket.create_connection((offer.host, offer.port), left_s)
    try:
        link.settimeout(left_s)
        if offer.is_local:
            link.connect(f"\0{offer.name}")
        return link, _exactly(link, CHALLENGE_BYTES, deadline_s)
    except BaseException:
        link.close()
        raise


def _said(kind: int, rank: int, pid: int) -> bytes:
    return struct.pack("<BII", kind, rank, pid)


def _rank_proof(credentials: MemberCredentials, key: bytes, leaders: bytes, ranks: bytes, said: bytes) -> bytes:
    return credentials.proof(b"tandem rank 1" + key + leaders + ranks + said)


def _leader_proof(credentials: MemberCredentials, key: bytes, leaders: bytes, ranks: bytes) -> bytes:
    return credentials.proof(b"tandem leader 1" + key + leaders + ranks)


def _exactly(link: socket.socket, size: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < size:
        link.settimeout(max(0.001, deadline_s - time.monotonic()))
        piece = link.recv(size - len(data))
        if not piece:
            raise EOFError("the connection was closed")
        data += piece
    return data


def _no_delay(link: socket.socket) -> None:
    with contextlib.suppress(OSError):  # a Unix socket knows none
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _hang_up(link: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be closed, or a listener that does not listen yet
        link.shutdown(socket.SHUT_RDWR)


def _check_same_user(link: socket.socket) -> None:
    """PermissionError where a process of this node runs as another user."""
    if link.family == socket.AF_UNIX:
        _, user, _ = _UCRED.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if user != os.geteuid():
            raise PermissionError(f"it runs as user {user}, its leader as {os.geteuid()}")
