"""Reads a streamed answer of any OpenAI-style server: events with their times in, a request's record out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from ..workload.report import RequestRecord


@dataclass(slots=True)
class _Reading:
    """What the events have told so far."""

    shown: list[tuple[float, str]] = field(default_factory=list)
    """Time and text of every piece."""
    silent: list[float] = field(default_factory=list)
    """Times of pieces without text that neither open nor close the answer."""
    closed_s: float | None = None
    """When a piece without text said why the answer ended."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finished: bool = False
    error: str = ""


def split_events(pieces: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Cuts a body that came in pieces, each with its time, into events, each with the time of its last byte."""
    events: list[tuple[float, bytes]] = []
    rest = b""
    for when_s, piece in pieces:
        if not rest and piece.find(b"\n\n") == len(piece) - 2 >= 0 and b"\r" not in piece:
            events.append((when_s, piece[:-2]))
            continue
        if b"\r" in piece or rest.endswith(b"\r"):
            piece, rest = (rest + piece).replace(b"\r\n", b"\n"), b""
        *whole, rest = (rest + piece).split(b"\n\n")
        events.extend((when_s, event) for event in whole)
    if rest.strip():
        events.append((pieces[-1][0], rest))
    return events


def read_events(
    status: int,
    events: Sequence[tuple[float, bytes]],
    error: str,
    *,
    due_s: float,
    sent_s: float,
    prompt_tokens: int = 0,
    ended_s: float | None = None,
) -> RequestRecord:
    """Makes a record from the events of a stream.

    A piece of output is an event whose choice carries text. One without text is a piece only where the counted output
    tokens leave room for it (a token that shows no text of its own), not where a server fills silence with empty
    deltas; the chat stream's opening event, which only names the role, and a last one that only says why the answer
    ended are none, unless nothing else came. Output tokens are those of the usage event, or the pieces where the server
    sends none; prompt tokens likewise, or `prompt_tokens`.
    """
    reading = _Reading(error=error)
    if status and status != 200:
        body = b"\n\n".join(event for _, event in events)
        reading.error = error or f"HTTP {status}: {error_message(body)}"
    else:
        _read_all(events, reading)
    if not reading.error and not reading.finished:
        reading.error = "the stream had no end"
    times = [when_s for when_s, _ in reading.shown]
    if reading.silent and len(times) + len(reading.silent) <= (reading.output_tokens or 0):
        times = sorted(times + reading.silent)
    if not times and reading.closed_s is not None:
        times = [reading.closed_s]
    return RequestRecord(
        due_s=due_s,
        sent_s=sent_s,
        first_token_s=times[0] if times else None,
        last_token_s=times[-1] if times else None,
        chunk_times_s=tuple(times),
        prompt_tokens=prompt_tokens if reading.prompt_tokens is None else reading.prompt_tokens,
        output_tokens=len(times) if reading.output_tokens is None else reading.output_tokens,
        text="".join(text for _, text in reading.shown),
        error=reading.error,
        ended_s=ended_s,
    )


def _read_all(events: Sequence[tuple[float, bytes]], reading: _Reading) -> None:
    """Runs once for every token of the load, on the processor that the server wants too."""
    loads = orjson.loads
    for when_s, event in events:
        data = event[6:] if event.startswith(b"data: ") and b"\n" not in event else _data(event)
        if not data:
            continue
        if data == b"[DONE]":
            reading.finished = True
            continue
        try:
            well_made = _read_message(loads(data), data, when_s, reading)
        except orjson.JSONDecodeError:
            well_made = False
        if not well_made:
            reading.error = reading.error or "an event is not what such a stream is made of"
            return


def _read_message(message: Any, data: bytes, when_s: float, reading: _Reading) -> bool:
    """False where the message, its choices or its usage do not have the types that such streams have."""
    if type(message) is not dict:
        return False
    if message.get("error"):
        reading.error = reading.error or error_message(data)
        return True
    if usage := message.get("usage"):
        if type(usage) is not dict:
            return False
        counts = (
            usage.get("prompt_tokens", reading.prompt_tokens),
            usage.get("completion_tokens", reading.output_tokens),
        )
        if not all(count is None or type(count) is int for count in counts):
            return False
        reading.prompt_tokens, reading.output_tokens = counts
    choices = message.get("choices") or ()
    return type(choices) is tuple or (
        type(choices) is list and all(_read_choice(choice, when_s, reading) for choice in choices)
    )


def _read_choice(choice: Any, when_s: float, reading: _Reading) -> bool:
    if type(choice) is not dict:
        return False
    part = choice.get("delta")
    if part is None:
        part = choice
    elif type(part) is not dict:
        return False
    text = part.get("content") or part.get("text") or part.get("reasoning_content") or part.get("reasoning")
    if text:
        if type(text) is not str:
            return False
        reading.shown.append((when_s, text))
    elif part.get("tool_calls"):
        reading.shown.append((when_s, ""))
    elif choice.get("finish_reason"):
        reading.closed_s = when_s
    elif "role" not in part:
        reading.silent.append(when_s)
    return True


def _data(event: bytes) -> bytes:
    """The event's data; comments, ids and names of events are none."""
    lines = event.strip().split(b"\n")
    if len(lines) == 1 and not lines[0].startswith((b":", b"event:", b"id:", b"retry:")):
        return lines[0].removeprefix(b"data:").strip()
    return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


def error_message(body: bytes) -> str:
    """What an error's body says, on one line."""
    try:
        error = orjson.loads(body.strip().removeprefix(b"data:")).get("error")
    except (orjson.JSONDecodeError, AttributeError):
        return " ".join(body[:200].decode("utf-8", "replace").split())
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message).split())
