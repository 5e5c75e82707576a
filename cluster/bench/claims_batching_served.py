"""What virtual time says of batching, looked at with a real paced worker behind a real router: the same requests at the
same times, at the rates that were found. Answers come as tokens are drawn, so that request level is the streamed form.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..latency.profile import StepProfile
from ..workload.arrivals import arrival_times
from ..workload.report import distortion, summarize
from ..workload.traces import TraceRequest, trace_requests
from .claims_batching import BatchingRow, run_at
from .claims_cluster import HEARTBEAT_S, RunningSystem, System
from .claims_disaggregation import MAX_LATE_STEPS
from .claims_machine import strain, take_sample
from .claims_systems import paced_engine
from .claims_virtual import EngineShape
from .load import run_load
from .options import BenchOptions
from .run import connect, warm_up

MIN_REQUESTS = 20
_WARMUPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRow:
    """One way of batching at one rate, with processes and in virtual time."""

    system: str
    rate: float
    requests: int
    normalized_s: float
    """Median latency by output token, as a client saw it."""
    predicted_s: float
    """The same of the same requests in virtual time."""
    void: str
    """Why it says nothing; empty: it does."""


async def serve_row(
    row: BatchingRow,
    lengths: Sequence[tuple[int, int]],
    profile: StepProfile,
    shape: EngineShape,
    folder: Path,
    *,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> ServedRow:
    """Sends some `seconds` of the load at the row's rate. `profile` is written into `folder` for the worker.

    Raises RuntimeError, ServerUnusable, OSError.
    """
    profile.save(folder / "steps.json")
    own = lengths[: max(MIN_REQUESTS, round(row.rate * seconds))]
    arrivals_s = arrival_times(len(own), row.rate, 1.0, seed)
    batching = "iteration" if row.system.startswith("iteration") else "request"
    engine = paced_engine(
        folder / "steps.json", budget=max(shape.max_batched_tokens, row.max_running), batching=batching
    )
    system = System(label=row.system, engine=replace(engine, max_running=row.max_running), mixed=1)
    with RunningSystem(system) as running:
        options = BenchOptions(base_url=running.url, dataset_name="random", temperature=0.0, timeout_s=3600)
        async with connect(options) as served:
            requests = [TraceRequest(arrival_s=None, input_tokens=i, output_tokens=o) for i, o in own]
            await warm_up(trace_requests(requests[:_WARMUPS], served.vocabulary, seed + 1), served, options)
            say(f"{row.system}, batches of up to {row.max_running}: {len(own)} requests in {arrivals_s[-1]:.0f} s")
            processes = running.processes | {"the client": os.getpid()}
            before, steps = take_sample(processes), running.steps()
            done = await run_load(served.send, trace_requests(requests, served.vocabulary, seed), arrivals_s)
            after = take_sample(processes)
        await asyncio.sleep(HEARTBEAT_S)
        counted = running.steps().since(steps)
    reasons = [distortion(summarize(done.records, {}, (99.0,), done.stalls_s)), *strain(before, after).reasons]
    if counted.late_share > MAX_LATE_STEPS:
        reasons.append(f"{counted.late} of {counted.steps} steps were late")
    if failed := sum(not record.ok for record in done.records):
        reasons.append(f"{failed} requests failed")
    seen = [record.e2e_s / record.output_tokens for record in done.records if record.ok and record.e2e_s]
    jobs = run_at(own, row.rate, profile, replace(shape, batching=batching, max_running=row.max_running), seed)
    return ServedRow(
        system=row.system,
        rate=row.rate,
        requests=len(own),
        normalized_s=statistics.median(seen) if seen else float("nan"),
        predicted_s=statistics.median(one.normalized_s() for one in jobs),
        void="; ".join(reason for reason in reasons if reason),
    )


def show_served(rows: Sequence[ServedRow]) -> str:
    """The table, and what it says in a sentence."""
    lines = [f"{'with processes':<26}{'req/s':>8}{'requests':>10}{'ms/token':>10}{'in virtual time':>17}"]
    for row in rows:
        void = f"  VOID: {row.void}" if row.void else ""
        lines.append(
            f"{row.system:<26}{row.rate:>8.2f}{row.requests:>10}{row.normalized_s * 1e3:>10.1f}"
            f"{row.predicted_s * 1e3:>17.1f}{void}"
        )
    if len(rows) == 2 and not any(row.void for row in rows) and rows[1].rate:
        lines.append(f"at that latency, one worker took {rows[0].rate / rows[1].rate:.1f}x the requests by iteration")
    return "\n".join(lines)
