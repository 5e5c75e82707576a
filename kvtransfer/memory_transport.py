"""A transport inside one process, for tests and the simulator: real wire messages, no sockets, faults on demand."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from . import wire
from .ticket import HandoffRefused, Hello, Peer, RefusalReason, Ticket
from .transport import BlockFrame, EndFrame, KVFrames, KVSource, KVTransport, PullRequest


@dataclass(slots=True, kw_only=True)
class Faults:
    """What goes wrong next. Each counter is used up by what it breaks."""

    break_after_blocks: int | None = None
    """The next pull breaks (PEER_LOST) after so many blocks."""
    corrupt_blocks: set[int] = field(default_factory=set)
    """Indices of blocks whose payload loses a bit, once each."""
    lost_hellos: int = 0
    lost_confirms: int = 0
    """Confirmations that never arrive."""
    lost_aborts: int = 0


class MemoryKVTransport(KVTransport):
    """Reaches the sources that were added, by `Peer.kv_address`; an address that nobody has is PEER_LOST."""

    def __init__(self) -> None:
        self._sources: dict[str, KVSource] = {}
        self.faults = Faults()
        self.pulls = 0
        """Pulls started so far."""
        self.hellos = 0

    def add(self, address: str, source: KVSource) -> None:
        """Puts a source on the network, or another in its place."""
        self._sources[address] = source

    def remove(self, address: str) -> None:
        """Takes a source off the network, as its death would; idempotent."""
        self._sources.pop(address, None)

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        self.hellos += 1
        if self.faults.lost_hellos > 0:
            self.faults.lost_hellos -= 1
            raise HandoffRefused(RefusalReason.DEADLINE, "the Hello was lost")
        theirs = await self._source(peer).hello(wire.decode_hello(wire.encode_hello(mine)))
        return wire.decode_hello_reply(wire.encode_hello(theirs))

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        self.pulls += 1
        left, self.faults.break_after_blocks = self.faults.break_after_blocks, None
        request = wire.decode_pull(wire.encode_pull(request))
        async with aclosing(self._source(peer).open_pull(request)) as items:
            async for item in items:
                if isinstance(item, EndFrame):
                    message = wire.encode_end(item)
                else:
                    message = wire.encode_blocks(item.frames)
                    item.verify()
                frames = wire.decode_frames(message)
                if isinstance(frames[0], EndFrame):
                    yield replace(frames[0], transport="memory")
                    return
                blocks = tuple(self._spoil(frame) for frame in frames if isinstance(frame, BlockFrame))
                if left is not None and left < len(blocks):
                    if left:
                        yield blocks[:left]
                    raise HandoffRefused(RefusalReason.PEER_LOST, "the connection broke")
                left = None if left is None else left - len(blocks)
                yield blocks

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        if self.faults.lost_confirms > 0:
            self.faults.lost_confirms -= 1
            raise HandoffRefused(RefusalReason.DEADLINE, "the confirmation was lost")
        await self._source(peer).confirm(wire.decode_ticket(wire.encode_ticket(ticket)))

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        if self.faults.lost_aborts > 0:
            self.faults.lost_aborts -= 1
            raise HandoffRefused(RefusalReason.DEADLINE, "the abort was lost")
        await self._source(peer).abort_ticket(wire.decode_ticket(wire.encode_ticket(ticket)))

    async def close(self) -> None:
        self._sources.clear()

    def _source(self, peer: Peer) -> KVSource:
        source = self._sources.get(peer.kv_address)
        if source is None:
            raise HandoffRefused(RefusalReason.PEER_LOST, f"nobody at {peer.kv_address}")
        return source

    def _spoil(self, frame: BlockFrame) -> BlockFrame:
        if frame.block_index not in self.faults.corrupt_blocks:
            return frame
        self.faults.corrupt_blocks.discard(frame.block_index)
        payload = bytearray(frame.payload)
        payload[len(payload) // 2] ^= 1
        return BlockFrame(
            ticket=frame.ticket,
            block_index=frame.block_index,
            generation=frame.generation,
            payload=memoryview(payload),
            checksum=frame.checksum,
        )
