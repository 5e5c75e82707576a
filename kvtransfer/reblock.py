"""Blocks of one size out of blocks of another, on the reader's side of a handoff.

The holder sends its blocks as they are; a reader whose blocks are larger or smaller puts theirs together. What is asked
for begins with the holder's block in which the reader's first missing token lies. A block is complete when the last of
the holder's blocks that it needs has come; slots that the holder does not have are 0.

1. `hello` goes the usual way and tells the peer's block size. Peers with the reader's own are not touched here.
2. `pull` from the others goes over gRPC, whatever joins the two: who copies blocks as they are (mapped host memory, a
   process that moves KV) cannot; a device that copies another's memory can, and is left to do it (`own`). Every block
   is checked as it comes, and gets a checksum of its own as it goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from .layout import DTYPE_BYTES, MAX_BLOCK_SIZE, KVLayout
from .meetings import MAX_MET_PEERS
from .ticket import HandoffRefused, Hello, Peer, RefusalReason, Ticket
from .transport import BlockFrame, EndFrame, KVFrames, KVTransport, PullRequest, WrittenBlocks
from .wire import check_blocks, checksum_of


def largest_block_bytes(layout: KVLayout) -> int:
    """Of a block of any size that is allowed, holding this KV: bounds what a peer may send in one message."""
    return replace(layout, block_size=MAX_BLOCK_SIZE).block_bytes


class Reblocker:
    """The blocks of one pull. Pure. Blocks of both sides are counted within the sequence."""

    def __init__(self, mine: KVLayout, theirs: KVLayout, *, first_block: int, num_tokens: int) -> None:
        """`first_block`: of mine, that is wanted first; `num_tokens`: of the sequence."""
        self._mine, self._theirs = mine, theirs
        self._num_tokens = num_tokens
        self._next = first_block
        """Of mine, that is not complete yet."""
        self._parts: dict[int, bytearray] = {}
        first_token = min(first_block * mine.block_size, num_tokens)
        self.first_wanted: int = first_token // theirs.block_size
        """Of theirs."""
        self._due = self.first_wanted

    def add(self, index: int, payload: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Takes their next block; yields those of mine that it completes, with their index. `HandoffRefused` (CORRUPT)
        for a block that is not due.
        """
        if index != self._due:
            raise HandoffRefused(RefusalReason.CORRUPT, f"block {index} came, {self._due} was due")
        self._due += 1
        size, own = self._theirs.block_size, self._mine.block_size
        begin, end = index * size, (index + 1) * size
        last = self._mine.blocks_for(self._num_tokens)
        for block in range(max(self._next, begin // own), min(last, -(-end // own))):
            part = self._parts.setdefault(block, bytearray(self._mine.block_bytes))
            first, stop = max(begin, block * own), min(end, (block + 1) * own)
            self._copy(payload, first - begin, part, first - block * own, stop - first)
        while self._next < last and end >= min((self._next + 1) * own, self._num_tokens):
            yield self._next, memoryview(self._parts.pop(self._next))
            self._next += 1

    def _copy(self, source: memoryview, source_slot: int, target: bytearray, target_slot: int, slots: int) -> None:
        """The same slots of every layer and head."""
        parts = zip(self._theirs.groups, self._theirs.segments(), self._mine.segments(), strict=True)
        for group, theirs, mine in parts:
            slot_bytes = group.head_dim * DTYPE_BYTES[group.dtype]
            held = np.frombuffer(source, np.uint8, theirs.length_bytes, theirs.offset_bytes)
            wanted = np.frombuffer(target, np.uint8, mine.length_bytes, mine.offset_bytes)
            planes = held.reshape(-1, self._theirs.block_size, slot_bytes)  # [layer x 2 x kv_head, slot, byte]
            into = wanted.reshape(-1, self._mine.block_size, slot_bytes)
            into[:, target_slot : target_slot + slots] = planes[:, source_slot : source_slot + slots]


class ReblockingTransport(KVTransport):
    """See the module."""

    def __init__(
        self,
        usual: KVTransport,
        layout: KVLayout,
        *,
        plain: KVTransport | None,
        own: Callable[[Peer], bool] = lambda peer: False,
    ) -> None:
        """`usual`: to peers with blocks like the reader's, `layout`. `plain`: yields others' blocks as they are, of up
        to `largest_block_bytes`; None: such peers are refused. `own`: whether `usual`, which has met the peer, yields
        blocks like the reader's whatever the peer's are.
        """
        self._usual = usual
        self._plain = plain
        self._own = own
        self._layout = layout
        self._others: OrderedDict[Peer, KVLayout] = OrderedDict()

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        theirs = await self._usual.hello(peer, mine, timeout_s=timeout_s)
        try:
            layout = KVLayout.from_bytes(theirs.layout)
        except ValueError:
            return theirs  # of another version, or nonsense: the caller refuses it
        self._others.pop(peer, None)
        if layout.identity() == self._layout.identity() and layout.block_size != self._layout.block_size:
            if self._plain is None and not self._own(peer):
                ours, other = self._layout.block_size, layout.block_size
                text = f"blocks of {peer.worker_id} have {other} slots, not {ours}: mapped memory needs equal ones"
                raise HandoffRefused(RefusalReason.LAYOUT_MISMATCH, text)
            self._others[peer] = layout
            while len(self._others) > MAX_MET_PEERS:
                self._others.popitem(last=False)
        return theirs

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        theirs = self._others.get(peer)
        if theirs is None or self._plain is None or self._own(peer):
            frames = self._usual.pull(peer, request, timeout_s=timeout_s)
        else:
            frames = self._reblocked(self._plain, theirs, peer, request, timeout_s)
        async with aclosing(frames):
            async for came in frames:
                yield came

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._usual.confirm(peer, ticket, timeout_s=timeout_s)

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._usual.abort(peer, ticket, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._usual.close()
        if self._plain is not None:
            await self._plain.close()

    async def _reblocked(
        self, plain: KVTransport, theirs: KVLayout, peer: Peer, request: PullRequest, timeout_s: float
    ) -> AsyncGenerator[KVFrames, None]:
        ticket, sent_bytes = request.ticket, 0
        blocks = Reblocker(self._layout, theirs, first_block=request.first_block, num_tokens=ticket.num_tokens)
        asked = replace(request, first_block=blocks.first_wanted, into=())
        async with aclosing(plain.pull(peer, asked, timeout_s=timeout_s)) as frames:
            async for came in frames:
                if isinstance(came, EndFrame):
                    yield replace(came, total_bytes=sent_bytes)
                    return
                if isinstance(came, WrittenBlocks):
                    raise HandoffRefused(RefusalReason.INVALID, "blocks of another size were written as they are")
                made = self._made(blocks, ticket, theirs, came, checksum=request.checksum)
                sent_bytes += sum(len(frame.payload) for frame in made)
                if made:
                    yield made

    def _made(
        self, blocks: Reblocker, ticket: Ticket, theirs: KVLayout, came: Sequence[BlockFrame], *, checksum: bool
    ) -> tuple[BlockFrame, ...]:
        """The reader's blocks that some of the holder's complete."""
        check_blocks(came, theirs.block_bytes, checksum=checksum)
        made = []
        for frame in came:
            if frame.ticket != ticket:
                raise HandoffRefused(RefusalReason.CORRUPT, f"a block of {frame.ticket.prefill_key} came")
            for index, payload in blocks.add(frame.block_index, frame.payload):
                whole = replace(frame, block_index=index, payload=payload, checksum=None)
                made.append(replace(whole, checksum=checksum_of(whole)) if checksum else whole)
        return tuple(made)
