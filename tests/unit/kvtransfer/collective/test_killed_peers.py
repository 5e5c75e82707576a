"""kill -9 of one end of a session, a process of its own, amid a transfer: what the other end has left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from ends import LEASE_S, NUM_BLOCKS, TOKEN, Holder, Reader, play, split, until
from tandem.kvtransfer.collective.commands import Send
from tandem.kvtransfer.ticket import Peer, RefusalReason

ONE = split()
BLOCKS = list(range(32))
TOKENS = 16 * len(BLOCKS)


async def start_process(program: str, *arguments: object) -> asyncio.subprocess.Process:
    command = (sys.executable, str(Path(__file__).parent / program), *map(str, arguments))
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=paths)


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


async def end(*processes: asyncio.subprocess.Process) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class WithinTheLease:
    """By when whoever is left must know: the holder keeps the KV until then."""

    def __enter__(self) -> None:
        self._begun_s = time.monotonic()

    def __exit__(self, failed: object, *_: object) -> None:
        assert failed is not None or time.monotonic() - self._begun_s < LEASE_S


def test_a_killed_holder_is_noticed_and_its_next_life_met_anew() -> None:
    """While half of a sequence is through."""

    async def scene(_: Holder, reader: Reader) -> None:
        epochs = (21, 22)
        lives = await asyncio.gather(*(start_process("holder_process.py", epoch) for epoch in epochs))
        try:
            for epoch, process in zip(epochs, lives, strict=True):
                key = reader.submit(Peer("p", epoch, await line_of(process)), f"r{epoch}", TOKENS, BLOCKS)
                half = reader.sink._sequences[key]
                await until(lambda half=half: half.received_blocks >= 16)
                with WithinTheLease():
                    process.kill()
                    await until(lambda key=key: reader.failure(key) is not None)
                assert reader.failure(key)[2] is RefusalReason.PEER_LOST
                np.testing.assert_array_equal(reader.whole(BLOCKS[:16]), epoch)
                assert ("writer_done", key) in reader.said
        finally:
            await end(*lives)

    play(scene, ONE, ONE)


def test_a_killed_reader_leaves_nothing_at_the_holder_which_serves_the_next_one() -> None:
    """Before the bytes that it waits for are sent, and while it takes none of them."""
    blocks, scenes = list(range(NUM_BLOCKS)), ("before", "amid")

    async def scene(holder: Holder, reader: Reader) -> None:
        port, staged = holder.ports[0], holder.sessions._staged

        def prefilled(name: str) -> np.ndarray:
            whole = holder.fill(blocks, seed=len(name))
            holder.source.on_done(holder.prefill(name, 16 * NUM_BLOCKS, blocks), TOKEN)
            return whole

        lives = await asyncio.gather(
            *(start_process("reader_process.py", holder.peer.kv_address, name) for name in scenes)
        )
        try:
            for name, process in zip(scenes, lives, strict=True):
                port.before = lambda command: isinstance(command, Send)
                prefilled(name)
                assert await line_of(process) == "here"
                assert process.stdin is not None
                process.stdin.write(b"go\n")
                assert await line_of(process) == "receives"
                await until(lambda: len(port.kept) == 2)
                assert staged.taken_bytes == NUM_BLOCKS * ONE.layout.block_bytes
                if name == "amid":
                    process.send_signal(signal.SIGSTOP)
                    port.go_on()
                    await until(lambda: any(pair._wires for pair in port._transfers._pairs.values()))
                with WithinTheLease():
                    process.kill()
                    await until(lambda: holder.sessions.sessions == staged.taken_bytes == 0)
                port.go_on()
                await until(lambda: not any(thread.is_alive() for thread in list(port._transfers._threads)))
            whole = prefilled("next")
            await reader.ready(reader.submit(holder.peer, "next", 16 * NUM_BLOCKS, blocks))
            np.testing.assert_array_equal(reader.whole(blocks), whole)
        finally:
            await end(*lives)

    play(scene, ONE, ONE)
