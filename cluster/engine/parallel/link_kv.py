"""KV memory of a rank that nobody can map, a GPU's, read and written over the link that its leader has with it anyway
(`messages.Kind.BLOCKS`): `LinkBlocks` at the leader (a `kv.PartBlocks`), `BlockServer` there. Pure.

A request is `u8 operation | u32 count | count × u64 block`, with the blocks' bytes behind a write; a read is answered
with the bytes, a write with nothing, once it is done; answers come in the order of requests. A thread of its own serves
them at the rank, so that no block waits for a step, nor a step for a block longer than the link takes to carry one.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ....kvtransfer.store import KVStore
from .followers import Followers
from .remote_kv import BLOCK_S, Asked

MESSAGE_BYTES = 16 * 2**20
"""Of blocks in one message; one block at least."""
MAX_REQUESTS = 8
"""Without an answer."""
_HEAD = struct.Struct("<BI")
_READ, _WRITE = 1, 2


class LinkBlocks:
    """Another rank's part. Any thread. What fails raises RankLost."""

    def __init__(self, followers: Followers, rank: int, block_bytes: int) -> None:
        """`block_bytes`: of the rank's part of a block."""
        self._followers, self._rank, self._block_bytes = followers, rank, block_bytes
        self._per_message = max(1, MESSAGE_BYTES // block_bytes)
        self._lock = threading.Lock()
        self._answers: queue.SimpleQueue[bytes | str] = queue.SimpleQueue()
        """Or why no answer comes any more."""
        self._asked: deque[tuple[Asked, int]] = deque()
        """Of each request without an answer: what it is part of, and how many blocks it asks for; 0: it writes."""
        followers.on_blocks[rank] = self._answers.put
        followers.on_kv_lost.append(self._answers.put)

    def ask(self, block_ids: Sequence[int]) -> Asked:
        """Begins to read the rank's part of each block; `take` ends that."""
        asked = Asked(len(block_ids))
        with self._lock:
            for first in range(0, len(block_ids), self._per_message):
                some = block_ids[first : first + self._per_message]
                self._request(_READ, some, b"", asked, len(some))
        return asked

    def take(self, asked: Asked) -> list[memoryview]:
        """The parts, in order of the blocks; waits for them."""
        with self._lock:
            while len(asked.parts) < asked.count:
                self._receive()
        return asked.parts

    def write(self, block_ids: Sequence[int], parts: Sequence[memoryview]) -> None:
        """Overwrites the rank's part of each block; they are there when this returns."""
        with self._lock:
            for first in range(0, len(block_ids), self._per_message):
                some = slice(first, first + self._per_message)
                self._request(_WRITE, block_ids[some], b"".join(parts[some]), Asked(0), 0)
            while self._asked:
                self._receive()

    def _request(self, operation: int, block_ids: Sequence[int], data: bytes, asked: Asked, count: int) -> None:
        while len(self._asked) >= MAX_REQUESTS:
            self._receive()
        head = _HEAD.pack(operation, len(block_ids)) + struct.pack(f"<{len(block_ids)}Q", *block_ids)
        self._asked.append((asked, count))
        self._followers.say_blocks(self._rank, head + data)

    def _receive(self) -> None:
        """The oldest request's answer."""
        self._followers.check()
        asked, count = self._asked.popleft()
        try:
            came = self._answers.get(timeout=BLOCK_S)
        except queue.Empty:
            # An answer that comes later would be taken for the next request's.
            self._followers.lose(self._rank, f"no answer about its KV for {BLOCK_S:g} s")
        if isinstance(came, str):
            self._answers.put(came)  # whoever asks next must not wait either
            self._followers.lose(self._rank, came)
        answer, size = memoryview(came), self._block_bytes
        if len(answer) != count * size:
            self._followers.lose(self._rank, f"{len(answer)} bytes of KV are not {count} blocks of {size}")
        asked.parts += [answer[i * size : (i + 1) * size] for i in range(count)]


class BlockServer:
    """The rank's end: `hear` takes requests in, `serve` answers them."""

    def __init__(self, store: KVStore, say: Callable[[bytes], None]) -> None:
        self._store = store
        self._say = say
        self._requests: queue.Queue[bytes] = queue.Queue(MAX_REQUESTS)

    def hear(self, request: bytes) -> None:
        """From one thread; does not wait, as the leader asks no more than it takes."""
        self._requests.put(request)

    def serve(self) -> None:
        """Never returns; ValueError for what is no request."""
        while True:
            self._say(self._answer(memoryview(self._requests.get())))

    def _answer(self, request: memoryview) -> bytes:
        operation, count = _HEAD.unpack_from(request)
        data = request[_HEAD.size + 8 * count :]
        block_ids = struct.unpack_from(f"<{count}Q", request, _HEAD.size)
        if operation == _READ:
            return b"".join(bytes(self._store.read_block(block_id)) for block_id in block_ids)
        size = self._store.layout.block_bytes
        if operation != _WRITE or len(data) != count * size:
            raise ValueError(f"operation {operation} with {len(data)} bytes for {count} blocks of {size}")
        self._store.write_blocks(block_ids, [data[i * size : (i + 1) * size] for i in range(count)])
        return b""
