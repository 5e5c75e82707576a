"""The memory seam of the handoff: how a transport reads and writes blocks of KV, whatever device holds them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future

from .cuda_ipc.memory import DeviceMemory
from .layout import KVLayout
from .mapped.segment import KVSegment
from .uncancelled import to_its_end


class BlockRead(ABC):
    """Blocks that are on their way out of a device's memory (`KVStore.begin_read`)."""

    async def come(self) -> None:
        """Waits for other processes that have a part in it, if any do; raises what went wrong there."""
        return None

    @abstractmethod
    def views(self) -> list[memoryview]:
        """The blocks' bytes in order, once they are here; may block for as long as a copy takes, after `come`. Valid
        until `end`.
        """

    @abstractmethod
    def end(self) -> None:
        """The bytes are not wanted any more; at any time, idempotent."""


class KVStore(ABC):
    """KV memory of one engine, addressed by block id. Calls come from transport threads while the engine computes; a
    caller may touch only blocks that it holds in the engine's block pool.
    """

    layout: KVLayout
    num_blocks: int
    segment: KVSegment | None = None
    """The memory itself, where it is host memory laid out to be shared, or what is in host memory of a device's
    (`KVSegment.in_device`); None: neither."""
    device_memory: DeviceMemory | None = None
    """The memory itself, where it is a device's that other processes can map."""

    @property
    def host_blocks(self) -> memoryview | None:
        """All blocks' bytes, one after another and writable, where they are host memory laid out so."""
        return None if self.segment is None or self.segment.in_device else self.segment.blocks

    @abstractmethod
    def read_block(self, block_id: int) -> memoryview:
        """The block's bytes (length `layout.block_bytes`), without a copy where the device allows it. Does not block
        for long. The view is valid only while the caller holds the block.
        """

    @abstractmethod
    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        """Overwrites the block. ValueError if `payload` is not exactly `layout.block_bytes` long."""

    def read_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        """As `read_block` of each, in one go where that is cheaper. The views are valid until the next `await` of the
        one loop that calls this.
        """
        return [self.read_block(block_id) for block_id in block_ids]

    async def fetch_blocks(self, block_ids: Sequence[int]) -> list[memoryview]:
        """As `read_blocks`, without holding the loop up where other processes have a part in it: the views are the
        caller's own then, and what was read is what the blocks held at some time before this returned. Elsewhere this
        does not suspend.
        """
        return self.read_blocks(block_ids)

    def write_blocks(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> None:
        """As `write_block` of each, in one go where that is cheaper; what it wrote is there when it returns."""
        for block_id, payload in zip(block_ids, payloads, strict=True):
            self.write_block(block_id, payload)

    def begin_write(self, block_ids: Sequence[int], payloads: Sequence[memoryview | bytes]) -> Future[None] | None:
        """As `write_blocks`, but where other processes have a part in it, returns before they have done theirs: until
        the future is done (`written`), the blocks are being written. The payloads' bytes have been taken by then.
        """
        self.write_blocks(block_ids, payloads)
        return None

    def begin_read(self, block_ids: Sequence[int]) -> BlockRead | None:
        """Begins to read blocks that will be wanted in a moment, so that their copy and what the caller does meanwhile
        overlap. What is read is what they hold now. None: `fetch_blocks` will do as well, or there is no room.
        """
        return None


async def written(writing: Future[None] | None) -> None:
    """Returns when what `begin_write` has begun is over; raises what went wrong. Not before, whoever is cancelled (then
    it may also not have begun): until then, blocks must not be let go of.
    """
    if writing is not None:
        await to_its_end(asyncio.wrap_future(writing), writing.cancel)
