"""A pull that is cancelled again while its ranks are told to write no more: its blocks are kept until they will not."""

from __future__ import annotations

import asyncio

import pytest
from ends import TOKEN, Holder, Reader, play, split, until
from tandem.kvtransfer.collective.commands import Command, Forget, Receive, Send
from tandem.kvtransfer.ticket import RefusalReason

ONE = split()
BLOCKS = list(range(8))


@pytest.mark.parametrize("again", ["deadline", "close"])
def test_blocks_are_kept_until_no_rank_writes_into_them(again: str) -> None:
    async def scene(holder: Holder, reader: Reader) -> None:
        holder.fill(BLOCKS, 1)
        holder.source.on_done(holder.prefill("r", 16 * len(BLOCKS), BLOCKS), TOKEN)
        holder.ports[0].before = lambda command: isinstance(command, Send)
        said: list[Command] = []

        def keep_forget(command: Command) -> bool:
            said.append(command)
            return isinstance(command, Forget)

        reader.ports[0].before = keep_forget
        key = reader.submit(holder.peer, "r", 16 * len(BLOCKS), BLOCKS)
        await until(lambda: any(isinstance(command, Receive) for command in said))
        closing = None
        reader.sink._sequences[key].task.cancel()  # as its own deadline does
        await until(lambda: any(isinstance(command, Forget) for command in said))
        if again == "deadline":
            reader.sink._sequences[key].deadline_s = 0.0
            reader.sink._puller._records[key].deadline_s = 0.0
            reader.sink.tick()
        else:
            closing = asyncio.create_task(reader.sink.close())
        for _ in range(20):
            await asyncio.sleep(0)
        assert ("writer_done", key) not in reader.said
        reader.ports[0].go_on()
        await until(lambda: ("writer_done", key) in reader.said)
        if closing is not None:
            await closing
        else:
            failure = reader.failure(key)
            assert failure is not None
            assert failure[2] is RefusalReason.DEADLINE
        holder.ports[0].go_on()

    play(scene, ONE, ONE)
