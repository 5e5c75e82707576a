"""The seam between what mapped memory promises (`segment`: generations, raised before reuse, compared after each copy)
and where its blocks lie: in host memory, here, or in a device's (`kvtransfer.cuda_ipc`).
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence

from ..layout import KVLayout
from ..ticket import HandoffRefused, RefusalReason, SegmentOffer
from ..transport import BlockFrame, PullRequest, RefFrame, WrittenBlocks
from .copies import BlockCopies
from .segment import MappedSegment, SegmentError, take

UNBROKEN_BYTES = 16 * 2**20
"""Copied in about one turn of the worker's loop: a millisecond. A turn costs 0.1 to 0.3 ms."""


class Reading(ABC):
    """One pull's way out of a peer's mapped memory."""

    first_block: int
    """What to ask the holder for: index of the first wanted block, as the holder counts."""

    @abstractmethod
    def take(self, refs: Sequence[RefFrame]) -> AsyncGenerator[tuple[BlockFrame, ...] | WrittenBlocks, None]:
        """The blocks that `refs` name, in order: to be copied, with a `verify`, or written where the request wants
        them, and verified. `HandoffRefused`: WRONG_GENERATION where one is gone, PEER_LOST where the memory is. When it
        is closed, nothing is written any more.
        """


class MappedBlocks(ABC):
    """A peer's KV memory, mapped."""

    name: str
    """How a pull of them is called."""
    any_block_size: bool = False
    """Whether blocks of another size than this worker's come out as its own."""
    lost: str = ""
    """Why nothing can be read any more; empty: it can."""

    @abstractmethod
    def open(self, request: PullRequest) -> Reading:
        """Once for each pull; may be used after `close`, which then says how it goes on."""

    @abstractmethod
    def close(self) -> None:
        """The peer is gone, or the mapping is not wanted any more; idempotent, never waits."""


class Mapper(ABC):
    """How a worker maps the memory of others, by where its own lies."""

    name: str
    """Of the transport that this makes."""

    @abstractmethod
    def takes(self, layout: bytes) -> bool:
        """Whether blocks of this layout (`KVLayout.to_bytes`) can be read."""

    @abstractmethod
    def map(self, fd: int, device_fd: int | None, offer: SegmentOffer, *, epoch: int, layout: bytes) -> MappedBlocks:
        """Maps memory whose descriptors were received; closes them in any case. `SegmentError`: why it cannot."""


class HostMapper(Mapper):
    """Host memory with blocks like this worker's own."""

    name = "mapped"

    def __init__(self, layout: KVLayout, into: memoryview | None = None) -> None:
        """`into`: this worker's own blocks, one after another, writable: pulls that say where their blocks go are
        written there. None: whoever pulls writes.
        """
        self._layout = layout
        self._layout_bytes = layout.to_bytes()
        self._into = into

    def takes(self, layout: bytes) -> bool:
        return layout == self._layout_bytes

    def map(self, fd: int, device_fd: int | None, offer: SegmentOffer, *, epoch: int, layout: bytes) -> MappedBlocks:
        if device_fd is not None:
            os.close(device_fd)
            os.close(fd)
            raise SegmentError("its KV lies in a GPU's memory, this worker's does not")
        return HostBlocks(take(fd, nonce=offer.nonce, epoch=epoch, layout=self._layout), self._into)


class HostBlocks(MappedBlocks):
    """Blocks of another process in host memory. Pulls that read them go on to their end whatever becomes of the peer:
    the mapping lives as long as somebody reads it.
    """

    name = "mapped"

    def __init__(self, segment: MappedSegment, into: memoryview | None = None) -> None:
        """`into`: as for `HostMapper`."""
        self._segment = segment
        self._copies = None if into is None else BlockCopies(segment.blocks, into, segment.block_bytes)

    def open(self, request: PullRequest) -> Reading:
        if self._copies is None or not request.into:
            return _HostReading(self._segment, request.first_block)
        return _HostWriting(self._segment, request, self._copies)

    def close(self) -> None:
        """The memory goes with its last reader."""


class _HostReading(Reading):
    def __init__(self, segment: MappedSegment, first_block: int) -> None:
        self._segment = segment
        self.first_block = first_block

    async def take(self, refs: Sequence[RefFrame]) -> AsyncGenerator[tuple[BlockFrame, ...] | WrittenBlocks, None]:
        for turn, part in enumerate(_turns(refs, self._segment.block_bytes)):
            if turn:
                await asyncio.sleep(0)  # the worker's loop has others to serve
            yield frames_of(self._segment, part)


class _HostWriting(Reading):
    """Copies blocks to where the request wants them, and nowhere else."""

    def __init__(self, segment: MappedSegment, request: PullRequest, copies: BlockCopies) -> None:
        self._segment = segment
        self._request = request
        self._copies = copies
        self._written = 0
        """Blocks."""
        self.first_block = request.first_block

    async def take(self, refs: Sequence[RefFrame]) -> AsyncGenerator[tuple[BlockFrame, ...] | WrittenBlocks, None]:
        for turn, part in enumerate(_turns(refs, self._segment.block_bytes)):
            if turn:
                await asyncio.sleep(0)  # as above
            yield self._write(part)

    def _write(self, refs: Sequence[RefFrame]) -> WrittenBlocks:
        arrived_s, request = time.monotonic(), self._request
        due = self.first_block + self._written
        targets = request.into[self._written : self._written + len(refs)]
        in_order = [ref.block_index for ref in refs] == list(range(due, due + len(refs)))
        tickets = {id(ref.ticket): ref.ticket for ref in refs}.values()  # one object, of one message
        if not in_order or len(targets) != len(refs) or any(ticket != request.ticket for ticket in tickets):
            raise HandoffRefused(RefusalReason.CORRUPT, f"not the blocks of {request.ticket.decode_key}")
        block_ids = [ref.block_id for ref in refs]
        _prepare(self._segment, refs, block_ids)
        self._copies.copy(block_ids, targets)
        check_generations(self._segment, refs)
        self._written += len(refs)
        now_s = time.monotonic()
        return WrittenBlocks(
            ticket=request.ticket,
            first_block=due,
            block_ids=targets,
            arrived_age_s=now_s - arrived_s,
            written_age_s=0.0,
        )


def _turns(refs: Sequence[RefFrame], block_bytes: int) -> Iterator[Sequence[RefFrame]]:
    """What may be copied without a break, in shares as equal as can be: a small last one would cost a turn."""
    turns = max(1, round(len(refs) * block_bytes / UNBROKEN_BYTES))
    most = max(1, -(-len(refs) // turns))
    return (refs[start : start + most] for start in range(0, len(refs), most))


def _prepare(segment: MappedSegment, refs: Sequence[RefFrame], block_ids: Sequence[int]) -> None:
    """Before a copy: the blocks are those that were offered, and their pages are in the mapping. `HandoffRefused`."""
    try:
        segment.check(block_ids)
    except SegmentError as error:
        raise HandoffRefused(RefusalReason.CORRUPT, str(error)) from error
    check_generations(segment, refs)
    segment.populate(block_ids)


def check_generations(segment: MappedSegment, refs: Sequence[RefFrame]) -> None:
    """After a copy: `HandoffRefused` (WRONG_GENERATION) where a block was, or may have been, written meanwhile."""
    now = segment.generations([ref.block_id for ref in refs])
    if now == [ref.generation for ref in refs]:
        return
    for generation, ref in zip(now, refs, strict=True):
        if generation != ref.generation:
            text = f"block {ref.block_id} is of generation {generation} now, {ref.generation} was offered"
            raise HandoffRefused(RefusalReason.WRONG_GENERATION, text)


def frames_of(segment: MappedSegment, refs: Sequence[RefFrame]) -> tuple[BlockFrame, ...]:
    """The blocks that `refs` name, to be copied now. `HandoffRefused`: WRONG_GENERATION where one is gone."""
    block_ids = [ref.block_id for ref in refs]

    def verify() -> None:
        check_generations(segment, refs)

    _prepare(segment, refs, block_ids)
    return tuple(
        BlockFrame(
            ticket=ref.ticket,
            block_index=ref.block_index,
            generation=ref.generation,
            payload=segment.block(ref.block_id),
            checksum=None,
            verify=verify,
        )
        for ref in refs
    )
