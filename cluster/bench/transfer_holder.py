"""The holder of `tandem bench transfer`: a process with KV, no engine, and the real source, server and segment.
`python -m tandem.cluster.bench.transfer_holder` reads a `HolderSpec` as one JSON line from stdin, says in one where it
serves, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from dataclasses import dataclass

import uvloop

from ...kvtransfer.collective.commands import Begin
from ...kvtransfer.collective.holder import CollectiveHolder
from ...kvtransfer.collective.messages import Offer, encode_offer
from ...kvtransfer.collective.ports import WorkerRanks
from ...kvtransfer.freed_memory import keep_freed_memory
from ...kvtransfer.grpc_transport import GrpcKVServer
from ...kvtransfer.layout import KVSplit
from ...kvtransfer.mapped.fd_passing import share
from ...kvtransfer.source import SourceDriver
from ...kvtransfer.store import KVStore
from ...kvtransfer.ticket import SegmentOffer
from ..clock import MonotonicClock
from ..engine.kv_ranks import own_port
from ..parent import die_with_parent
from ..rpc import new_epoch
from ..types import BlockRef, SampledToken
from .transfer_memory import layout_of, make_store

WORKER_ID = "holder"
FINGERPRINT = "transfer"
LEASE_S = 3600.0
FILL_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderSpec:
    """What the holder has."""

    memory: str
    block_bytes: int
    blocks: int
    ranks: str | None = None
    """How its rank can be met: `gloo` or `nccl`."""


async def join_rank(store: KVStore, backend: str) -> WorkerRanks:
    """A worker of one rank, for KV that goes from rank to rank."""
    begin = Begin(backend=backend, host="127.0.0.1", timeout_s=30.0)
    ranks = WorkerRanks(KVSplit(layout=store.layout), store.num_blocks, [own_port(store)], begin)
    await ranks.start()
    return ranks


async def hold(spec: HolderSpec) -> None:
    """Serves until stdin ends. The KV of request `n` is its first `n` blocks."""
    layout = layout_of(spec.block_bytes)
    store = make_store(spec.memory, layout, spec.blocks)
    most = max(1, FILL_BYTES // spec.block_bytes)
    for first in range(0, spec.blocks, most):
        ids = range(first, min(first + most, spec.blocks))
        store.write_blocks(ids, [block_content(block_id, spec.block_bytes) for block_id in ids])
    assert store.segment is not None
    epoch, generations = new_epoch(), store.segment.generations
    generations[:] = memoryview(b"".join((1).to_bytes(8, sys.byteorder) for _ in range(spec.blocks))).cast("Q")
    store.segment.publish(epoch)
    memory = store.device_memory
    segments = await share(store.segment, None if memory is None else memory.fd)
    offer: SegmentOffer | None = None if segments is None else segments.offer
    ranks = None if spec.ranks is None else await join_rank(store, spec.ranks)
    met = None if ranks is None else Offer(backend=ranks.backend, tensor_parallel=1, pipeline_stages=1)
    source = SourceDriver(
        worker_id=WORKER_ID,
        epoch=epoch,
        fingerprint=FINGERPRINT,
        store=store,
        generation_of=lambda block_id: generations[block_id],
        release=lambda key, outcome: None,
        abort_prefill=lambda key: None,
        clock=MonotonicClock(),
        lease_s=LEASE_S,
        offer=offer,
        ranks=b"" if met is None else encode_offer(met),
    )
    sessions = None if ranks is None else CollectiveHolder(source, ranks, epoch=epoch)
    server = GrpcKVServer(source, block_bytes=layout.block_bytes, sessions=sessions)
    port = await server.start()
    gc.freeze()
    print(json.dumps({"epoch": epoch, "address": f"127.0.0.1:{port}"}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        blocks = int(line)
        key = source.on_submitted(f"{blocks}", 0, 1, blocks * layout.block_size)
        source.on_blocks(key, tuple(BlockRef(block_id, 1) for block_id in range(blocks)), 0)
        source.on_done(key, SampledToken(1, 0.0, ()))
        print(json.dumps({"blocks": blocks}), flush=True)
    await server.stop()
    if ranks is not None:
        await ranks.close()
    if segments is not None:
        await segments.stop()


def block_content(block_id: int, block_bytes: int) -> bytes:
    """Of a block of the holder: no two alike."""
    return ((block_id + 1) * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") * (block_bytes // 8)


if __name__ == "__main__":
    die_with_parent()
    keep_freed_memory()
    uvloop.run(hold(HolderSpec(**json.loads(sys.stdin.readline()))))
