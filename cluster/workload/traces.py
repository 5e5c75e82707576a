"""Recorded loads: when requests came and how long they were. Prompts are made up to the recorded lengths, sharing
blocks where the trace says that the real ones did.

Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`, one for each 512 tokens; Qin et
al. 2024), or CSV with a head, gzipped or not: `arrival_s,input_tokens,output_tokens[,prefix_hashes]`, where an empty
`arrival_s` says that only the lengths were recorded; Azure's `TIMESTAMP,ContextTokens,GeneratedTokens` (Patel et al.
2024), whose timestamps are dates; BurstGPT's `Timestamp,…,Request tokens,Response tokens,…` (Wang et al. 2024), whose
requests without an answer have failed and are left out.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from .datasets import BenchRequest
from .text_file import numbered_lines, parse_json

BLOCK_TOKENS = 512
"""Of a hashed block, in Mooncake's traces; other traces tell by their lengths (`block_tokens_of`)."""
MAX_TOKENS = 2**24
MAX_HASHES = 2**16
MAX_ARRIVAL_S = 366 * 86400.0
MAX_REQUESTS = 2**20
MAX_BLOCK_ID = 2**63 - 1
_CSV_FIELDS = ("arrival_s", "input_tokens", "output_tokens")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURST_GPT = ("Timestamp", "Request tokens", "Response tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One recorded request."""

    arrival_s: float | None
    """From the trace's own beginning; None: only the lengths are known."""
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    """Equal leading ids: a shared prefix, as many tokens each as `block_tokens_of` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """What a file holds."""

    rows: tuple[TraceRequest, ...]
    """By arrival, the first at 0."""
    disordered: int = 0
    """Requests that came before the one above them in the file."""


def read_trace(path: str | Path, limit: int = MAX_REQUESTS) -> tuple[TraceRequest, ...]:
    """The first `limit` requests by arrival, the first at 0. Raises ValueError naming file, line and field."""
    return read_trace_file(path).rows[:limit]


def read_trace_file(path: str | Path) -> TraceFile:
    """All of it. ValueError as `read_trace`."""
    lines = numbered_lines(path)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"dataset_path: {str(path)!r} has no requests")
    read = _json_rows if first[1].startswith("{") else _csv_rows
    found: list[TraceRequest] = []
    for row in read(first, lines, str(path)):
        if len(found) == MAX_REQUESTS:
            raise ValueError(f"dataset_path: {str(path)!r} has more than {MAX_REQUESTS} requests")
        found.append(row)
    if not found:
        raise ValueError(f"dataset_path: {str(path)!r} has no requests")
    times = [row.arrival_s or 0.0 for row in found]
    disordered = sum(after < before for before, after in pairwise(times))
    return TraceFile(rows=_from_zero(found, str(path)), disordered=disordered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A trace as it can be sent, and what that cost it."""

    rows: tuple[TraceRequest, ...]
    clipped: int = 0
    """Requests that were shortened to the caps."""
    dropped: int = 0
    """Requests over the caps or the model's context."""


def fit_trace(
    trace: Sequence[TraceRequest],
    *,
    max_model_len: int,
    max_input_tokens: int | None = None,
    max_output_tokens: int | None = None,
    clip: bool = True,
) -> Fitted:
    """Holds every request to the caps: clipped to them, or dropped; dropped where it exceeds the model's context.

    A clipped prompt shares nothing: cut down to their common beginnings, all of a conversation's would be the same.
    """
    rows: list[TraceRequest] = []
    clipped = 0
    for row in trace:
        prompt = min(row.input_tokens, max_input_tokens or MAX_TOKENS)
        output = min(row.output_tokens, max_output_tokens or MAX_TOKENS)
        over = (prompt, output) != (row.input_tokens, row.output_tokens)
        if prompt + output > max_model_len or (over and not clip):
            continue
        clipped += over
        if over:
            blocks = row.block_ids if prompt == row.input_tokens else ()
            row = replace(row, input_tokens=prompt, output_tokens=output, block_ids=blocks)
        rows.append(row)
    return Fitted(rows=tuple(rows), clipped=clipped, dropped=len(trace) - len(rows))


def draw_rows(rows: Sequence[TraceRequest], count: int, seed: int) -> tuple[TraceRequest, ...]:
    """`count` of them in an order drawn by `seed`: all once, then all again, for lengths that have no times."""
    draw = random.Random(seed)
    found: list[TraceRequest] = []
    while len(found) < count:
        found += draw.sample(rows, min(len(rows), count - len(found)))
    return tuple(found)


def block_tokens_of(trace: Sequence[TraceRequest]) -> int:
    """Tokens that one block id stands for: the power of two nearest to what the lengths say; none: BLOCK_TOKENS."""
    ratios = sorted(row.input_tokens / len(row.block_ids) for row in trace if row.block_ids)
    return 2 ** round(math.log2(max(1.0, ratios[len(ratios) // 2]))) if ratios else BLOCK_TOKENS


def trace_requests(
    trace: Sequence[TraceRequest], vocabulary: Sequence[int], seed: int, block_tokens: int = BLOCK_TOKENS
) -> tuple[BenchRequest, ...]:
    """A prompt of exactly its length for each."""
    make = _PromptMaker(vocabulary, seed, block_tokens)
    return tuple(
        BenchRequest(prompt=make.prompt(index, row), max_tokens=row.output_tokens, ignore_eos=True)
        for index, row in enumerate(trace)
    )


class _PromptMaker:
    """Draws blocks by their id, so that equal ids give equal tokens, and the rest by the request's place."""

    def __init__(self, vocabulary: Sequence[int], seed: int, block_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._seed = seed
        self._block_tokens = block_tokens
        self._block = lru_cache(maxsize=4096)(self._draw_block)

    def prompt(self, index: int, row: TraceRequest) -> tuple[int, ...]:
        tokens: list[int] = []
        for block_id in row.block_ids[: -(-row.input_tokens // self._block_tokens)]:
            tokens += self._block(block_id)
        missing = row.input_tokens - len(tokens)
        if missing > 0:
            tokens += self._draw(f"request {index}", missing)
        return tuple(tokens[: row.input_tokens])

    def _draw_block(self, block_id: int) -> list[int]:
        return self._draw(f"block {block_id}", self._block_tokens)

    def _draw(self, name: str, count: int) -> list[int]:
        return random.Random(f"{self._seed}/{name}").choices(self._vocabulary, k=count)


def _from_zero(rows: list[TraceRequest], path: str) -> tuple[TraceRequest, ...]:
    times = [row.arrival_s for row in rows if row.arrival_s is not None]
    if not times:
        return tuple(rows)
    if len(times) != len(rows):
        raise ValueError(f"dataset_path: {path!r} has arrival times for {len(times)} of {len(rows)} requests")
    start_s = min(times)
    rows.sort(key=lambda row: row.arrival_s or 0.0)
    return tuple(
        TraceRequest(
            arrival_s=(row.arrival_s or 0.0) - start_s,
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            block_ids=row.block_ids,
        )
        for row in rows
    )


def _json_rows(first: tuple[int, str], rest: Iterator[tuple[int, str]], path: str) -> Iterator[TraceRequest]:
    for number, text in (first, *rest):
        where = f"{path}:{number}"
        row = parse_json(text, where)
        if not isinstance(row, dict):
            raise ValueError(f"dataset_path: {where} is no object")
        hashes = row.get("hash_ids", [])
        if not isinstance(hashes, list) or len(hashes) > MAX_HASHES:
            raise _wrong(where, "hash_ids", hashes, f"a list of at most {MAX_HASHES} integers")
        yield TraceRequest(
            arrival_s=_arrival(row.get("timestamp"), where, "timestamp", 1000.0),
            input_tokens=_whole(row.get("input_length"), where, "input_length", 1, MAX_TOKENS),
            output_tokens=_whole(row.get("output_length"), where, "output_length", 1, MAX_TOKENS),
            block_ids=tuple(_whole(item, where, "hash_ids", 0, MAX_BLOCK_ID) for item in hashes),
        )


def _csv_rows(first: tuple[int, str], rest: Iterator[tuple[int, str]], path: str) -> Iterator[TraceRequest]:
    names = _cells(first[1].removeprefix("\ufeff"), f"{path}:{first[0]}")
    columns = next((found for found in (_CSV_FIELDS, _AZURE, _BURST_GPT) if set(found) <= set(names)), None)
    if columns is None:
        missing = next(name for name in _CSV_FIELDS if name not in names)
        raise ValueError(
            f"dataset_path: {path}:{first[0]} has no column {missing!r}; allowed: JSON lines, or CSV with "
            f"{', '.join(_CSV_FIELDS)} and perhaps prefix_hashes, or that of Azure's or BurstGPT's traces"
        )
    arrival, prompt, answer = columns
    begin: datetime | None = None
    for number, text in rest:
        where = f"{path}:{number}"
        cells = _cells(text, where)
        if len(cells) != len(names):
            raise ValueError(f"dataset_path: {where} has {len(cells)} columns, its head {len(names)}")
        row = dict(zip(names, cells, strict=True))
        if columns is _BURST_GPT and row[answer] == "0":
            continue
        hashes = row.get("prefix_hashes", "").split()
        if len(hashes) > MAX_HASHES:
            raise _wrong(where, "prefix_hashes", hashes, f"at most {MAX_HASHES} integers")
        if columns is _AZURE:
            at = _date(row[arrival], where, arrival)
            begin = begin or datetime(at.year, 1, 1, tzinfo=at.tzinfo)
            arrival_s: float | None = (at - begin).total_seconds()
        else:
            arrival_s = _number(row[arrival], where, arrival)
        yield TraceRequest(
            arrival_s=_arrival(arrival_s, where, arrival, 1.0),
            input_tokens=_digits(row[prompt], where, prompt, 1, MAX_TOKENS),
            output_tokens=_digits(row[answer], where, answer, 1, MAX_TOKENS),
            block_ids=tuple(_digits(item, where, "prefix_hashes", 0, MAX_BLOCK_ID) for item in hashes),
        )


def _date(text: str, where: str, field: str) -> datetime:
    """A date and time, in UTC where it does not say."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise _wrong(where, field, text, "a date and time, e.g. 2023-11-16 18:15:46.68") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _cells(text: str, where: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([text], strict=True))]
    except csv.Error as error:
        raise ValueError(f"dataset_path: {where} is not CSV ({error})") from None


def _number(text: str, where: str, field: str) -> float | None:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise _wrong(where, field, text, "seconds") from None


def _digits(text: str, where: str, field: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise _wrong(where, field, text, f"an integer from {low} to {high}")
    return _whole(int(text), where, field, low, high)


def _arrival(value: object, where: str, field: str, per_second: float) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_ARRIVAL_S * per_second:
        raise _wrong(where, field, value, f"a number from 0 to {MAX_ARRIVAL_S * per_second:g}")
    return float(value) / per_second


def _whole(value: Any, where: str, field: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _wrong(where, field, value, f"an integer from {low} to {high}")
    return value


def _is_huge(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value.bit_length() > 256


def _wrong(where: str, field: str, value: object, allowed: str) -> ValueError:
    # The text of an integer of any length would take its time.
    shown = "missing" if value is None else f"{value.bit_length()} bits long" if _is_huge(value) else repr(value)[:80]
    return ValueError(f"dataset_path: {where}: {field} is {shown}; allowed: {allowed}")


def arrival_times_of(rows: Sequence[TraceRequest], rate_scale: float = 1.0) -> tuple[float, ...] | None:
    """When each request is due, from the first of them, `rate_scale` times faster than recorded; None: lengths only."""
    times = [row.arrival_s for row in rows]
    if not times or any(time is None or not math.isfinite(time) for time in times):
        return None
    start_s = times[0] or 0.0
    return tuple(((time or 0.0) - start_s) / rate_scale for time in times)
