"""What processes on this machine add to the latency model: answers that nothing disturbs, beside what the model says
of them. A few requests, one after the other, then some at once; lower quartiles, because what else the machine does in
between is not part of it. Paced workers are asked, whose steps take what is said: an engine that computes does so as
fast as the machine lets it at the moment, which is another matter (`validate_pace`).
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from ..latency.profile import StepProfile
from ..workload.datasets import BenchRequest
from ..workload.report import RequestRecord
from ..workload.traces import TraceRequest, trace_requests
from .run import Served
from .validate_predict import FIRST_TOKEN_CALLS, Overheads

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 34
LONG_TOKENS = 1600
"""Of the prompts that show what each token of a prompt costs beside its computing."""
ALONE, AT_ONCE, LONG = 10, 8, 8
BESIDE, BESIDE_TOKENS = 16, 256
"""Answers beside a prompt of so many tokens, which another worker computes meanwhile."""
ROUNDS = 3
"""Of answers at once, of which the quickest counts: whatever else the machine does only adds to them."""
_SEED = 0xCA11
_AHEAD_S = 0.02
"""Less than a request's prefill, and enough for it to be the first."""
_SETTLED = 2
"""Gaps between tokens that still carry the handoff."""


async def calibrate(served: Served, prefill: StepProfile, decode: StepProfile) -> Overheads:
    """Asks an idle cluster of paced workers that take prompts of LONG_TOKENS in one step; its profiles say what it
    should take. RuntimeError if an answer fails.
    """
    row = TraceRequest(arrival_s=None, input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
    rows = [row] * (ALONE + ROUNDS * AT_ONCE) + [replace(row, input_tokens=LONG_TOKENS)] * LONG
    requests = iter(trace_requests(rows, served.vocabulary, _SEED))
    alone = [await _ask(served, request) for request in islice(requests, ALONE)]
    rounds = [
        await asyncio.gather(*(_ask(served, request) for request in islice(requests, AT_ONCE))) for _ in range(ROUNDS)
    ]
    long = [await _ask(served, request) for request in requests]
    together = min(rounds, key=lambda found: _typical(_beyond_s(found, decode, AT_ONCE)))
    return overheads_of(alone, together, prefill, decode, long)


async def share_beside(served: Served, prompt_tokens: int) -> float:
    """By how much longer, as a share, an engine's decode steps take while another worker computes a prompt: an idle
    cluster of a prefill and a decode worker is asked without and with one, in turns, because a machine's pace changes.
    RuntimeError if an answer fails.
    """
    row = TraceRequest(arrival_s=None, input_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
    prompt = replace(row, input_tokens=prompt_tokens, output_tokens=1)
    requests = iter(trace_requests([row, row, prompt] * BESIDE, served.vocabulary, _SEED))
    pairs = [
        (await _ask(served, alone), await _ask_beside(served, disturbed, prompt))
        for alone, disturbed, prompt in zip(requests, requests, requests, strict=True)
    ]
    return share_of(pairs)


def share_of(pairs: Sequence[tuple[RequestRecord, RequestRecord]]) -> float:
    """Of answers (alone, disturbed): the median of what the disturbed ones took longer, at least 0. Pure."""
    return max(0.0, statistics.median(_step_s(disturbed) / _step_s(alone) - 1.0 for alone, disturbed in pairs))


def overheads_of(
    alone: Sequence[RequestRecord],
    together: Sequence[RequestRecord],
    prefill: StepProfile,
    decode: StepProfile,
    long: Sequence[RequestRecord] = (),
) -> Overheads:
    """From the answers seen; `long`: to prompts of LONG_TOKENS. Pure; nothing comes out below zero."""
    first_s = [_first_s(record) - prefill.step_time_s(PROMPT_TOKENS, PROMPT_TOKENS**2, 0, 0) for record in alone]
    step_s = max(0.0, _typical(_beyond_s(alone, decode, 1)))
    first_token_s = max(0.0, _typical(first_s) - step_s)
    second_s = [record.itls_s[0] - decode.step_time_s(0, 0, 1, PROMPT_TOKENS + 1) for record in alone]
    rpc_s = first_token_s / (2 * FIRST_TOKEN_CALLS)
    handoff_s = max(0.0, _typical(second_s) - step_s - rpc_s)
    rows_s = _typical(_beyond_s(together, decode, len(together))) if together else step_s
    row_s = max(0.0, rows_s - step_s) / max(1, len(together) - 1)
    token_s = 0.0
    if long:
        longer_s = [_first_s(record) - prefill.step_time_s(LONG_TOKENS, LONG_TOKENS**2, 0, 0) for record in long]
        token_s = max(0.0, _typical(longer_s) - _typical(first_s)) / (LONG_TOKENS - PROMPT_TOKENS)
    return Overheads(
        first_token_s=first_token_s, prompt_token_s=token_s, step_s=step_s, row_s=row_s, handoff_s=handoff_s
    )


def kept_overheads(path: Path, device: str) -> Overheads | None:
    """What `keep_overheads` wrote of that device; None: nothing. ValueError naming the file that is something else."""
    if not path.exists():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Overheads(**known[device]) if device in known else None
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"results: {path} holds no constants of a machine ({error})") from None


def keep_overheads(path: Path, device: str, found: Overheads) -> None:
    """Writes them beside those of other devices. Raises OSError."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | {device: asdict(found)}, indent=1) + "\n", encoding="utf-8")


def _typical(values_s: Sequence[float]) -> float:
    """The lower quartile."""
    return float(np.quantile(values_s, 0.25))


def _first_s(record: RequestRecord) -> float:
    assert record.ttft_s is not None
    return record.ttft_s


def _beyond_s(records: Sequence[RequestRecord], decode: StepProfile, rows: int) -> list[float]:
    """By how much longer than modelled the steps in the middle of each answer took, where all of `rows` run."""
    modelled_s = decode.step_time_s(0, 0, rows, rows * (PROMPT_TOKENS + OUTPUT_TOKENS // 2))
    return [_step_s(record) - modelled_s for record in records]


def _step_s(record: RequestRecord) -> float:
    """What steps in the middle of the answer took."""
    return statistics.fmean(record.itls_s[_SETTLED:-_SETTLED])


async def _ask_beside(served: Served, request: BenchRequest, prompt: BenchRequest) -> RequestRecord:
    """The answer to a request while whose decoding the `prompt` behind it is computed."""
    asked = asyncio.create_task(_ask(served, request))
    await asyncio.sleep(_AHEAD_S)
    await _ask(served, prompt, chunks=1)
    return await asked


async def _ask(served: Served, request: BenchRequest, *, chunks: int = 2 * _SETTLED + 2) -> RequestRecord:
    """RuntimeError where fewer than so many pieces came."""
    loop = asyncio.get_running_loop()
    record = await served.send(request, loop.time(), "")
    if record.error or len(record.chunk_times_s) < chunks:
        raise RuntimeError(f"calibration: {record.error or 'tokens came together'}")
    return record
