"""A rank beside the worker's own: `python -m tandem.cluster.engine.parallel.follower LINK KV`, with the descriptors of
a socket and of its KV memory, started by `followers`.

1. It says HERE, is told SETUP and CONNECT, meets the other ranks, loads its part of the model and says READY.
2. It computes every PLAN it is told, with the others.
3. A thread of its own hears the link: it answers PING while a step is computed, and ends the process when the leader
   has ended. What goes wrong is said (FAILED) and ends it too: a worker that has lost a rank has lost its KV.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading

from ..plan_wire import decode_plan
from .messages import Kind, decode_setup, receive, send

MAX_PLANS = 16
"""Told and not yet computed."""
EXIT_FAILED = 70
logger = logging.getLogger(__name__)


def _hear(link: socket.socket, said: queue.Queue[tuple[Kind, bytes]], answers: threading.Lock) -> None:
    """Until the leader has ended."""
    try:
        while True:
            kind, payload = receive(link)
            if kind is Kind.PING:
                with answers:
                    send(link, Kind.PONG)
            else:
                said.put((kind, payload))
    except (EOFError, OSError):
        os._exit(0)


def _expect(said: queue.Queue[tuple[Kind, bytes]], wanted: Kind) -> bytes:
    kind, payload = said.get()
    if kind is not wanted:
        raise ValueError(f"{wanted.name} was due, {kind.name} came")
    return payload


def main(link_fd: int, kv_fd: int) -> None:
    """Runs until the leader ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader's to answer
    link = socket.socket(fileno=link_fd)
    said: queue.Queue[tuple[Kind, bytes]] = queue.Queue(MAX_PLANS)
    answers = threading.Lock()

    def answer(kind: Kind, payload: bytes = b"") -> None:
        with answers:
            send(link, kind, payload)

    threading.Thread(target=_hear, args=(link, said, answers), daemon=True).start()
    from .rank import build_rank  # heard first: the leader may end while libraries load

    answer(Kind.HERE)
    try:
        setup = decode_setup(_expect(said, Kind.SETUP))
        _expect(said, Kind.CONNECT)
        runner = build_rank(setup, kv_fd, lambda share: answer(Kind.PROGRESS, str(share).encode()))
        answer(Kind.READY)
        while True:
            runner.run(decode_plan(_expect(said, Kind.PLAN)))
    except Exception as error:
        logger.exception("a rank cannot go on")
        answer(Kind.FAILED, f"{type(error).__name__}: {error}".encode()[:4096])
        os._exit(EXIT_FAILED)


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("TANDEM_LOG", "WARNING").upper())
    main(int(sys.argv[1]), int(sys.argv[2]))
