"""A peer's blocks in device memory, mapped: what a pull reads, and what becomes of it when the peer dies.

A copy is begun, its end is waited for without holding up the worker's loop, and only then are generations compared: the
holder raises a block's generation in host memory before it launches whatever writes the block anew, so a copy into
which such a write could have come is seen. The next copy is begun before that: a device copies as fast as its host can
ask it to. Blocks of another size are put together by the copy itself (a repack).

The peer's death is noticed by its connection, then no further copy begins. Those under way are waited for before
the memory is unmapped: what it copied is refused or used by its generations, as any other. Physical memory lives as
long as somebody maps it, so such a copy reads what was there; should a device report an error all the same, the request
that pulls is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from ..layout import KVLayout, same_kv
from ..mapped.blocks import HostBlocks, MappedBlocks, Mapper, Reading, check_generations
from ..mapped.segment import MappedSegment, take
from ..ticket import HandoffRefused, RefusalReason, SegmentOffer
from ..transport import BlockFrame, PullRequest, RefFrame, WrittenBlocks
from ..uncancelled import to_its_end
from .memory import DeviceCopy, DeviceLost, DeviceMemory, PeerMemory

COPY_BYTES = 256 * 2**20
"""Of one copy: about 0.2 ms within an H100, as long as its beginning takes the host."""
UNDER_WAY = 2
"""Copies of a pull that were begun and have not ended."""
LOOKS = 32
"""How often a copy's end is looked for, in turn with everything else on the loop, before a thread waits for it."""


class DeviceMapper(Mapper):
    """Memory of others for a worker whose KV lies in device memory: theirs in device memory, with blocks of any size,
    or in host memory, with blocks like its own.
    """

    name = "cuda_ipc"

    def __init__(self, layout: KVLayout, memory: DeviceMemory) -> None:
        self._layout = layout
        self._memory = memory

    def takes(self, layout: bytes) -> bool:
        return same_kv(self._layout.to_bytes(), layout)

    def map(self, fd: int, device_fd: int | None, offer: SegmentOffer, *, epoch: int, layout: bytes) -> MappedBlocks:
        theirs = KVLayout.from_bytes(layout)
        if device_fd is None:
            # Of host memory only blocks like the own can be read; another layout is not the segment's and is refused.
            return HostBlocks(take(fd, nonce=offer.nonce, epoch=epoch, layout=self._layout))
        try:
            segment = take(fd, nonce=offer.nonce, epoch=epoch, layout=theirs, in_device=True)
            peer = self._memory.open(device_fd, theirs, segment.num_blocks)
        finally:
            os.close(device_fd)
        return DeviceBlocks(self._layout, theirs, segment, peer)


class DeviceBlocks(MappedBlocks):
    """See the module."""

    name = "cuda_ipc"
    any_block_size = True

    def __init__(self, mine: KVLayout, theirs: KVLayout, segment: MappedSegment, peer: PeerMemory) -> None:
        self.mine, self.theirs = mine, theirs
        self.segment = segment
        self._peer: PeerMemory | None = peer
        self._closed = False
        self._copies = 0
        """Under way."""

    def open(self, request: PullRequest) -> Reading:
        return _DeviceReading(self, request)

    def close(self) -> None:
        self._closed = True
        if not self._copies:
            self._unmap()

    def begin_copy(
        self, source_ids: Sequence[int], target_ids: Sequence[int], *, first_token: int, num_tokens: int
    ) -> DeviceCopy:
        """As `PeerMemory.begin_copy`; `end_copy` follows. `HandoffRefused` (PEER_LOST)."""
        if self._closed or self._peer is None or self.lost:
            raise HandoffRefused(RefusalReason.PEER_LOST, self.lost or "the holder closed its memory")
        try:
            copy = self._peer.begin_copy(source_ids, target_ids, first_token=first_token, num_tokens=num_tokens)
        except DeviceLost as error:
            raise self._lose(error) from error
        self._copies += 1
        return copy

    async def end_copy(self, copy: DeviceCopy) -> None:
        """When this returns, however it does, the copy writes nothing any more. `HandoffRefused` (PEER_LOST)."""
        try:
            await to_its_end(_ended(copy))
        except DeviceLost as error:
            raise self._lose(error) from error
        finally:
            self._copies -= 1
            if self._closed and not self._copies:
                self._unmap()

    def _lose(self, error: DeviceLost) -> HandoffRefused:
        self.lost = f"the holder's memory cannot be copied: {error}"
        return HandoffRefused(RefusalReason.PEER_LOST, self.lost)

    def _unmap(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.close()


async def _ended(copy: DeviceCopy) -> None:
    try:
        for _ in range(LOOKS):
            if copy.done():
                return
            await asyncio.sleep(0)
        await asyncio.to_thread(copy.wait)
    except BaseException:
        with contextlib.suppress(DeviceLost):
            copy.wait()  # the loop ends: whoever goes away now may free the blocks that it writes
        raise


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """Blocks that are being copied."""

    refs: Sequence[RefFrame]
    arrived_s: float
    copy: DeviceCopy | None
    """None: of none of them anything is wanted."""


class _DeviceReading(Reading):
    """The blocks of one pull. Blocks of both sides are counted within the sequence."""

    def __init__(self, blocks: DeviceBlocks, request: PullRequest) -> None:
        self._blocks = blocks
        self._request = request
        self._num_tokens = request.ticket.num_tokens
        if request.first_block < blocks.mine.blocks_for(self._num_tokens):
            self._first_token = request.first_block * blocks.mine.block_size
            self.first_block = self._first_token // blocks.theirs.block_size
        else:  # all is here, but for the end
            self._first_token = self._num_tokens
            self.first_block = blocks.theirs.blocks_for(self._num_tokens)
        self._begun = self._due = self.first_block
        """Of theirs: the next to be copied, and to be here."""
        self._told = request.first_block
        """Of mine: those before it are complete."""
        self._ids: list[int] = []
        """Of theirs, from `first_block` on."""
        self._arrived_s = 0.0
        """When the first of theirs was here that the next ones told have KV of; 0: none was."""

    async def take(self, refs: Sequence[RefFrame]) -> AsyncGenerator[tuple[BlockFrame, ...] | WrittenBlocks, None]:
        most = max(1, COPY_BYTES // self._blocks.theirs.block_bytes)
        parts = deque(refs[start : start + most] for start in range(0, len(refs), most))
        under_way: deque[_UnderWay] = deque()
        try:
            while parts or under_way:
                while parts and len(under_way) < UNDER_WAY:
                    under_way.append(self._begin(parts.popleft()))
                await self._end(under_way.popleft())
                written = self._complete()
                if written is not None:
                    yield written
                if parts:
                    await asyncio.sleep(0)  # others have the worker's loop
        finally:
            if under_way:
                await to_its_end(self._drop(under_way))

    def _begin(self, refs: Sequence[RefFrame]) -> _UnderWay:
        blocks, now_s = self._blocks, time.monotonic()
        self._check(refs)
        check_generations(blocks.segment, refs)
        self._ids += [ref.block_id for ref in refs]
        size, own = blocks.theirs.block_size, blocks.mine.block_size
        begin = max(self._first_token, self._begun * size)
        self._begun += len(refs)
        end = min(self._num_tokens, self._begun * size)
        if size == own:
            end = self._begun * size  # a whole block at the end, too
        if begin >= end:
            return _UnderWay(refs, now_s, None)
        base = begin - begin % math.lcm(size, own)
        source = _from(self._ids, self.first_block, base // size, -(-end // size))
        target = _from(self._request.into, self._request.first_block, base // own, -(-end // own))
        copy = blocks.begin_copy(source, target, first_token=begin - base, num_tokens=end - begin)
        return _UnderWay(refs, now_s, copy)

    async def _end(self, part: _UnderWay) -> None:
        if part.copy is not None:
            await self._blocks.end_copy(part.copy)
        check_generations(self._blocks.segment, part.refs)
        self._arrived_s = self._arrived_s or part.arrived_s
        self._due += len(part.refs)

    async def _drop(self, under_way: Sequence[_UnderWay]) -> None:
        """Nothing of them counts; they write nothing any more when this returns."""
        for part in under_way:
            if part.copy is not None:
                with contextlib.suppress(HandoffRefused):
                    await self._blocks.end_copy(part.copy)

    def _check(self, refs: Sequence[RefFrame]) -> None:
        """`HandoffRefused` (CORRUPT) unless these are the blocks that are due, and there are such blocks."""
        for index, ref in enumerate(refs, self._begun):
            if ref.ticket != self._request.ticket or ref.block_index != index:
                text = f"block {ref.block_index} of {ref.ticket.prefill_key} came, {index} was due"
                raise HandoffRefused(RefusalReason.CORRUPT, text)
            if not 0 <= ref.block_id < self._blocks.segment.num_blocks:
                text = f"block_id: {ref.block_id} is not in 0…{self._blocks.segment.num_blocks - 1}"
                raise HandoffRefused(RefusalReason.CORRUPT, text)
        last = self._blocks.theirs.blocks_for(self._num_tokens)
        if self._begun + len(refs) > last:
            raise HandoffRefused(RefusalReason.CORRUPT, f"block {last} came, {last} blocks are all there are")

    def _complete(self) -> WrittenBlocks | None:
        """Those of mine that have all their KV now and did not before."""
        own, first = self._blocks.mine.block_size, self._told
        here = min(self._num_tokens, self._due * self._blocks.theirs.block_size)
        stop = self._blocks.mine.blocks_for(here) if here == self._num_tokens else here // own
        if stop <= first:
            return None
        now_s, arrived_s = time.monotonic(), self._arrived_s
        self._told, self._arrived_s = stop, 0.0
        begin = first - self._request.first_block
        return WrittenBlocks(
            ticket=self._request.ticket,
            first_block=first,
            block_ids=self._request.into[begin : begin + stop - first],
            arrived_age_s=now_s - arrived_s,
            written_age_s=0.0,
        )


def _from(ids: Sequence[int], first: int, begin: int, end: int) -> list[int]:
    """Ids of blocks `begin`…`end` - 1, of which `ids` has those from `first` on; 0 for the others."""
    return [ids[index - first] if index >= first else 0 for index in range(begin, end)]
