"""From options to what is sent and when. Pure but for reading the dataset's file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..workload.arrivals import arrival_times, ramp_times
from ..workload.datasets import BenchRequest, prompt_requests, random_requests
from ..workload.traces import (
    MAX_TOKENS,
    Fitted,
    TraceRequest,
    arrival_times_of,
    block_tokens_of,
    draw_rows,
    fit_trace,
    read_trace,
    trace_requests,
)
from .options import BenchOptions

_WARMUP_SEED = 0x5EED


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests, when each is due (seconds from the start), and others to warm up with."""

    requests: tuple[BenchRequest, ...]
    arrivals_s: tuple[float, ...]
    warmups: tuple[BenchRequest, ...]
    notes: tuple[str, ...] = ()
    """What a reader of the numbers should know: what was clipped, dropped or repeated."""


def make_workload(options: BenchOptions, vocabulary: Sequence[int], max_model_len: int | None) -> Workload:
    """Draws it up. `vocabulary`: ids of random tokens, unused for prompts; `max_model_len`: None where unknown.

    Raises ValueError.
    """
    warm_seed = options.seed ^ _WARMUP_SEED
    if options.dataset_name == "trace":
        return _of_trace(options, vocabulary, max_model_len or MAX_TOKENS, warm_seed)

    def draw(count: int, seed: int) -> tuple[BenchRequest, ...]:
        if count == 0:
            return ()
        if options.dataset_name == "prompts":
            path, eos = options.dataset_path, options.ignore_eos
            return prompt_requests(count, options.output_len, path, seed, ignore_eos=eos)
        lengths = (options.random_input_len, options.random_output_len)
        return random_requests(count, *lengths, vocabulary, seed, options.random_range_ratio)

    return Workload(
        requests=draw(options.num_prompts, options.seed),
        arrivals_s=_arrivals(options, options.num_prompts),
        warmups=draw(options.num_warmups, warm_seed),
    )


def _arrivals(options: BenchOptions, count: int) -> tuple[float, ...]:
    if options.ramp_up_strategy is None:
        return arrival_times(count, options.request_rate, options.burstiness, options.seed)
    assert options.ramp_up_start_rps is not None
    assert options.ramp_up_end_rps is not None
    edges = (options.ramp_up_start_rps, options.ramp_up_end_rps)
    return ramp_times(count, options.ramp_up_strategy, *edges, options.burstiness, options.seed)


def _of_trace(options: BenchOptions, vocabulary: Sequence[int], max_model_len: int, warm_seed: int) -> Workload:
    """As recorded, from its beginning; or drawn from all of it, with a rate of one's own or lengths alone."""
    assert options.dataset_path is not None
    replayed = math.isinf(options.request_rate) and options.ramp_up_strategy is None
    trace = read_trace(options.dataset_path)
    replayed = replayed and trace[0].arrival_s is not None
    block_tokens = block_tokens_of(trace)
    if replayed:
        trace = trace[: options.num_prompts]
    elif options.rate_scale != 1.0:
        raise ValueError(
            f"rate_scale: {options.rate_scale:g} is not allowed; allowed for recorded times, without request_rate"
        )
    fitted = fit_trace(
        trace,
        max_model_len=max_model_len,
        max_input_tokens=options.max_input_len,
        max_output_tokens=options.max_output_len,
        clip=options.over_length == "clip",
    )
    if not fitted.rows:
        raise ValueError(
            f"dataset_path: no request fits into the caps and the model's context of {max_model_len} tokens"
        )
    rows = fitted.rows if replayed else draw_rows(fitted.rows, options.num_prompts, options.seed)
    arrivals = arrival_times_of(rows, options.rate_scale) if replayed else None
    warm_rows = draw_rows([_unshared(row) for row in fitted.rows], options.num_warmups, warm_seed)
    return Workload(
        requests=trace_requests(rows, vocabulary, options.seed, block_tokens),
        arrivals_s=_arrivals(options, len(rows)) if arrivals is None else arrivals,
        warmups=trace_requests(warm_rows, vocabulary, warm_seed),
        notes=_notes(fitted, options, len(trace), len(rows)),
    )


def _unshared(row: TraceRequest) -> TraceRequest:
    return TraceRequest(arrival_s=None, input_tokens=row.input_tokens, output_tokens=row.output_tokens)


def _notes(fitted: Fitted, options: BenchOptions, considered: int, sent: int) -> tuple[str, ...]:
    notes = []
    if fitted.clipped:
        notes.append(
            f"{fitted.clipped} of the trace's {considered} requests were clipped to the caps; "
            "clipped prompts share nothing"
        )
    if fitted.dropped:
        notes.append(
            f"{fitted.dropped} of the trace's {considered} requests were dropped: over the caps or the context"
        )
    if sent < options.num_prompts:
        notes.append(f"{sent} requests instead of {options.num_prompts}: the trace has no more")
    if sent > len(fitted.rows):
        notes.append(f"the trace's {len(fitted.rows)} lengths were used more than once")
    return tuple(notes)
