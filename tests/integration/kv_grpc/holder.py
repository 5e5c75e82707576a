"""A plain process that holds KV and serves it over gRPC: what a prefill worker is, without an engine.

Prints `port N`, then obeys lines on stdin: `done` (the first token is out), `advance TOKENS`. Ends with its stdin.
Argument: a JSON object, see `Settings`.
"""

from __future__ import annotations

import array
import asyncio
import json
import sys
import threading
from dataclasses import dataclass
from typing import Any

from tandem.cluster.clock import MonotonicClock
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.grpc_transport import GrpcKVServer
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped.fd_passing import share
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.source import SourceDriver
from tandem.kvtransfer.transport import BlockRun


@dataclass
class Settings:
    num_tokens: int
    epoch: int = 7
    fingerprint: str = "fp"
    corrupt: bool = False
    """Flips a bit of every block after its checksum was taken."""
    num_layers: int = 2
    mapped: bool = False
    """Shares its memory with readers on this host."""


class CopyingStore(MemoryKVStore):
    """Reads are copies, so that spoiling one spoils no memory."""

    def read_block(self, block_id: int) -> memoryview:
        return memoryview(bytearray(super().read_block(block_id)))


class SpoiledSource(SourceDriver):
    """Flips a bit in every run, after the checksums were taken."""

    async def _run_of(self, *args: Any) -> BlockRun:
        run = await super()._run_of(*args)
        for frame in run.frames:
            frame.payload[5] ^= 1
        return run


def layout_of(num_layers: int) -> KVLayout:
    group = KVGroup(name="all", num_layers=num_layers, num_kv_heads=4, head_dim=64, dtype="float32")
    return KVLayout(block_size=16, groups=(group,))


async def main(settings: Settings) -> None:
    layout = layout_of(settings.num_layers)
    count = layout.blocks_for(settings.num_tokens)
    store = (CopyingStore if settings.corrupt else MemoryKVStore)(layout, count)
    for index in range(count):
        store.write_block(index, bytes([index % 251 + 1]) * layout.block_bytes)
    store.segment.publish(settings.epoch)
    store.segment.generations[:] = memoryview(array.array("Q", [1] * count))
    segments = await share(store.segment) if settings.mapped else None
    source = (SpoiledSource if settings.corrupt else SourceDriver)(
        worker_id="p",
        epoch=settings.epoch,
        fingerprint=settings.fingerprint,
        store=store,
        generation_of=lambda block_id: 1,
        release=lambda key, outcome: print("release", key, outcome.value, flush=True),
        abort_prefill=lambda key: print("abort_prefill", key, flush=True),
        clock=MonotonicClock(),
        offer=None if segments is None else segments.offer,
    )
    server = GrpcKVServer(source, block_bytes=layout.block_bytes)
    key = source.on_submitted("r", 0, 0, settings.num_tokens)
    source.on_blocks(key, tuple(BlockRef(index, 1) for index in range(count)), 0)
    print("port", await server.start(), flush=True)
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def obey(line: str) -> None:
        if line.startswith("advance"):
            source.on_advanced(key, int(line.split()[1]))
        elif line == "done":
            source.on_done(key, SampledToken(42, -0.25, ((42, -0.25),)))
        elif line == "counts":
            print("live", source.counts().live, flush=True)

    def listen() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(obey, line.strip())
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=listen, daemon=True).start()
    await over.wait()
    await source.close()
    await server.stop()
    if segments is not None:
        await segments.stop()
    source.check_integrity()


if __name__ == "__main__":
    asyncio.run(main(Settings(**json.loads(sys.argv[1]))))
