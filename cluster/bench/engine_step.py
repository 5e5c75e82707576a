"""One step of a device, timed; and KV that was never computed. Shared by `bench.engine` and `cluster.profiler`."""

from __future__ import annotations

import random
import time

from ..engine.devices.base import Device
from ..engine.plan import StepPlan


def timed_step(device: Device, plan: StepPlan, what: object) -> tuple[float, float]:
    """Runs the plan; when it began and when its output was there, seconds of `perf_counter`. RuntimeError naming `what`
    if a row failed.
    """
    start_s = time.perf_counter()
    device.launch(plan)
    output = device.collect()
    end_s = time.perf_counter()
    failed = next((row.error for row in output.rows if row.error), None)
    if failed is not None:
        raise RuntimeError(f"a row of {what} failed: {failed}")
    return start_s, end_s


def fill_kv(device: Device, num_blocks: int, seed: int) -> None:
    """Writes one block of random values into `num_blocks` blocks: with these bits of its high byte a bfloat16 or a
    float32 lies between 2^-31 and 2, whatever the others are.
    """
    payload = bytes(byte & 0xBF | 0x30 for byte in random.Random(seed).randbytes(device.kv.layout.block_bytes))
    for block_id in range(num_blocks):
        device.kv.write_block(block_id, payload)
