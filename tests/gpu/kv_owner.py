"""A process with KV on a GPU, shared with this host: `python kv_owner.py BLOCK_SIZE NUM_BLOCKS` prints its offer as
JSON, raises the generation of each block that a line of stdin names, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys

from tandem.cluster.engine.gpu.kv_store import DeviceKVStore
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped.fd_passing import SegmentServer

GROUP = KVGroup(name="layers", num_layers=4, num_kv_heads=8, head_dim=64, dtype="bfloat16")
EPOCH = 7


def layout_of(block_size: int) -> KVLayout:
    """Blocks of 8 KiB a token."""
    return KVLayout(block_size=block_size, groups=(GROUP,))


def content(block_id: int, layout: KVLayout) -> bytes:
    """No two 8-byte words of the memory are alike."""
    words = layout.block_bytes // 8
    return b"".join((block_id * words + i).to_bytes(8, "little") for i in range(words))


async def main(block_size: int, num_blocks: int) -> None:
    layout = layout_of(block_size)
    store = DeviceKVStore(layout, num_blocks, device="cuda")
    ids = list(range(num_blocks))
    store.write_blocks(ids, [content(block_id, layout) for block_id in ids])
    for block_id in ids:
        store.segment.generations[block_id] = 1
    store.segment.publish(EPOCH)
    if store.device_memory is None:
        print(json.dumps({"error": "this GPU's memory cannot be shared"}), flush=True)
        return
    server = SegmentServer(store.segment, device_fd=store.device_memory.fd)
    await server.start()
    offer = {"socket_name": server.offer.socket_name, "nonce": server.offer.nonce.hex()}
    print(json.dumps(offer), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        store.segment.generations[int(line)] += 1
        print(line.strip(), flush=True)
    await server.stop()
    store.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
