"""A rank beside the worker's own. `serve` is its life, over a link with the leader: in an actor of Ray, or as
`python -m tandem.cluster.engine.parallel.follower LINK`, with the descriptor of a socket, started by `rank_process`.

1. It says HERE, is given its KV memory and told SETUP and CONNECT, meets the other ranks, loads its part of the model
   and says READY.
2. It computes every PLAN it is told, with the others.
3. A thread of its own hears the link: it answers PING while a step is computed, and ends the process when the leader
   has ended. What goes wrong is said (FAILED) and ends it too: a worker that has lost a rank has lost its KV.
4. Where it stands on another node than the leader, its KV memory is its own; another thread reads and writes blocks of
   it for the leader (`remote_kv`).
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable

from ..plan_wire import decode_plan
from .followers import GIFT, PING_S, START_S
from .link_kv import BlockServer
from .messages import Kind, RankLost, decode_setup, encode_put, receive, send
from .remote_kv import serve_blocks

SILENCE_S = 15 * PING_S
"""A leader on another node that was not heard for so long is gone: its end may not have come through."""
EXIT_FAILED = 70
logger = logging.getLogger(__name__)
_Said = queue.SimpleQueue[tuple[Kind, bytes]]
"""Bounded by the leader, who has as many plans under way as its device takes: who hears must never wait."""


class _Link:
    """The follower's end: what was said and is not done yet; answers from any thread."""

    def __init__(self, link: socket.socket, *, remote: bool) -> None:
        self._link = link
        self._remote = remote
        self._said: _Said = queue.SimpleQueue()
        self._values: queue.Queue[bytes] = queue.Queue(1)
        """What was asked for: also while plans wait to be computed, for NCCL meets as it is first used."""
        self._asking = threading.Lock()
        self._answers = threading.Lock()
        self.on_kv: Callable[[bytes], None] = lambda command: None
        """Called with what the leader says of KV between workers; must not wait."""
        self.on_blocks: Callable[[bytes], None] = lambda request: None
        """The same of blocks of its KV memory."""
        self.kv_fd: int | None = None
        """The KV memory it is lent, once SETUP was said; None: it makes its own."""

    def hear(self) -> None:
        """Until the leader has ended; then the process does."""
        try:
            self._link.settimeout(START_S + SILENCE_S if self._remote else None)
            if self._remote:
                self._link.recv(len(GIFT))
            else:
                _, fds, _, _ = socket.recv_fds(self._link, len(GIFT), 1)
                self.kv_fd = fds[0] if fds else None
            while True:
                kind, payload = receive(self._link)
                if kind is Kind.PING:
                    self.answer(Kind.PONG)
                    continue
                if kind is Kind.VALUE:
                    self._values.put(payload)
                    continue
                if kind is Kind.KV:
                    self.on_kv(payload)
                    continue
                if kind is Kind.BLOCKS:
                    self.on_blocks(payload)
                    continue
                if kind is Kind.CONNECT and self._remote:
                    self._link.settimeout(SILENCE_S)
                self._said.put((kind, payload))
        except (EOFError, OSError, ValueError):
            os._exit(0)

    def expect(self, wanted: Kind) -> bytes:
        """What is said next. ValueError where it is something else."""
        kind, payload = self._said.get()
        if kind is not wanted:
            raise ValueError(f"{wanted.name} was due, {kind.name} came")
        return payload

    def answer(self, kind: Kind, payload: bytes = b"") -> None:
        """Says something to the leader. OSError."""
        with self._answers:
            send(self._link, kind, payload)

    def put(self, key: str, value: bytes) -> None:
        """Tells the other ranks."""
        self.answer(Kind.PUT, encode_put(key, value))

    def take(self, key: str, timeout_s: float) -> bytes:
        """Asks what another rank has put, and waits for it."""
        with self._asking:
            self.answer(Kind.ASK, key.encode())
            try:
                return self._values.get(timeout=timeout_s)
            except queue.Empty:
                raise RankLost(f"no rank said {key} within {timeout_s:g} s") from None


def serve(link: socket.socket, kv_link: socket.socket | None = None, reference: str | None = None) -> None:
    """Runs until the leader ends, and ends the process then. `kv_link`: of a rank on another node than the leader;
    `reference`: of the model, whose files it finds itself; None: they are where the leader has them.
    """
    ours = _Link(link, remote=kv_link is not None)
    threading.Thread(target=ours.hear, name="rank-link", daemon=True).start()
    try:
        from .rank import RankKV, build_rank  # heard first: the leader may end while libraries load

        ours.answer(Kind.HERE)
        setup = decode_setup(ours.expect(Kind.SETUP))
        ours.expect(Kind.CONNECT)
        progress: Callable[[float], None] = lambda share: ours.answer(Kind.PROGRESS, str(share).encode())  # noqa: E731
        if setup.gpu is None:
            rank = build_rank(setup, ours.kv_fd, ours, progress, reference)
        else:
            from ..gpu.rank import build_gpu_rank

            rank = build_gpu_rank(setup, setup.gpu, ours, progress, reference)
        if rank.store is not None:
            server = BlockServer(rank.store, lambda answer: ours.answer(Kind.BLOCKS, answer))
            ours.on_blocks = server.hear
            threading.Thread(target=_or_end, args=(server.serve,), name="rank-blocks", daemon=True).start()
        elif kv_link is not None:
            arguments = (kv_link, rank.blocks, rank.block_bytes, lambda: os._exit(0))
            threading.Thread(target=serve_blocks, args=arguments, name="rank-kv", daemon=True).start()
        ours.on_kv = RankKV(rank.memory, lambda answer: ours.answer(Kind.KV, answer)).hear
        ours.answer(Kind.READY)
        while True:
            rank.run(decode_plan(ours.expect(Kind.PLAN)))
    except Exception as error:
        logger.exception("a rank cannot go on")
        try:
            ours.answer(Kind.FAILED, f"{type(error).__name__}: {error}".encode()[:4096])
        finally:
            os._exit(EXIT_FAILED)


def _or_end(work: Callable[[], None]) -> None:
    """What a thread cannot go on with, this process cannot."""
    try:
        work()
    except Exception:
        logger.exception("a rank cannot go on")
        os._exit(EXIT_FAILED)


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("TANDEM_LOG", "WARNING").upper())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader's to answer
    serve(socket.socket(fileno=int(sys.argv[1])))
