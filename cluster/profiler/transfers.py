"""Transfers of KV between two real worker processes of this machine, over the real transports (`bench.handoff`).

A time runs from the end of prefill to the last byte in the reader's memory: what a request waits for where nothing is
hidden, its latency included. The workers' device is paced and computes nothing; the KV is real memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..bench.handoff import HandoffOptions, run_handoffs
from ..bench.handoff_report import Cell
from ..latency.measured import MeasuredTransfer
from .repeat import Disagreement, check_agreement

TRANSPORTS = ("mapped", "grpc")
SIZES_MIB = (1.0, 4.0, 16.0, 64.0)
LEAST_S = 0.01
"""What a transfer counts as, at least, where its times are held against each other: a millisecond more or less of what
takes a few is a thread that was late, and nothing that a request would notice."""
MIN_TOKEN_BYTES = 4096
"""KV of a token of the models whose own is smaller: a prompt of millions of tokens is another matter than its KV."""


class TransfersDisagree(Disagreement):
    """Repeated times of transfers lie too far apart; `found` has them all the same."""

    def __init__(self, why: str, found: Mapping[str, MeasuredTransfer]) -> None:
        super().__init__(why)
        self.found = dict(found)


_SLACK = 1.5
"""A second round must have so many times the time that the first one took."""


async def agreeing_transfers(
    kv_token_bytes: int,
    max_spread: float,
    *,
    block_size: int = 16,
    timeout_s: float = 120.0,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, MeasuredTransfer]:
    """As `measure_transfers`, and once more where times disagree and there is time for it; all times count.

    TransfersDisagree (`repeat.check_agreement`), TimeoutError.
    """
    loop, times = asyncio.get_running_loop(), dict[str, MeasuredTransfer]()
    begin_s, deadline_s = loop.time(), loop.time() + timeout_s
    while True:
        left_s = deadline_s - loop.time()
        found = await measure_transfers(
            kv_token_bytes, block_size=block_size, timeout_s=left_s, on_progress=on_progress
        )
        first, times = not times, _together(times, found)
        try:
            check_agreement(
                {name: transfer.times_s for name, transfer in times.items()},
                max_spread,
                least_s=LEAST_S,
                option="max_transfer_spread",
            )
        except Disagreement as error:
            if not first or (loop.time() - begin_s) * _SLACK > deadline_s - loop.time():
                raise TransfersDisagree(str(error), times) from None
        else:
            return times


def _together(
    some: Mapping[str, MeasuredTransfer], more: Mapping[str, MeasuredTransfer]
) -> dict[str, MeasuredTransfer]:
    return {
        name: replace(transfer, times_s=some[name].times_s + transfer.times_s) if name in some else transfer
        for name, transfer in more.items()
    }


async def measure_transfers(
    kv_token_bytes: int,
    *,
    transports: Sequence[str] = TRANSPORTS,
    sizes_mib: Sequence[float] = SIZES_MIB,
    block_size: int = 16,
    repeats: int = 16,
    timeout_s: float = 120.0,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, MeasuredTransfer]:
    """Times of each size over each transport, by a name. TimeoutError if it takes longer than `timeout_s`; the workers
    have ended when it returns or raises.
    """
    options = HandoffOptions(
        transports=tuple(transports),
        sizes_mib=tuple(sizes_mib),
        repeats=repeats,
        block_size=block_size,
        token_bytes=max(MIN_TOKEN_BYTES, -(-kv_token_bytes // 16) * 16),
    )
    total = len(transports) * len(sizes_mib)
    found: dict[str, MeasuredTransfer] = {}

    def on_cell(cell: Cell) -> None:
        name = f"{cell.transport} {cell.size_mib:g} MiB"
        times_s = tuple(handoff.exposed_s for handoff in cell.handoffs)
        found[name] = MeasuredTransfer(link=cell.transport, size_bytes=cell.handoffs[0].bytes, times_s=times_s)
        on_progress(name, len(found) / total)

    on_progress("workers start", 0.0)
    async with asyncio.timeout(timeout_s):
        await run_handoffs(options, on_cell)
    return found
