"""OpenAI response bodies, streamed and whole, from the service's deltas.

A `Responder` turns the deltas of one call into JSON objects; `ChatResponder` and `CompletionResponder` differ in
shape only. Stream order per OpenAI: a chunk with the role for every choice (chat), content chunks, a chunk with the
finish reason, then the usage chunk where asked for; `[DONE]` is the transport's (`http_exchange`). Pure.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from ..cluster.types import FinishReason, SampledToken
from .service import Delta
from .tokenizer_base import Tokenizer

MIN_LOGPROB = -9999.0
"""JSON has no infinity; what vLLM and OpenAI write for a token of probability 0."""

Json = dict[str, Any]
_MARK = "\x00 the text \x00"
"""No other value of a chunk: a response's id and its model's name have no control characters."""


def server_sent(values: Iterable[Json]) -> bytes:
    """One event (`data:`) an object."""
    return b"".join([b"data: " + orjson.dumps(value) + b"\n\n" for value in values])


@dataclass(slots=True)
class Usage:
    """Token counts of one call. A prompt counts once, whatever `n` is."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Counts a delta; cached tokens are those of a prompt's choice 0, because the others find what it computed."""
        self.completion_tokens += len(delta.tokens)
        if delta.timings is not None and delta.choice == 0:
            self.cached_tokens += delta.timings.cached_tokens

    def to_json(self) -> Json:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class _Choice:
    """What has come of one choice so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    finish_reason: FinishReason | None = None


def token_name(piece: bytes) -> str:
    r"""A token as text; one that is only part of a character as OpenAI writes it: `bytes:\xe2\x80`."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def json_logprob(logprob: float | None) -> float:
    """A logprob that JSON can carry."""
    return MIN_LOGPROB if logprob is None else max(logprob, MIN_LOGPROB)


class Responder(ABC):
    """Shapes one call's answer. `choice` is the index in the answer: prompt * n + the delta's own."""

    object: str
    chunk_object: str

    def __init__(
        self,
        *,
        response_id: str,
        model: str,
        created_unix_s: int,
        tokenizer: Tokenizer,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._head = {"id": response_id, "object": self.object, "created": created_unix_s, "model": model}
        self._chunk_head = {**self._head, "object": self.chunk_object}
        self._tokenizer = tokenizer
        self._wants_logprobs = logprobs
        self._choices: dict[int, _Choice] = {}
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        """What stands before and behind the text in a choice's events."""
        self._include_usage = include_usage

    def _chunk(self, choice: Json) -> Json:
        chunk = {**self._chunk_head, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, usage: Usage) -> Json:
        """The last chunk where `stream_options.include_usage` is set."""
        return {**self._chunk_head, "choices": [], "usage": usage.to_json()}

    @abstractmethod
    def opening_chunks(self, choices: int) -> list[Json]:
        """What a stream begins with, sent when the first delta is there."""

    @abstractmethod
    def chunks(self, choice: int, delta: Delta) -> list[Json]:
        """The stream's chunks for one delta; none for a delta that shows nothing yet."""

    def events(self, choice: int, delta: Delta) -> bytes:
        """The same as server-sent events. A delta of nothing but text, as most are, is its JSON between two constant
        pieces.
        """
        if self._wants_logprobs or delta.finish_reason is not None:
            return server_sent(self.chunks(choice, delta))
        if not delta.text:
            return b""
        frame = self._frames.get(choice)
        if frame is None:
            chunk = self.chunks(choice, Delta(choice=delta.choice, text=_MARK))
            before, _, after = server_sent(chunk).partition(orjson.dumps(_MARK))
            frame = self._frames[choice] = (before, after)
        return frame[0] + orjson.dumps(delta.text) + frame[1]

    @abstractmethod
    def _logprob_entries(self, choice: int, tokens: tuple[SampledToken, ...]) -> list[Json]:
        """One entry a token."""

    @abstractmethod
    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        """One choice of the whole answer."""

    def collect(self, choice: int, delta: Delta) -> None:
        """Adds a delta to the whole answer."""
        collected = self._choices.setdefault(choice, _Choice())
        collected.text.append(delta.text)
        if self._wants_logprobs:
            collected.logprobs += self._logprob_entries(choice, delta.tokens)
        if delta.finish_reason is not None:
            collected.finish_reason = delta.finish_reason

    def body(self, usage: Usage) -> Json:
        """The whole answer of what was collected."""
        choices = [self._whole_choice(index, choice) for index, choice in sorted(self._choices.items())]
        return {**self._head, "choices": choices, "usage": usage.to_json()}


class ChatResponder(Responder):
    """`/v1/chat/completions`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _delta(self, choice: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        return self._chunk({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason})

    def opening_chunks(self, choices: int) -> list[Json]:
        return [self._delta(index, {"role": "assistant", "content": ""}, None, None) for index in range(choices)]

    def chunks(self, choice: int, delta: Delta) -> list[Json]:
        chunks = []
        entries = self._logprob_entries(choice, delta.tokens) if self._wants_logprobs else []
        if delta.text or entries:
            chunks.append(self._delta(choice, {"content": delta.text}, {"content": entries} if entries else None, None))
        if delta.finish_reason is not None:
            chunks.append(self._delta(choice, {}, None, delta.finish_reason.value))
        return chunks

    def _logprob_entries(self, choice: int, tokens: tuple[SampledToken, ...]) -> list[Json]:
        return [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top],
            }
            for token in tokens
        ]

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        piece = self._tokenizer.token_bytes(token_id)
        return {"token": token_name(piece), "logprob": json_logprob(logprob), "bytes": list(piece)}

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": {"content": choice.logprobs, "refusal": None} if self._wants_logprobs else None,
            "finish_reason": choice.finish_reason and choice.finish_reason.value,
        }


class CompletionResponder(Responder):
    """`/v1/completions`. `echoes`: the prompt's text for every choice, or nothing."""

    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *, echoes: list[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self._echoes = echoes
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._offsets: dict[int, int] = {}

    def opening_chunks(self, choices: int) -> list[Json]:
        if self._echoes is None:
            return []
        return [self._text(index, self._echoes[index], None, None) for index in range(choices)]

    def _text(self, choice: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return self._chunk({"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish_reason})

    def chunks(self, choice: int, delta: Delta) -> list[Json]:
        entries = self._logprob_entries(choice, delta.tokens) if self._wants_logprobs else []
        if not (delta.text or entries or delta.finish_reason):
            return []
        finish_reason = None if delta.finish_reason is None else delta.finish_reason.value
        return [self._text(choice, delta.text, _columns(entries) if entries else None, finish_reason)]

    def _logprob_entries(self, choice: int, tokens: tuple[SampledToken, ...]) -> list[Json]:
        entries = []
        decoder = self._decoders.setdefault(choice, codecs.getincrementaldecoder("utf-8")("replace"))
        for token in tokens:
            piece = self._tokenizer.token_bytes(token.token_id)
            offset = self._offsets.get(choice, 0)
            # Whole characters only: the bytes of a split character begin where that character will stand.
            self._offsets[choice] = offset + len(decoder.decode(piece))
            top = {token_name(self._tokenizer.token_bytes(id_)): json_logprob(logprob) for id_, logprob in token.top}
            # OpenAI: the chosen token is in the list, whether or not it is among the most likely.
            top.setdefault(token_name(piece), json_logprob(token.logprob))
            entries.append(
                {
                    "tokens": token_name(piece),
                    "token_logprobs": json_logprob(token.logprob),
                    "top_logprobs": top,
                    "text_offset": offset,
                }
            )
        return entries

    def _whole_choice(self, index: int, choice: _Choice) -> Json:
        echo = self._echoes[index] if self._echoes is not None else ""
        return {
            "index": index,
            "text": echo + "".join(choice.text),
            "logprobs": _columns(choice.logprobs) if self._wants_logprobs else None,
            "finish_reason": choice.finish_reason and choice.finish_reason.value,
        }


def _columns(entries: list[Json]) -> Json:
    """OpenAI's legacy logprobs: one list a column."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry[name] for entry in entries] for name in names}
