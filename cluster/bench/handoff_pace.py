"""Whether an engine keeps its pace while its process moves KV and streams tokens.

One worker decodes batch after batch, the same each time: `rows` sequences from short prompts. Beside some of them the
same worker, by its mover or on its own loop (`kv_mover`), pulls KV at full rate from another one, or serves its own.
What is told is the time from one step's launch to the next one's. The conditions take turns, so that a machine that
changes its pace changes it for all of them.

    alone       no token leaves the engine, no KV moves
    tokens      every step's tokens go to a router
    pull grpc   and KV is pulled into this worker over gRPC
    pull mapped and KV is copied out of another worker's memory
    serve grpc  and this worker's KV is pulled by another one over gRPC
    beside grpc and KV moves between two other workers: what the machine itself costs, where processors are shared as
                here

The engine's thread has a processor of its own where there are two; everything else shares the others. The step is the
paced device's, which needs no processor, or a model's on the CPU device; then a batch has as many steps as `batch_s`
holds. After `limit_s` no further round begins.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from ..messages import sampling_to_proto
from ..proto import tandem_internal_v1_pb2 as pb
from ..types import SamplingParams
from .handoff_process import CALL_S, ROUTER_ID, WorkerProcess
from .handoff_traffic import Traffic
from .handoff_worker import WorkerSpec

CONDITIONS = ("alone", "tokens", "pull grpc", "pull mapped", "serve grpc", "beside grpc")
PROMPT_TOKENS = 32
HELD_TOKENS = 704
"""Of the KV that is moved over and over: 16 MB in SmolLM2's layout."""
TIMEOUT_S = 600.0
MAX_ROWS = 48
MIN_STEPS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceOptions:
    """What to measure."""

    model: str | None = None
    """None: the paced device."""
    rows: int = 8
    steps: int = 150
    """Of each batch."""
    rounds: int = 4
    """Batches of each condition."""
    step_s: float = 0.01
    """Of the paced device."""
    batch_s: float = 3.0
    """A batch of slower steps has fewer of them, down to `MIN_STEPS`."""
    limit_s: float = 150.0
    token_bytes: int = 23040
    pin: bool = True
    kv_mover: str = "auto"
    """As `WorkerConfig.kv_mover`."""

    def __post_init__(self) -> None:
        for name, most in (("rows", MAX_ROWS), ("steps", 10_000), ("rounds", 1000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; allowed: 1…{most}")
        for name in ("batch_s", "limit_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name}: {getattr(self, name):g} is not allowed; allowed: above 0, to 3600 seconds")

    def fitting(self, step_s: float) -> int:
        """Steps of a batch where one takes so long."""
        return min(self.steps, max(MIN_STEPS, round(self.batch_s / step_s)))


@dataclass(slots=True)
class Pace:
    """One condition: the time of every step, and what was moved beside them."""

    condition: str
    periods_s: list[float] = field(default_factory=list)
    moved_bytes: int = 0
    moving_s: float = 0.0

    def ms(self, percentile: float) -> float:
        """Time from one step to the next."""
        return float(np.percentile(self.periods_s, percentile)) * 1000


async def run_pace(options: PaceOptions, on_batch: Callable[[], None] = lambda: None) -> list[Pace]:
    """Measures all conditions, in turns."""
    end_s = time.monotonic() + options.limit_s
    async with AsyncExitStack() as stack:
        engine = await _start(stack, options, "engine", options.model)
        peer = await _start(stack, options, "peer", options.model)
        reader = await _start(stack, options, "reader", options.model)
        peers, engines = (peer, await _hold(peer)), (engine, await _hold(engine))
        traffic = _Traffic({"pull": (engine, *peers), "serve": (reader, *engines), "beside": (reader, *peers)})
        paces = {condition: Pace(condition) for condition in CONDITIONS}
        warm = Pace("alone")
        await _batch(replace(options, steps=min(options.steps, MIN_STEPS)), engine, traffic, warm, "warm")
        options = replace(options, steps=options.fitting(warm.ms(50) / 1000))
        for index in range(options.rounds):
            if index and time.monotonic() > end_s:
                break
            for condition in CONDITIONS:
                await _batch(options, engine, traffic, paces[condition], f"{condition}-{index}")
                on_batch()
    return list(paces.values())


async def _start(stack: AsyncExitStack, options: PaceOptions, name: str, model: str | None) -> WorkerProcess:
    processors = sorted(os.sched_getaffinity(0))
    pinned = options.pin and name == "engine" and len(processors) > 1
    blocks = options.rows * ((PROMPT_TOKENS + options.steps) // 16 + 2) + 2 * HELD_TOKENS // 16
    spec = WorkerSpec(
        worker_id=name,
        role="mixed",
        transport="auto",
        checksum=True,
        token_bytes=options.token_bytes,
        num_blocks=blocks,
        spare_blocks=-(-HELD_TOKENS // 16),
        kv_mover=options.kv_mover,
        step_s=options.step_s if name == "engine" else 0.0,
        model=model,
        engine_cpu=processors[0] if pinned else None,
        other_cpus=tuple(processors[1:]) if options.pin and len(processors) > 1 else (),
    )
    worker = await WorkerProcess.start(spec)
    stack.push_async_callback(worker.close)
    return worker


async def _hold(worker: WorkerProcess) -> str:
    """A prefill whose KV the worker keeps; its request's id."""
    request_id = f"held-{worker.spec.worker_id}"
    first = worker.first_token(request_id)
    sequence = _sequence(request_id, HELD_TOKENS, 8, TIMEOUT_S)
    await worker.commands.ask(
        pb.Command(prefill=pb.PrefillRequest(sequence=sequence, handoff=True, epoch=worker.epoch))
    )
    await asyncio.wait_for(first, CALL_S)
    return request_id


def _sequence(request_id: str, prompt_tokens: int, max_tokens: int, timeout_s: float) -> pb.Sequence:
    draw = random.Random(request_id)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return pb.Sequence(
        request_id=request_id,
        prefill_attempt=1,
        decode_attempt=1,
        prompt_token_ids=[draw.randrange(1000, 30000) for _ in range(prompt_tokens)],
        sampling=sampling_to_proto(sampling),
        timeout_s=timeout_s,
        router_id=ROUTER_ID,
    )


class _Traffic:
    """KV that moves until it is told to stop."""

    def __init__(self, ways: Mapping[str, tuple[WorkerProcess, WorkerProcess, str]]) -> None:
        """`ways`: who reads, who holds, and the request whose KV it holds, by the first word of a condition."""
        self._ways = ways
        self._attempts = 1

    async def run(self, condition: str, seconds: float) -> tuple[int, float]:
        """Bytes, and the seconds that they took."""
        kind, _, transport = condition.partition(" ")
        reader, holder, request_id = self._ways[kind]
        traffic = Traffic(
            request_id=request_id,
            num_tokens=HELD_TOKENS,
            fingerprint=holder.fingerprint,
            peer=(holder.spec.worker_id, holder.epoch, holder.kv_address),
            transport=transport,
            until_s=time.monotonic() + seconds,
            first_attempt=self._attempts,
        )
        self._attempts += 1_000_000
        moved = await reader.pull(traffic, seconds + CALL_S)
        return moved["bytes"], moved["seconds"]


async def _batch(options: PaceOptions, engine: WorkerProcess, traffic: _Traffic, pace: Pace, name: str) -> None:
    """One batch from its prompts to its end; the steps in which every sequence decodes count."""
    await engine.marks(mute=pace.condition == "alone")
    ends = []
    for row in range(options.rows):
        request_id = f"{name}-{row}"
        reserve = pb.ReserveRequest(
            request_id=request_id,
            decode_attempt=1,
            router_id=ROUTER_ID,
            context_tokens=PROMPT_TOKENS,
            epoch=engine.epoch,
        )
        credit = await engine.commands.ask(pb.Command(reserve=reserve))
        ends.append(engine.finish(request_id))
        sequence = _sequence(request_id, PROMPT_TOKENS, options.steps, TIMEOUT_S)
        decode = pb.DecodeRequest(sequence=sequence, credit_id=credit.credit_id, epoch=engine.epoch)
        await engine.commands.ask(pb.Command(decode=decode))
    done = asyncio.gather(*ends)
    while pace.condition not in ("alone", "tokens") and not done.done():
        moved_bytes, moving_s = await traffic.run(pace.condition, 0.5)
        pace.moved_bytes += moved_bytes
        pace.moving_s += moving_s
    await asyncio.wait_for(done, TIMEOUT_S)
    plans = (await engine.marks())["plans"]
    for before, after in pairwise(plans):
        if before["rows"] == before["tokens"] == after["rows"] == after["tokens"] == options.rows:
            pace.periods_s.append(after["launched_s"] - before["launched_s"])


def pace_table(paces: list[Pace]) -> str:
    """Step times of every condition beside those of the first, and what was moved."""
    base = paces[0]
    names = "".join(f"{name:>9}" for name in ("p50", "p90", "p99", "max"))
    head = f"{'step to step, ms':<18}{'steps':>7}{names}{'p50 ×':>8}{'p99 ×':>8}{'KV GB/s':>9}"
    lines = [head, "-" * len(head)]
    for pace in paces:
        rate = f"{pace.moved_bytes / pace.moving_s / 1e9:9.2f}" if pace.moving_s else f"{'-':>9}"
        times = "".join(f"{pace.ms(q):>9.2f}" for q in (50, 90, 99, 100))
        ratios = "".join(f"{pace.ms(q) / base.ms(q):>8.2f}" for q in (50, 99))
        lines.append(f"{pace.condition:<18}{len(pace.periods_s):>7}{times}{ratios}{rate}")
    return "\n".join(lines)
