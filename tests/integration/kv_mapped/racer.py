"""A process that owns a KV segment and does nothing but hand its blocks out anew and fill them.

Arguments: number of blocks, bytes of a block, a file of u64 per block in which it says which generation is wholly
written (what a holder's reference would name). Prints `pid descriptor nonce`; ends with its stdin.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading

import numpy as np
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped.segment import KVSegment


def layout_of(block_bytes: int) -> KVLayout:
    group = KVGroup(name="all", num_layers=1, num_kv_heads=1, head_dim=block_bytes // 16, dtype="uint64")
    return KVLayout(block_size=1, groups=(group,))


def main(num_blocks: int, block_bytes: int, published_path: str) -> None:
    segment = KVSegment(layout_of(block_bytes), num_blocks)
    segment.publish(7)
    over = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    blocks = np.frombuffer(segment.blocks, dtype=np.uint64).reshape(num_blocks, -1)
    with open(published_path, "r+b") as file:
        published = memoryview(mmap.mmap(file.fileno(), 8 * num_blocks)).cast("Q")
    print(os.getpid(), segment.fileno(), segment.nonce.hex(), flush=True)
    queue = threading.Lock()
    while not over.is_set():
        for block_id in range(num_blocks):
            segment.generations[block_id] += 1
            with queue:  # between a grant and its first step lies the engine's queue
                generation = segment.generations[block_id]
            blocks[block_id] = generation
            with queue:
                published[block_id] = generation


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
