"""Hands a segment's descriptor to workers of the same user on this host (SCM_RIGHTS over a Unix socket).

The socket is in the abstract namespace: no file is left behind. A worker elsewhere, in another network namespace or of
another user cannot have the descriptor, whatever it knows. The connection stays open as long as the reader wants the
mapping: when either end is gone, the other one knows.

Where the blocks lie in a device's memory, a second descriptor names that memory.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import sys
import uuid
from collections.abc import Iterator

from ..ticket import SegmentOffer
from .segment import KVSegment, SegmentBusy, SegmentError

log = logging.getLogger(__name__)

GREETING = b"TANDEMKV1"
MAX_READERS = 256
"""Connections kept by an owner; a reader beyond them is turned away and pulls over gRPC."""
_ACCEPTS_A_WAKE = 16
_UCRED = struct.Struct("3i")  # pid, uid, gid
_PASSING = frozenset(
    {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOTCONN, errno.ECONNRESET}
)
"""Errors that say nothing about whether the two share a host; ENOTCONN: the owner's backlog was full."""


class SegmentServer:
    """Owner's end. Create anywhere; `start` and `stop` on one event loop."""

    def __init__(self, segment: KVSegment, *, device_fd: int | None = None, max_readers: int = MAX_READERS) -> None:
        """`device_fd`: of the device memory that has the blocks of a segment without; stays the caller's."""
        self._segment = segment
        self._device_fd = device_fd
        self._max_readers = max_readers
        self._readers: dict[int, socket.socket] = {}
        self._listener: socket.socket | None = None
        self.offer = SegmentOffer(socket_name=f"tandem-kv-{uuid.uuid4().hex}", nonce=segment.nonce)

    @property
    def readers(self) -> int:
        """Workers that are connected now."""
        return len(self._readers)

    async def start(self) -> None:
        """Listens. OSError if it cannot."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(_address(self.offer.socket_name))
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    async def stop(self) -> None:
        """Closes every connection; readers keep what they have mapped. Idempotent."""
        loop = asyncio.get_running_loop()
        listener, self._listener = self._listener, None
        if listener is not None:
            loop.remove_reader(listener.fileno())
            listener.close()
        for number in list(self._readers):
            self._drop(number)

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_ACCEPTS_A_WAKE):
            try:
                reader, _ = self._listener.accept()
            except OSError:  # nobody else waits, or no descriptor is left
                return
            reader.setblocking(False)
            try:
                self._serve(reader)
            except (OSError, SegmentError) as error:
                log.info("a reader of the KV segment was turned away: %s", error)
                reader.close()

    def _serve(self, reader: socket.socket) -> None:
        """Sends the descriptor. The message is the first on its connection, so it does not block."""
        _check_same_user(reader)
        if len(self._readers) >= self._max_readers:
            raise SegmentError(f"{self._max_readers} readers are connected")
        device = [] if self._device_fd is None else [self._device_fd]
        socket.send_fds(reader, [GREETING], [self._segment.fileno(), *device])
        self._readers[reader.fileno()] = reader
        asyncio.get_running_loop().add_reader(reader.fileno(), self._drop, reader.fileno())

    def _drop(self, number: int) -> None:
        """The reader closed its end (it never says anything)."""
        asyncio.get_running_loop().remove_reader(number)
        self._readers.pop(number).close()


async def share(segment: KVSegment | None, device_fd: int | None = None) -> SegmentServer | None:
    """A running server for a segment; None where there is nothing to share or no Unix socket to share it over."""
    if segment is None or not segment.shareable or segment.in_device != (device_fd is not None):
        return None
    server = SegmentServer(segment, device_fd=device_fd)
    try:
        await server.start()
    except OSError as error:
        log.warning("KV memory is not shared with workers on this host: %s", error)
        return None
    return server


async def fetch(offer: SegmentOffer, *, timeout_s: float) -> tuple[socket.socket, int, int | None]:
    """Connects to an owner and takes the descriptors: (connection, the segment's, that of the device memory or None),
    all the caller's to close.

    `SegmentError` says why it cannot be had here; `SegmentBusy`, why not now.
    """
    if sys.platform != "linux":
        raise SegmentError("only Linux has memfd")
    loop = asyncio.get_running_loop()
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise _unreachable(error) from error
    try:
        async with asyncio.timeout(timeout_s):
            await loop.sock_connect(connection, _address(offer.socket_name))
            connection.getpeername()  # OSError where it is not connected after all
            _check_same_user(connection)
            await _readable(connection)
        return connection, *_receive(connection)
    except TimeoutError as error:
        connection.close()
        raise SegmentBusy(f"no descriptor within {timeout_s:g} s") from error
    except OSError as error:
        connection.close()
        raise _unreachable(error) from error
    except BaseException:
        connection.close()
        raise


def _unreachable(error: OSError) -> SegmentError:
    kind = SegmentBusy if error.errno in _PASSING else SegmentError
    return kind(f"the owner's socket cannot be reached from here: {error}")


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def done() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection.fileno(), done)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


def _receive(connection: socket.socket) -> tuple[int, int | None]:
    """The one descriptor, or the two, of the owner's one message."""
    room = socket.CMSG_SPACE(2 * array.array("i", [0]).itemsize)
    data, control, flags, _ = connection.recvmsg(len(GREETING) + 1, room, socket.MSG_CMSG_CLOEXEC)
    with _closing_all(_descriptors(control)) as descriptors:
        if not data:
            raise SegmentBusy("the owner turned this reader away")
        if data == GREETING and flags & socket.MSG_CTRUNC and len(descriptors) < 2:
            raise SegmentBusy("this process has no descriptor left for it")
        if data != GREETING or len(descriptors) not in (1, 2) or flags & socket.MSG_CTRUNC:
            raise SegmentError("not a KV segment's socket")
        device = descriptors.pop() if len(descriptors) == 2 else None
        return descriptors.pop(), device


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


@contextlib.contextmanager
def _closing_all(descriptors: list[int]) -> Iterator[list[int]]:
    """Closes what is left in the list."""
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _check_same_user(connection: socket.socket) -> None:
    """`SegmentError` unless the process at the other end runs as this process's user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    if uid != os.geteuid():
        raise SegmentError(f"the other process runs as user {uid}, this one as {os.geteuid()}")


def _address(name: str) -> bytes:
    return b"\0" + name.encode()
