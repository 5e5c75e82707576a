"""The one-reader queue between a worker's stream and a choice, and between a choice and its client."""

from __future__ import annotations

import asyncio

import pytest
from scenario import scenario
from tandem.router.mailbox import Mailbox


@scenario
async def test_items_come_in_order_and_wake_their_reader() -> None:
    box: Mailbox[int] = Mailbox()
    reading = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    for item in (1, 2, 3):
        box.put_nowait(item)
    assert await asyncio.wait_for(reading, 10) == 1
    assert (box.get_nowait(), await box.get()) == (2, 3)
    assert box.empty()
    with pytest.raises(IndexError):
        box.get_nowait()


@scenario
async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    box: Mailbox[int] = Mailbox()
    reading = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    reading.cancel()
    box.put_nowait(1)
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await asyncio.wait_for(box.get(), 10) == 1


@scenario
async def test_a_reader_that_is_cancelled_after_its_item_came_leaves_it() -> None:
    box: Mailbox[int] = Mailbox()
    reading = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    box.put_nowait(1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert box.get_nowait() == 1


@scenario
async def test_a_tap_is_offered_what_comes_while_the_reader_waits() -> None:
    """What it leaves wakes the reader; from then on everything waits behind that, in order."""
    box: Mailbox[int] = Mailbox()
    taken: list[int] = []

    def tap(item: int) -> bool:
        taken.append(item)
        return item % 2 == 1

    box.tap = tap
    box.put_nowait(1)
    assert (await box.get(), taken) == (1, [])  # nobody waited
    reading = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    for item in (3, 5, 6, 7):
        box.put_nowait(item)
    assert taken == [3, 5, 6]
    assert await reading == 6
    assert await box.get() == 7
    assert box.empty()


@scenario
async def test_a_tap_takes_nothing_for_a_reader_that_was_cancelled() -> None:
    box: Mailbox[int] = Mailbox()
    box.tap = lambda item: True
    reading = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    reading.cancel()
    box.put_nowait(1)
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert box.get_nowait() == 1
