"""KV memory of a rank on another node, read and written block by block over a link of its own: `serve_blocks` there,
`RemoteBlocks` at the leader. Pure.

A request is `u8 operation | u64 block`, with the block's bytes behind a write; a read is answered with the block's
bytes, a write with one byte once it is done: the leader has no step computed from a block before that. Requests may
follow each other without waiting; answers come in their order, so the first that does not come is the last that is
waited for: what stands in the link behind it would be taken for others' bytes. The link is shut then, which ends the
rank, and with it the worker. What is read or written are blocks that the caller
holds, as with every `KVStore`, so that no step writes what is read here.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from .messages import RankLost, fill

_REQUEST = struct.Struct("<BQ")
_READ, _WRITE = 1, 2
_DONE = b"W"
MAX_ASKED = 1024
"""Requests without an answer yet: beyond it they would wait for a rank that waits for its answers to be taken."""
BLOCK_S = 10.0
"""For one block; a rank that lives and is reached answers within milliseconds."""


class Asked:
    """Blocks of one rank that were asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.parts: list[memoryview] = []
        """What has come."""


class RemoteBlocks:
    """The leader's end. Any thread; one at a time is served. What fails raises RankLost."""

    def __init__(self, link: socket.socket, rank: int, block_bytes: int) -> None:
        """`block_bytes`: of the rank's part of a block."""
        link.settimeout(BLOCK_S)
        self._link, self._rank, self.block_bytes = link, rank, block_bytes
        self._lock = threading.Lock()
        self._asked: deque[Asked] = deque()
        self._open = 0
        self._failed = ""

    def ask(self, block_ids: Sequence[int]) -> Asked:
        """Begins to read the rank's part of each block; `take` ends that."""
        with self._link_for("read"):
            while self._asked and self._open + len(block_ids) > MAX_ASKED:
                self._receive(self._asked.popleft())
            self._link.sendall(b"".join(_REQUEST.pack(_READ, block_id) for block_id in block_ids))
            asked = Asked(len(block_ids))
            self._asked.append(asked)
            self._open += asked.count
            return asked

    def take(self, asked: Asked) -> list[memoryview]:
        """The parts, in order of the blocks; waits for them."""
        with self._link_for("read"):
            while len(asked.parts) < asked.count:
                self._receive(self._asked.popleft())
            return asked.parts

    def write(self, block_ids: Sequence[int], parts: Sequence[memoryview]) -> None:
        """Overwrites the rank's part of each block; they are there when this returns."""
        with self._link_for("written"):
            while self._asked:  # its answers stand before ours
                self._receive(self._asked.popleft())
            for block_id, part in zip(block_ids, parts, strict=True):
                self._link.sendall(_REQUEST.pack(_WRITE, block_id))
                self._link.sendall(part)
            fill(self._link, memoryview(bytearray(len(_DONE) * len(block_ids))))

    @contextlib.contextmanager
    def _link_for(self, what: str) -> Iterator[None]:
        """The link is this thread's; nobody's ever again once something has failed on it."""
        with self._lock:
            if self._failed:
                raise RankLost(self._failed)
            try:
                yield
            except BaseException as error:
                self._failed = f"the KV of rank {self._rank} cannot be {what}: {error}"
                with contextlib.suppress(OSError):
                    self._link.shutdown(socket.SHUT_RDWR)
                if isinstance(error, (OSError, EOFError)):
                    raise RankLost(self._failed) from error
                raise

    def _receive(self, asked: Asked) -> None:
        whole = memoryview(bytearray(asked.count * self.block_bytes))
        fill(self._link, whole)
        self._open -= asked.count
        asked.parts = [whole[i * self.block_bytes : (i + 1) * self.block_bytes] for i in range(asked.count)]


def serve_blocks(link: socket.socket, blocks: memoryview, block_bytes: int, on_end: Callable[[], None]) -> None:
    """The rank's end, until the leader has ended, or says what nobody says; then `on_end` is called. `blocks`: all
    blocks' bytes, one after another.
    """
    count = len(blocks) // block_bytes
    request = memoryview(bytearray(_REQUEST.size))
    link.settimeout(None)
    try:
        while True:
            fill(link, request)
            operation, block_id = _REQUEST.unpack(request)
            if operation not in (_READ, _WRITE) or block_id >= count:
                raise ValueError(f"operation {operation} on block {block_id} of {count}")
            block = blocks[block_id * block_bytes : (block_id + 1) * block_bytes]
            if operation == _READ:
                link.sendall(block)
            else:
                fill(link, block)
                link.sendall(_DONE)
    except (OSError, EOFError, ValueError):
        on_end()
