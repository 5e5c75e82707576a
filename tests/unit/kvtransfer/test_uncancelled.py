"""Who waits for something to its end."""

from __future__ import annotations

import asyncio

import pytest
from tandem.kvtransfer.uncancelled import to_its_end


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_cancellations_wait_for_the_end() -> None:
    async def scene() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        said: list[str] = []
        waiting = asyncio.create_task(to_its_end(work, lambda: said.append("cancelled")))
        for times in (1, 2):
            await turns()
            waiting.cancel()
            await turns()
            assert said == ["cancelled"] * times
        assert not waiting.done()
        assert not work.done()
        work.set_exception(ValueError("nobody asks for it any more"))
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scene())


def test_a_deadline_is_a_deadline_when_it_is_over() -> None:
    async def scene() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        late = asyncio.Event()

        async def wait() -> None:
            async with asyncio.timeout(0):
                await to_its_end(work, late.set)

        waiting = asyncio.create_task(wait())
        await late.wait()
        work.set_result(7)
        with pytest.raises(TimeoutError):
            await waiting

    asyncio.run(scene())


def test_results_and_errors_come_through() -> None:
    async def work(result: int) -> int:
        await asyncio.sleep(0)
        if not result:
            raise ValueError("nothing")
        return result

    async def scene() -> None:
        assert await to_its_end(work(7)) == 7
        with pytest.raises(ValueError, match="nothing"):
            await to_its_end(work(0))

    asyncio.run(scene())
