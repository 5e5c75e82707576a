"""A reader of one rank in a process of its own: `reader_process.py ADDRESS NAME` says `here`, pulls the prefill NAME of
the holder of epoch 7, all its blocks, when it is told to, and says `receives` when its rank is about to."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[3] / "common"))
from ends import NUM_BLOCKS, Reader, split
from tandem.kvtransfer.collective.commands import Command, Receive
from tandem.kvtransfer.ticket import Peer


async def main(address: str, name: str) -> None:
    reader = Reader(split(), 31)
    await reader.start()
    told = False

    def tell(command: Command) -> bool:
        nonlocal told
        if isinstance(command, Receive) and not told:
            told = True
            print("receives", flush=True)
        return False

    reader.ports[0].before = tell
    print("here", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    reader.submit(Peer("p", 7, address), name, 16 * NUM_BLOCKS, list(range(NUM_BLOCKS)))
    await asyncio.sleep(120)


asyncio.run(main(sys.argv[1], sys.argv[2]))
