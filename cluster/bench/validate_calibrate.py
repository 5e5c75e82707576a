"""What processes on this machine add to the latency model: answers that nothing disturbs, beside what the model says
of them. A few requests, one after the other, then some at once; lower quartiles, because what else the machine does in
between is not part of it.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

import numpy as np

from ..latency.profile import StepProfile
from ..workload.datasets import BenchRequest
from ..workload.report import RequestRecord
from ..workload.traces import TraceRequest, trace_requests
from .run import Served
from .validate_predict import FIRST_TOKEN_CALLS, Overheads

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 34
ALONE, AT_ONCE = 10, 8
_SEED = 0xCA11
_SETTLED = 2
"""Gaps between tokens that still carry the handoff."""


async def calibrate(served: Served, prefill: StepProfile, decode: StepProfile) -> Overheads:
    """Asks a cluster that is idle; its profiles say what it should take. RuntimeError if an answer fails."""
    rows = [TraceRequest(arrival_s=None, input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)] * (ALONE + AT_ONCE)
    requests = trace_requests(rows, served.vocabulary, _SEED)
    alone = [await _ask(served, request) for request in requests[:ALONE]]
    together = await asyncio.gather(*(_ask(served, request) for request in requests[ALONE:]))
    return overheads_of(alone, list(together), prefill, decode)


def overheads_of(
    alone: Sequence[RequestRecord], together: Sequence[RequestRecord], prefill: StepProfile, decode: StepProfile
) -> Overheads:
    """From the answers seen. Pure; nothing comes out below zero."""
    first_s = [_first_s(record) - prefill.step_time_s(PROMPT_TOKENS, PROMPT_TOKENS**2, 0, 0) for record in alone]
    step_s = max(0.0, _typical(_beyond_s(alone, decode, 1)))
    first_token_s = max(0.0, _typical(first_s) - step_s)
    second_s = [record.itls_s[0] - decode.step_time_s(0, 0, 1, PROMPT_TOKENS + 1) for record in alone]
    rpc_s = first_token_s / (2 * FIRST_TOKEN_CALLS)
    handoff_s = max(0.0, _typical(second_s) - step_s - rpc_s)
    rows_s = _typical(_beyond_s(together, decode, len(together))) if together else step_s
    row_s = max(0.0, rows_s - step_s) / max(1, len(together) - 1)
    return Overheads(first_token_s=first_token_s, step_s=step_s, row_s=row_s, handoff_s=handoff_s)


def _typical(values_s: Sequence[float]) -> float:
    """The lower quartile."""
    return float(np.quantile(values_s, 0.25))


def _first_s(record: RequestRecord) -> float:
    assert record.ttft_s is not None
    return record.ttft_s


def _beyond_s(records: Sequence[RequestRecord], decode: StepProfile, rows: int) -> list[float]:
    """By how much longer than modelled the steps in the middle of each answer took, where all of `rows` run."""
    modelled_s = decode.step_time_s(0, 0, rows, rows * (PROMPT_TOKENS + OUTPUT_TOKENS // 2))
    return [statistics.fmean(record.itls_s[_SETTLED:-_SETTLED]) - modelled_s for record in records]


async def _ask(served: Served, request: BenchRequest) -> RequestRecord:
    loop = asyncio.get_running_loop()
    record = await served.send(request, loop.time(), "")
    if record.error or len(record.chunk_times_s) < 2 * _SETTLED + 2:
        raise RuntimeError(f"calibration: {record.error or 'tokens came together'}")
    return record
