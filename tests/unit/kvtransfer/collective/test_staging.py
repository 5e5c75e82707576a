"""What a holder may have staged at once."""

from __future__ import annotations

import asyncio

import pytest
from tandem.kvtransfer.collective.staging import StagedBytes


def test_room_is_given_in_order_and_never_more_than_there_is() -> None:
    async def scene() -> None:
        staged, begun = StagedBytes(10), []

        async def take(name: str, num_bytes: int, until: asyncio.Event) -> None:
            async with staged.room(num_bytes):
                begun.append(name)
                assert staged.taken_bytes <= 10
                await until.wait()

        ends = [asyncio.Event() for _ in range(4)]
        sizes = (6, 10, 1, 4)
        tasks = [
            asyncio.create_task(take(name, size, end)) for name, size, end in zip("abcd", sizes, ends, strict=True)
        ]
        await settle()
        assert begun == ["a"]  # c has room, but b was first
        tasks[1].cancel()
        await settle()
        assert begun == ["a", "c"]
        ends[2].set()
        await settle()
        assert begun == ["a", "c", "d"]
        ends[0].set()
        ends[3].set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert staged.taken_bytes == 0
        with pytest.raises(ValueError, match="more than 10"):
            async with staged.room(11):
                pass

    asyncio.run(scene())


async def settle() -> None:
    """Whatever can go on has."""
    for _ in range(10):
        await asyncio.sleep(0)
