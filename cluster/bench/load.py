"""The open loop: sends requests when they are due, whatever the answers do, and watches its own punctuality."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..workload.datasets import BenchRequest
from ..workload.report import RequestRecord
from ..workload.sweep import Watch
from .client import Send
from .interrupt import Stop

_LEAD_S = 0.05  # between drawing up the run and its first request
_CLOSE_ENOUGH_S = 0.0005  # the event loop's timers count milliseconds; to spin would take the server's time
_LOOK_S = 0.05


@dataclass(slots=True, kw_only=True)
class Load:
    """What came of a load."""

    records: list[RequestRecord]
    """In order of arrival; fewer than the requests where the load was ended early or interrupted."""
    begin_s: float
    stalls_s: list[float] = field(default_factory=list)
    """How late the event loop came back, looked at twenty times a second: what arrives then is stamped late."""
    looked_s: list[float] = field(default_factory=list)
    """When that was."""
    cpu_s: float = 0.0
    """Processor time of this process during the load."""
    ended_early: bool = False
    overdue: int = 0
    """Requests that were given up when the load was ended early, and had failed by then."""
    interrupted: bool = False
    given_up: int = 0
    """Requests that were under way when the load was ended early or interrupted."""


async def run_load(
    send: Send,
    requests: Sequence[BenchRequest],
    arrivals_s: Sequence[float],
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[RequestRecord], None] | None = None,
    watch: Watch | None = None,
    stop: Stop | None = None,
    name: str = "",
) -> Load:
    """Sends every request at its arrival time.

    The loop is open unless `max_concurrency` holds requests back; what it holds back shows as lateness. With `watch`,
    the load ends once its point is lost, with `stop` when that is set: what is under way is given up. Requests are
    called `<name>-<place>`.
    """
    room = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    cpu_s = time.process_time()
    load = Load(records=[], begin_s=time.monotonic() + _LEAD_S)
    found: dict[int, RequestRecord] = {}
    flying: dict[int, float] = {}

    async def fly(place: int, due_s: float) -> RequestRecord:
        flying[place] = time.monotonic()
        record = await send(requests[place], due_s, f"{name}-{place}" if name else "")
        del flying[place]
        return record

    async def one(place: int, due_s: float) -> None:
        if room is None:
            record = await fly(place, due_s)
        else:
            async with room:
                record = await fly(place, due_s)
        found[place] = record
        if watch is not None:
            watch.done(record)
        if on_done is not None:
            on_done(record)

    async def send_all() -> None:
        async with asyncio.TaskGroup() as group:
            for place, arrival_s in enumerate(arrivals_s):
                due_s = load.begin_s + arrival_s
                while (wait_s := due_s - time.monotonic()) > _CLOSE_ENOUGH_S:  # noqa: ASYNC110
                    await asyncio.sleep(wait_s)
                group.create_task(one(place, due_s))

    sending = asyncio.ensure_future(send_all())
    try:
        await _look_on(sending, load, flying, requests, watch, stop)
        if load.ended_early or load.interrupted:
            load.given_up = len(flying)
            sending.cancel()
            await asyncio.wait([sending])
        else:
            await sending
    finally:
        sending.cancel()
    load.records = [found[place] for place in sorted(found)]
    load.cpu_s = time.process_time() - cpu_s
    return load


async def _look_on(
    sending: asyncio.Future[None],
    load: Load,
    flying: dict[int, float],
    requests: Sequence[BenchRequest],
    watch: Watch | None,
    stop: Stop | None,
) -> None:
    """Until all is done, lost, or told to stop: measures how late the event loop comes back, and asks the watch."""
    while not sending.done():
        asked_s = time.monotonic()
        await asyncio.wait([sending], timeout=_LOOK_S)
        now_s = time.monotonic()
        if sending.done():
            return
        load.stalls_s.append(max(0.0, now_s - asked_s - _LOOK_S))
        load.looked_s.append(now_s)
        if stop is not None and stop.is_set():
            load.interrupted = True
            return
        if watch is None:
            continue
        overdue = sum(watch.is_overdue(now_s - sent_s, requests[place].max_tokens) for place, sent_s in flying.items())
        if watch.is_lost(overdue):
            load.ended_early, load.overdue = True, overdue
            return
