"""The KV memory of one device, laid out so that other processes of this host can read it.

    | header, one page | generations: u64 per block, whole pages | block 0 | block 1 | …

Where the blocks lie in a device's memory, only header and generations are here; the rest is `kvtransfer.cuda_ipc`.

The header names the memory: a random nonce (drawn when it is made), the worker's epoch, the layout. The memory is a
memfd: it has no name, lives as long as anybody maps it (so a reader survives the owner's kill -9) and is sealed, so
that its size never changes (a reader cannot meet SIGBUS) and, once its descriptor is passed to readers, no further
mapping can write: only the owner's first one does, and that of the process that moves the owner's KV
(`kvtransfer.mover`), which `lend` gave it before.

**Torn reads.** The owner raises a block's generation before it hands the block out anew, hence before anybody writes
into it again; content under one generation never changes once a holder has named it. A reader compares the generation
after it has copied: equal means that no write had begun when its copy was done. That needs the two stores, and the two
loads, to be seen in order: x86-64 does so, and elsewhere the locks do that both sides pass through between the two
(`MappedSegment.generations` takes one; on the owner's side the engine's queue lies between a grant and its first step).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import threading
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from ...cluster.host_memory import available_bytes
from ..layout import KVLayout
from ..neighbors import neighbors

MAGIC = b"TANDEMKV"
VERSION = 1
NONCE_BYTES = 16
PAGE_BYTES = max(4096, mmap.PAGESIZE)
_HEADER = struct.Struct("<8sIIQ16s16sQQQQQ")
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # linux/mman.h; kernels from 5.14 on
COMMIT_BYTES = 8 * 2**30
"""What a start waits for at most: some seconds."""
_CALL_BYTES = 64 * 2**20
"""In one call, which no signal interrupts."""
_LINUX = sys.platform == "linux"
if _LINUX:
    import fcntl

    _SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    _SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; kernels from 5.1 on
else:
    _SEALS = 0


class SegmentError(RuntimeError):
    """Memory that cannot be mapped, or is not what it should be."""


class SegmentBusy(SegmentError):
    """Memory that cannot be had now, and may be later: one of the two has no descriptor, place or time for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Offsets in bytes from the segment's start."""

    num_blocks: int
    block_bytes: int
    generations_offset: int
    blocks_offset: int
    total_bytes: int


def _shape_of(block_bytes: int, num_blocks: int, in_device: bool) -> _Shape:
    blocks_offset = PAGE_BYTES + _whole_pages(8 * num_blocks)
    return _Shape(
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        generations_offset=PAGE_BYTES,
        blocks_offset=blocks_offset,
        total_bytes=blocks_offset + (0 if in_device else _whole_pages(num_blocks * block_bytes)),
    )


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


class KVSegment:
    """The owner's side: zeroed memory for `num_blocks` blocks. Where there is no memfd it is plain memory, which nobody
    else can have (`shareable` is False).
    """

    def __init__(self, layout: KVLayout, num_blocks: int, *, in_device: bool = False) -> None:
        """`in_device`: the blocks themselves lie in a device's memory, and none here."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks} is not >= 1")
        self.in_device = in_device
        self.nonce = uuid.uuid4().bytes
        self._digest = layout.digest().encode()
        self._shape = _shape_of(layout.block_bytes, num_blocks, in_device)
        self._fd, memory = _memory(self._shape.total_bytes)
        self._close_fd = None if self._fd is None else weakref.finalize(self, os.close, self._fd)
        self._passed = False
        self._memory = memory
        view, shape = memoryview(memory), self._shape
        self._header = view[: _HEADER.size]
        self.generations: memoryview = view[PAGE_BYTES : PAGE_BYTES + 8 * num_blocks].cast("Q")
        """[num_blocks], writable: how often each block was handed out."""
        self.blocks: memoryview = view[shape.blocks_offset : shape.blocks_offset + num_blocks * shape.block_bytes]
        """The blocks' bytes, one after another, writable; page-aligned."""
        self.publish(0)

    @property
    def shareable(self) -> bool:
        """Whether others can map it: it is a memfd, and not closed."""
        return self._fd is not None

    def commit(self) -> bool:
        """Has the system find the pages now, while nobody waits: one that is written for the first time costs 1 to 20
        us, 8 to 60 ms of a handoff of 12 MB. Before anybody else has the memory. False where it cannot (an older
        kernel, more than the machine has left); then, and beyond COMMIT_BYTES, pages come as they are written.
        """
        wanted = min(len(self._memory), COMMIT_BYTES)
        if wanted > available_bytes():
            return False
        try:
            for begin in range(0, wanted, _CALL_BYTES):
                self._memory.madvise(_MADV_POPULATE_WRITE, begin, min(_CALL_BYTES, wanted - begin))
        except OSError:
            return False
        return True

    def publish(self, epoch: int) -> None:
        """Writes the header; again, with the worker's epoch, before the segment is offered."""
        shape = self._shape
        sizes = (shape.num_blocks, shape.block_bytes, shape.generations_offset, shape.blocks_offset, shape.total_bytes)
        _HEADER.pack_into(self._header, 0, MAGIC, VERSION, _HEADER.size, epoch, self.nonce, self._digest, *sizes)

    def fileno(self) -> int:
        """The memfd's descriptor, to be passed on to readers: from now on nobody can map it for writing. `SegmentError`
        if it is not `shareable`.
        """
        fd = self._open_fd()
        if not self._passed:
            _forbid_writing(fd)
            self._passed = True
        return fd

    def lend(self) -> int:
        """The descriptor for a process of this worker's own, which may write too; it maps it before `fileno` is asked.
        `SegmentError` if it is not `shareable`, or passed on already.
        """
        if self._passed:
            raise SegmentError("this KV memory is sealed: no other process may write into it")
        return self._open_fd()

    def _open_fd(self) -> int:
        if self._fd is None:
            raise SegmentError("this KV memory is not shared")
        return self._fd

    def close(self) -> None:
        """Closes the descriptor; the memory goes with the last view of it. Idempotent."""
        self._fd = None
        if self._close_fd is not None:
            self._close_fd()


def have_shared_memory() -> bool:
    """Whether a segment that is made here is `shareable`."""
    fd, _ = _memory(PAGE_BYTES)
    if fd is not None:
        os.close(fd)
    return fd is not None


def _memory(total_bytes: int) -> tuple[int | None, mmap.mmap]:
    """A memfd that keeps its size, mapped, or plain memory where the system has none."""
    if not _LINUX:
        return None, mmap.mmap(-1, total_bytes)
    try:
        fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:  # not built in, or not allowed here
        return None, mmap.mmap(-1, total_bytes)
    try:
        os.ftruncate(fd, total_bytes)
        memory = mmap.mmap(fd, total_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:  # no memory of this kind, or no seals
        os.close(fd)
        return None, mmap.mmap(-1, total_bytes)
    return fd, memory


def _forbid_writing(fd: int) -> None:
    """Mappings that can write stay, further ones are refused; no seal can be added after this."""
    with contextlib.suppress(OSError):  # an older kernel: readers could write, if they meant to
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)


class MappedSegment:
    """A segment of another process, mapped. The mapping lives as long as this object or a view of its blocks."""

    def __init__(
        self,
        fd: int,
        *,
        nonce: bytes,
        epoch: int,
        layout: KVLayout,
        writable: bool = False,
        in_device: bool = False,
    ) -> None:
        """Maps `fd` (which stays the caller's) and checks that it is the segment that was offered. `SegmentError` says
        what is wrong with it. `writable`: of this process's own worker, which lent it. `in_device`: the blocks lie
        elsewhere.
        """
        if not _LINUX:
            raise SegmentError("only Linux has memfd")
        memory = _map(fd, writable)
        view = memoryview(memory)
        shape = _check_header(view, nonce=nonce, epoch=epoch, layout=layout, in_device=in_device)
        self.nonce = nonce
        self.num_blocks = shape.num_blocks
        self.block_bytes = shape.block_bytes
        self._memory = memory
        self._blocks_offset = shape.blocks_offset
        self._populated = bytearray(shape.num_blocks)
        self._populate_advice = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
        self._generations = view[shape.generations_offset :][: 8 * shape.num_blocks].cast("Q")
        self._blocks = view[shape.blocks_offset :][: shape.num_blocks * shape.block_bytes]  # none if `in_device`
        self._fence = threading.Lock()

    @property
    def blocks(self) -> memoryview:
        """All blocks' bytes, one after another, writable where the mapping is."""
        return self._blocks

    def block(self, block_id: int) -> memoryview:
        """The block's bytes as they are at any moment, writable where the mapping is. `SegmentError` if there is no
        such block.
        """
        self.check((block_id,))
        return self._blocks[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]

    def check(self, block_ids: Sequence[int]) -> None:
        """`SegmentError` where there is no such block."""
        for block_id in (min(block_ids), max(block_ids)) if block_ids else ():
            if not 0 <= block_id < self.num_blocks:
                raise SegmentError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        """The blocks' generations now; loads before and after this call stay before and after it (module docstring)."""
        generations = self._generations
        with self._fence:
            values: list[int] = [generations[block_id] for block_id in block_ids]
        with self._fence:
            return values

    def populate(self, block_ids: Sequence[int]) -> None:
        """Puts the pages of blocks that are about to be read, or written, into this mapping, a call for each stretch of
        them in place of a fault for each page. Once for each block; blocks that exist.
        """
        missing = [block_id for block_id in block_ids if not self._populated[block_id]]
        for first, _, count in neighbors(missing):
            begin = self._blocks_offset + first * self.block_bytes
            begin -= begin % PAGE_BYTES
            end = self._blocks_offset + (first + count) * self.block_bytes
            with contextlib.suppress(OSError):  # an older kernel: pages come one by one
                self._memory.madvise(self._populate_advice, begin, end - begin)
            self._populated[first : first + count] = b"\1" * count


def take(
    fd: int, *, nonce: bytes, epoch: int, layout: KVLayout, writable: bool = False, in_device: bool = False
) -> MappedSegment:
    """`MappedSegment` of a descriptor that was received, which is closed in any case."""
    try:
        return MappedSegment(fd, nonce=nonce, epoch=epoch, layout=layout, writable=writable, in_device=in_device)
    finally:
        os.close(fd)


def _map(fd: int, writable: bool) -> mmap.mmap:
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise SegmentError("the memory is not sealed: its owner could shrink it under a reader")
        total_bytes = os.fstat(fd).st_size
        if total_bytes < PAGE_BYTES:
            raise SegmentError(f"a segment of {total_bytes} bytes is too short")
        return mmap.mmap(fd, total_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    except (OSError, ValueError) as error:
        raise SegmentError(f"cannot map the segment: {error}") from error


def _check_header(view: memoryview, *, nonce: bytes, epoch: int, layout: KVLayout, in_device: bool) -> _Shape:
    """What the header says, if it is the expected one and fits the memory."""
    magic, version, header_bytes, said_epoch, said_nonce, digest, *sizes = _HEADER.unpack_from(view)
    if (magic, version, header_bytes) != (MAGIC, VERSION, _HEADER.size):
        raise SegmentError("not a KV segment of this version")
    if said_nonce != nonce:
        raise SegmentError("another segment than the one that was offered: its nonce differs")
    if said_epoch != epoch:
        raise SegmentError(f"a segment of epoch {said_epoch}, not {epoch}")
    if digest != layout.digest().encode():
        raise SegmentError("a segment of another KV layout")
    shape = _shape_of(layout.block_bytes, sizes[0], in_device)
    expected = [shape.num_blocks, shape.block_bytes, shape.generations_offset, shape.blocks_offset, shape.total_bytes]
    if sizes != expected or shape.total_bytes != len(view):
        raise SegmentError(f"a segment of sizes {sizes} in {len(view)} bytes, expected {expected}")
    return shape
