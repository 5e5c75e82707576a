"""A holder of one rank in a process of its own: `holder_process.py EPOCH` prints its address when half of the prefill
`r<EPOCH>` is computed, every byte of it the epoch, and stays so."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[3] / "common"))
from ends import Holder, split


async def main(epoch: int) -> None:
    holder = Holder(split(), epoch)
    await holder.start()
    blocks = list(range(32))
    key = holder.prefill(f"r{epoch}", 16 * len(blocks), blocks)
    holder.memories()[0][blocks] = epoch
    holder.source.on_advanced(key, 256)
    print(holder.peer.kv_address, flush=True)
    await asyncio.sleep(120)


asyncio.run(main(int(sys.argv[1])))
