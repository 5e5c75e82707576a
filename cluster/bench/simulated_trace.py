"""A simulated run as Chrome-trace events: every request's waterfall, every engine's steps, every transfer, and how full
the workers were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..sim.observer import StepSpan, TransferSpan, WorkerSample
from ..workload.chrome_trace import TraceCounter, TraceEvent, lanes
from .request_trace import request_events
from .simulated import SimulatedRun

ENGINES, LINKS, QUEUES = "engines", "KV on its way", "queues and KV"


def simulated_events(result: SimulatedRun) -> Iterator[TraceEvent | TraceCounter]:
    """All of them; requests are called by their place."""
    yield from request_events(result.records, "r", {})
    if result.recorder is None:
        return
    yield from _steps(result.recorder.steps)
    yield from _transfers(result.recorder.transfers)
    for at_s, waiting, workers in result.recorder.samples:
        yield TraceCounter(name="waiting at the router", at_s=at_s, process=QUEUES, values={"requests": waiting})
        for worker in workers:
            yield from _counters(at_s, worker)


def _steps(spans: Sequence[StepSpan]) -> Iterator[TraceEvent]:
    """Those of a pipeline overlap, so that each has a lane."""
    for worker_id in dict.fromkeys(span.worker_id for span in spans):
        group = [span for span in spans if span.worker_id == worker_id]
        found = lanes([(span.start_s, span.end_s) for span in group])
        for span, lane in zip(group, found, strict=True):
            yield _step(span, f"{worker_id}, overlapping {lane}" if lane else worker_id)


def _step(span: StepSpan, track: str) -> TraceEvent:
    kinds = [name for name, size in (("prefill", span.prefill_tokens), ("decode", span.decode_rows)) if size]
    return TraceEvent(
        name=" + ".join(kinds) + (f", {span.steps} steps" if span.steps > 1 else ""),
        start_s=span.start_s,
        end_s=span.end_s,
        process=ENGINES,
        track=track,
        args={
            "steps": span.steps,
            "prefill_tokens": span.prefill_tokens,
            "decode_rows": span.decode_rows,
            "context_tokens": span.context_tokens,
        },
    )


def _transfers(spans: Sequence[TransferSpan]) -> Iterator[TraceEvent]:
    """Those into one worker overlap, so that each has a lane."""
    for target in dict.fromkeys(span.target for span in spans):
        group = [span for span in spans if span.target == target]
        found = lanes([(span.start_s, span.end_s) for span in group])
        for span, lane in zip(group, found, strict=True):
            yield TraceEvent(
                name=span.request_id,
                start_s=span.start_s,
                end_s=span.end_s,
                process=LINKS,
                track=f"into {target}, lane {lane}",
                args={"from": span.source, "bytes": span.size_bytes, "exposed_ms": span.exposed_s * 1e3},
            )


def _counters(at_s: float, worker: WorkerSample) -> Iterator[TraceCounter]:
    yield TraceCounter(
        name=f"{worker.worker_id} sequences",
        at_s=at_s,
        process=QUEUES,
        values={"running": worker.running, "waiting": worker.waiting, "held": worker.held},
    )
    yield TraceCounter(
        name=f"{worker.worker_id} blocks",
        at_s=at_s,
        process=QUEUES,
        values={"used": worker.used_blocks, "cached": worker.cached_blocks},
    )
