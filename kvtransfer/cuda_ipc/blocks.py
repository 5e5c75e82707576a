"""A peer's blocks in device memory, mapped: what a pull reads, and what becomes of it when the peer dies.

A copy is begun, its end is waited for without holding up the worker's loop, and only then are generations compared: the
holder raises a block's generation in host memory before it launches whatever writes the block anew, so a copy into
which such a write could have come is seen. Blocks of another size are put together by the copy itself (a repack).

The peer's death is noticed by its connection, then no further copy begins. One that is under way is waited for before
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
from collections.abc import AsyncGenerator, Sequence

from ..layout import KVLayout, same_kv
from ..mapped.blocks import HostBlocks, MappedBlocks, Mapper, Reading, check_generations
from ..mapped.segment import MappedSegment, take
from ..ticket import HandoffRefused, RefusalReason, SegmentOffer
from ..transport import BlockFrame, PullRequest, RefFrame, WrittenBlocks
from .memory import DeviceCopy, DeviceLost, DeviceMemory, PeerMemory

COPY_BYTES = 64 * 2**20
"""Copied at a time; then others have the worker's loop."""
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

    async def copy(
        self, source_ids: Sequence[int], target_ids: Sequence[int], *, first_token: int, num_tokens: int
    ) -> None:
        """As `PeerMemory.begin_copy`, to its end. `HandoffRefused` (PEER_LOST). When this returns, however it does,
        nothing is written any more.
        """
        if self._closed or self._peer is None or self.lost:
            raise HandoffRefused(RefusalReason.PEER_LOST, self.lost or "the holder closed its memory")
        self._copies += 1
        try:
            await _to_its_end(
                self._peer.begin_copy(source_ids, target_ids, first_token=first_token, num_tokens=num_tokens)
            )
        except DeviceLost as error:
            self.lost = f"the holder's memory cannot be copied: {error}"
            raise HandoffRefused(RefusalReason.PEER_LOST, self.lost) from error
        finally:
            self._copies -= 1
            if self._closed and not self._copies:
                self._unmap()

    def _unmap(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.close()


async def _to_its_end(copy: DeviceCopy) -> None:
    try:
        for _ in range(LOOKS):
            if copy.done():
                return
            await asyncio.sleep(0)
        await asyncio.to_thread(copy.wait)
    except BaseException:
        with contextlib.suppress(DeviceLost):
            copy.wait()  # whoever goes away now may free the blocks that it writes
        raise


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
        self._due = self.first_block
        """Of theirs."""
        self._told = request.first_block
        """Of mine: those before it are complete."""
        self._ids: list[int] = []
        """Of theirs, from `first_block` on."""
        self._arrived_s = 0.0
        """When the first of theirs was here that the next ones told have KV of; 0: none was."""

    async def take(self, refs: Sequence[RefFrame]) -> AsyncGenerator[tuple[BlockFrame, ...] | WrittenBlocks, None]:
        most = max(1, COPY_BYTES // self._blocks.theirs.block_bytes)
        for start in range(0, len(refs), most):
            if start:
                await asyncio.sleep(0)
            self._arrived_s = self._arrived_s or time.monotonic()
            await self._copy(refs[start : start + most])
            written = self._complete()
            if written is not None:
                yield written

    async def _copy(self, refs: Sequence[RefFrame]) -> None:
        blocks = self._blocks
        self._check(refs)
        check_generations(blocks.segment, refs)
        self._ids += [ref.block_id for ref in refs]
        size, own = blocks.theirs.block_size, blocks.mine.block_size
        begin = max(self._first_token, self._due * size)
        end = min(self._num_tokens, (self._due + len(refs)) * size)
        if size == own:
            end = (self._due + len(refs)) * size  # a whole block at the end, too
        if begin < end:
            base = begin - begin % math.lcm(size, own)
            source = _from(self._ids, self.first_block, base // size, -(-end // size))
            target = _from(self._request.into, self._request.first_block, base // own, -(-end // own))
            await blocks.copy(source, target, first_token=begin - base, num_tokens=end - begin)
        check_generations(blocks.segment, refs)
        self._due += len(refs)

    def _check(self, refs: Sequence[RefFrame]) -> None:
        """`HandoffRefused` (CORRUPT) unless these are the blocks that are due, and there are such blocks."""
        for index, ref in enumerate(refs, self._due):
            if ref.ticket != self._request.ticket or ref.block_index != index:
                text = f"block {ref.block_index} of {ref.ticket.prefill_key} came, {index} was due"
                raise HandoffRefused(RefusalReason.CORRUPT, text)
            if not 0 <= ref.block_id < self._blocks.segment.num_blocks:
                text = f"block_id: {ref.block_id} is not in 0…{self._blocks.segment.num_blocks - 1}"
                raise HandoffRefused(RefusalReason.CORRUPT, text)
        last = self._blocks.theirs.blocks_for(self._num_tokens)
        if self._due + len(refs) > last:
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
