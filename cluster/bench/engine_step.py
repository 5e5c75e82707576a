"""One step of a device, timed; and KV that was never computed. Shared by `bench.engine` and `cluster.profiler`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from ..engine.devices.base import Device
from ..engine.plan import StepPlan


def timed_step(
    device: Device, plan: StepPlan, what: object, now_s: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """When a plan's step began and when its output was there, seconds. RuntimeError naming `what` if a row failed."""
    start_s = now_s()
    device.launch(plan)
    output = device.collect()
    end_s = now_s()
    failed = next((row.error for row in output.rows if row.error), None)
    if failed is not None:
        raise RuntimeError(f"a row of {what} failed: {failed}")
    return start_s, end_s


def fill_kv(device: Device, num_blocks: int, seed: int) -> None:
    """Writes one block of random values into `num_blocks` blocks: with these bits of its high byte a bfloat16 or a
    float32 lies between 2^-31 and 2, whatever the others are; an int8 is -80 or more, an e4m3 below 2.
    """
    payload = bytes(byte & 0xBF | 0x30 for byte in random.Random(seed).randbytes(device.kv.layout.block_bytes))
    for block_id in range(num_blocks):
        device.kv.write_block(block_id, payload)
