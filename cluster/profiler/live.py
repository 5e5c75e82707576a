"""A live engine under the profiler: its device's steps, and what the engine adds between two of them.

Steps are those of `points`, run on the device one at a time, as an engine thread would. `engine_overhead_s` runs the
real scheduler and engine thread on the same device and looks at the gaps.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from ..bench.engine_step import fill_kv, timed_step
from ..clock import MonotonicClock
from ..engine.block_pool import BlockPool
from ..engine.devices.base import Device
from ..engine.devices.paced import PacedDevice
from ..engine.devices.paced_language import ROOT, U64, chain, slot_values
from ..engine.plan import StepOutput, StepPlan
from ..engine.policies import policy_for
from ..engine.prefix_cache import PrefixCache
from ..engine.scheduler import Scheduler
from ..engine.scheduler_events import SchedulerEvent, TokensEmitted
from ..engine.step_shape import is_decode
from ..latency.measured import MeasuredStep
from ..types import Role, SamplingParams, SequenceSpec
from ..worker.engine_thread import EngineThread
from .points import Places, Point
from .repeat import RepeatOptions, Timings, measure_points

STEPS = 40
"""Decode steps between which `engine_overhead_s` looks."""
_PROMPT_TOKENS = 16
_GIVE_UP_S = 120.0


class LiveSteps:
    """Runs points on a device whose KV memory holds `places`."""

    def __init__(
        self, device: Device, places: Places, seed: int = 0, now_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self._now_s = now_s
        self._places = places
        self._plan_id = 0
        if isinstance(device, PacedDevice):
            _fill_paced(device, places)
        else:
            fill_kv(device, places.blocks, seed)

    def __call__(self, point: Point) -> float:
        """Seconds of one step of the point. RuntimeError naming it if a row failed."""
        self._plan_id += 1
        start_s, end_s = timed_step(self._device, self._places.plan(point, self._plan_id), point.name, self._now_s)
        return end_s - start_s


def measure_steps(
    device: Device,
    points: Sequence[Point],
    options: RepeatOptions,
    *,
    block_size: int,
    now_s: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
    on_round: Callable[[Mapping[Point, Sequence[float]]], None] = lambda times_s: None,
) -> Timings:
    """Times of the points on the device; see `repeat`. Its KV memory holds all of them (`points.fitting`)."""
    places = Places(points, block_size, vocab_size=device.vocab_size, seed=options.seed)
    steps = LiveSteps(device, places, options.seed, now_s)
    return measure_points(steps, points, options, now_s, on_progress, on_round)


def measured_steps(timings: Timings) -> dict[str, MeasuredStep]:
    """By the points' names, as a profile keeps them."""
    found = {}
    for point, times_s in timings.times_s.items():
        prefill, squares, rows, context = point.sizes
        found[point.name] = MeasuredStep(
            prefill_tokens=prefill,
            prefill_squares=squares,
            decode_rows=rows,
            context_tokens=context,
            times_s=tuple(times_s),
        )
    return found


def overhead_blocks(block_size: int, steps: int = STEPS) -> int:
    """Blocks that `engine_overhead_s` needs at least."""
    return -(-(_PROMPT_TOKENS + steps) // block_size)


def engine_overhead_s(device: Device, *, block_size: int, num_blocks: int, rows: int = 8, steps: int = STEPS) -> float:
    """Seconds between the end of a decode step and the begin of the next, in an engine thread with a real scheduler:
    the median over a batch that decodes, of fewer `rows` where the KV memory holds no more. None is left where the
    device looks ahead: it has the next step before it ends one. RuntimeError if the engine failed or did not come to an
    end.
    """
    if device.looks_ahead:
        return 0.0
    rows = max(1, min(rows, num_blocks // overhead_blocks(block_size, steps)))
    watched = _Gaps(device)
    ended = threading.Event()
    failures: list[BaseException] = []
    left = set(range(rows))

    def on_events(events: Sequence[SchedulerEvent]) -> None:
        for event in events:
            if isinstance(event, TokensEmitted) and event.finish_reason is not None:
                left.discard(int(event.seq_id))
        if not left:
            ended.set()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        ended.set()

    engine = EngineThread(
        _scheduler(num_blocks, block_size, rows, _PROMPT_TOKENS + steps),
        watched,
        on_events=on_events,
        on_failure=on_failure,
    )
    engine.start()
    try:
        for row in range(rows):
            engine.submit(partial(Scheduler.add, spec=_sequence(row, steps, device.vocab_size)))
        if not ended.wait(_GIVE_UP_S) or failures:
            raise RuntimeError(f"the engine did not decode {rows} x {steps} tokens") from next(iter(failures), None)
    finally:
        engine.stop(_GIVE_UP_S)
    return statistics.median(watched.gaps_s) if watched.gaps_s else 0.0


class _Gaps(Device):
    """Another device; remembers how long it was left alone between two steps that only decode."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._collected_s: float | None = None
        self._decodes = False
        self.gaps_s: list[float] = []
        self.name, self.kv = device.name, device.kv
        self.vocab_size, self.fingerprint = device.vocab_size, device.fingerprint

    def launch(self, plan: StepPlan) -> None:
        decodes = all(is_decode(row) for row in plan.rows)
        if self._collected_s is not None and decodes and self._decodes:
            self.gaps_s.append(time.perf_counter() - self._collected_s)
        self._decodes = decodes
        self._device.launch(plan)

    def collect(self) -> StepOutput:
        output = self._device.collect()
        self._collected_s = time.perf_counter()
        return output

    def close(self) -> None:
        """Nothing: the device is somebody else's."""


def _scheduler(num_blocks: int, block_size: int, rows: int, tokens: int) -> Scheduler:
    pool = BlockPool(num_blocks, block_size)
    return Scheduler(
        block_pool=pool,
        prefix_cache=PrefixCache(pool, enabled=False),
        policy=policy_for(Role.MIXED),
        clock=MonotonicClock(),
        max_batched_tokens=512,
        max_running=rows,
        max_waiting=rows,
        max_model_len=tokens,
        eos_token_ids=(),
    )


def _sequence(row: int, steps: int, vocab_size: int) -> SequenceSpec:
    return SequenceSpec(
        seq_id=str(row),
        prompt_token_ids=tuple((row + position) % vocab_size for position in range(_PROMPT_TOKENS)),
        sampling=SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True),
    )


def _fill_paced(device: PacedDevice, places: Places) -> None:
    """Writes what computing the sequences would have written: the paced device checks it."""
    for blocks, tokens in places.sequences:
        values = slot_values(np.array(tokens, dtype=U64), np.arange(len(tokens), dtype=U64))
        keys = chain(ROOT, values)
        shape = (len(blocks), places.block_size, 1)
        device.kv.slots[blocks.start : blocks.stop, 0] = keys.reshape(shape)
        device.kv.slots[blocks.start : blocks.stop, 1] = values.reshape(shape)
