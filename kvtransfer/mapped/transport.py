"""Reader's end of mapped memory: control over gRPC, bytes straight out of the holder's memory.

1. `hello` goes over gRPC; where the answer offers a segment, its descriptor is fetched and mapped, once per life of a
   peer. Whether the two share a host is not guessed from names: the nonce of the answer stands in the mapping or not.
2. `pull` asks for references; what they name is copied out of the mapping, and their generations are compared after
   the copies (`blocks`: `BlockFrame`s whose payload is the holder's memory, or blocks that a device has copied). There
   is no checksum: no wire lies between.
3. A peer that dies closes its socket: its mapping is dropped at once, so that the memory of the dead is not kept.
   What becomes of pulls that read it is the mapping's to say.

Without a mapping `auto` pulls over gRPC, and no request fails for it; `required` refuses the peer when they meet. What
may pass (no descriptor was left, the owner was busy) is tried again, after a pause that doubles.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from ..grpc_transport import GrpcKVTransport
from ..layout import KVLayout
from ..ticket import HandoffRefused, Hello, Peer, RefusalReason, Ticket
from ..transport import EndFrame, KVFrames, KVTransport, PullRequest
from .blocks import HostMapper, MappedBlocks, Mapper
from .fd_passing import fetch
from .segment import SegmentBusy, SegmentError

log = logging.getLogger(__name__)

MAX_MAPPINGS = 256
MAX_UNMAPPABLE = 1024
RETRY_FIRST_S, RETRY_MOST_S = 0.1, 30.0


@dataclass(frozen=True, slots=True)
class _Mapping:
    blocks: MappedBlocks
    theirs: Hello
    connection: socket.socket
    """Open as long as the owner lives and the mapping is wanted."""


@dataclass(frozen=True, slots=True)
class _Unmappable:
    why: str
    theirs: Hello
    """What the peer said of itself."""
    pause_s: float
    """After this try; inf: there will be no other."""
    again_s: float
    """When the next try is due, on the loop's clock."""

    @property
    def passing(self) -> bool:
        return math.isfinite(self.pause_s)


class MappedKVTransport(KVTransport):
    """See the module. Everything but the bytes of blocks is the `control` transport's."""

    def __init__(
        self,
        control: GrpcKVTransport,
        layout: KVLayout,
        *,
        mapper: Mapper | None = None,
        required: bool = False,
        fetch_timeout_s: float = 1.0,
        max_mappings: int = MAX_MAPPINGS,
    ) -> None:
        """`mapper`: of host memory with blocks of `layout`, unless another is given."""
        self._control = control
        self._mapper = HostMapper(layout) if mapper is None else mapper
        self._required = required
        self._fetch_timeout_s = fetch_timeout_s
        self._max_mappings = max_mappings
        self._mappings: OrderedDict[Peer, _Mapping] = OrderedDict()
        self._unmappable: OrderedDict[Peer, _Unmappable] = OrderedDict()
        """Peers that were tried and are not mapped."""
        self._retries: dict[Peer, asyncio.Task[None]] = {}

    @property
    def mapped_peers(self) -> int:
        """Peers whose memory is mapped now."""
        return len(self._mappings)

    def reblocks(self, peer: Peer) -> bool:
        """Whether `pull` yields blocks of this worker's size whatever the peer's are."""
        mapping = self._mappings.get(peer)
        return mapping is not None and mapping.blocks.any_block_size

    async def hello(self, peer: Peer, mine: Hello, *, timeout_s: float) -> Hello:
        theirs = await self._control.hello(peer, mine, timeout_s=timeout_s)
        if theirs.epoch != peer.epoch or not self._mapper.takes(theirs.layout):
            return theirs  # not the life, or not the memory, that pulls would name: the caller refuses it by its reason
        if peer not in self._mappings and self._due(peer):
            await self._try_to_map(peer, theirs)
        if self._required and peer not in self._mappings:
            tried = self._unmappable.get(peer)
            why = "it closed its memory" if tried is None else tried.why
            demanded, whose = f"transport {self._mapper.name!r} is demanded", f"the KV memory of {peer.worker_id}"
            text = f"{demanded}, but {whose} cannot be mapped: {why}"
            passing = tried is not None and tried.passing
            raise HandoffRefused(RefusalReason.PEER_LOST if passing else RefusalReason.TRANSPORT_MISMATCH, text)
        return theirs

    async def pull(self, peer: Peer, request: PullRequest, *, timeout_s: float) -> AsyncGenerator[KVFrames, None]:
        mapping = self._mappings.get(peer)
        if mapping is not None and mapping.blocks.lost:
            self._drop(peer)
            self._remember_unmappable(peer, mapping.theirs, SegmentBusy(mapping.blocks.lost))
            mapping = None
        if mapping is None:
            if self._required:
                tried = self._unmappable.get(peer)
                why = "" if tried is None else f": {tried.why}"
                raise HandoffRefused(RefusalReason.PEER_LOST, f"the mapping of {peer.worker_id}'s memory is gone{why}")
            self._retry_beside(peer)
            async with aclosing(self._control.pull(peer, request, timeout_s=timeout_s)) as frames:
                async for frame in frames:
                    yield frame
            return
        self._mappings.move_to_end(peer)
        reading = mapping.blocks.open(request)
        by_reference = replace(request, first_block=reading.first_block, mapped=True, checksum=False)
        async with aclosing(self._control.references(peer, by_reference, timeout_s=timeout_s)) as messages:
            async for refs in messages:
                if isinstance(refs, EndFrame):
                    yield replace(refs, transport=mapping.blocks.name)
                    return
                async with aclosing(reading.take(refs)) as taken:
                    async for came in taken:
                        yield came

    async def confirm(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._control.confirm(peer, ticket, timeout_s=timeout_s)

    async def abort(self, peer: Peer, ticket: Ticket, *, timeout_s: float) -> None:
        await self._control.abort(peer, ticket, timeout_s=timeout_s)

    async def close(self) -> None:
        for task in (retries := tuple(self._retries.values())):
            task.cancel()
        await asyncio.gather(*retries, return_exceptions=True)
        for peer in list(self._mappings):
            self._drop(peer)
        await self._control.close()

    # Within

    def _due(self, peer: Peer) -> bool:
        """Whether the peer was never tried, or is to be tried again now."""
        tried = self._unmappable.get(peer)
        return tried is None or asyncio.get_running_loop().time() >= tried.again_s

    def _retry_beside(self, peer: Peer) -> None:
        """Tries again, where it is due, while pulls go over gRPC; at most one try a peer at a time."""
        tried = self._unmappable.get(peer)
        if tried is None or peer in self._retries or not self._due(peer):
            return
        task = self._retries[peer] = asyncio.create_task(self._try_to_map(peer, tried.theirs))
        task.add_done_callback(lambda _: self._retries.pop(peer))

    async def _try_to_map(self, peer: Peer, theirs: Hello) -> None:
        offer = theirs.offer
        try:
            if offer is None:
                raise SegmentError("it does not share it")
            connection, fd, device_fd = await fetch(offer, timeout_s=self._fetch_timeout_s)
        except SegmentError as error:
            self._remember_unmappable(peer, theirs, error)
            return
        try:
            blocks = self._mapper.map(fd, device_fd, offer, epoch=peer.epoch, layout=theirs.layout)
        except SegmentError as error:
            connection.close()
            self._remember_unmappable(peer, theirs, error)
            return
        self._unmappable.pop(peer, None)
        if peer in self._mappings:  # another try was faster
            connection.close()
            blocks.close()
            return
        self._mappings[peer] = _Mapping(blocks, theirs, connection)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._drop, peer)
        while len(self._mappings) > self._max_mappings:
            self._drop(next(iter(self._mappings)))

    def _remember_unmappable(self, peer: Peer, theirs: Hello, error: SegmentError) -> None:
        last = self._unmappable.get(peer)
        if last is None:
            log.info("KV of %s is pulled over gRPC: %s", peer.worker_id, error)
        pause_s = math.inf
        if isinstance(error, SegmentBusy):
            pause_s = RETRY_FIRST_S if last is None else min(2 * last.pause_s, RETRY_MOST_S)
        again_s = asyncio.get_running_loop().time() + pause_s
        self._unmappable[peer] = _Unmappable(str(error), theirs, pause_s, again_s)
        while len(self._unmappable) > MAX_UNMAPPABLE:
            self._unmappable.popitem(last=False)

    def _drop(self, peer: Peer) -> None:
        """The owner closed its end (it never says anything), or the mapping is not wanted any more."""
        mapping = self._mappings.pop(peer)
        asyncio.get_running_loop().remove_reader(mapping.connection.fileno())
        mapping.connection.close()
        mapping.blocks.close()
