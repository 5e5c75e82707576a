"""`tandem chat`: one question, or a conversation line by line, streamed over the OpenAI-style HTTP API."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from .bench.no_answer import NoAnswer
from .bench.server import served_model
from .tls import ClientTLS

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Where and how to ask; None: the server's default."""

    url: str
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    api_key: str | None = None
    tls: ClientTLS = field(default_factory=ClientTLS)


def chat(options: ChatOptions, prompt: str | None) -> int:
    """Answers `prompt`, or holds a conversation until end of input. Returns the exit code. Raises OSError."""
    if not options.url.startswith(("http://", "https://")):
        raise ValueError(f"url: {options.url!r} is not allowed; allowed: http://host:port")
    model = options.model or served_model(options.url, options.api_key, options.tls)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    if prompt is not None:
        _print_answer(options, model, [*messages, {"role": "user", "content": prompt}])
        return 0
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() history and editing

        print(f"{model}  (/new starts over, Ctrl-C stops an answer, Ctrl-D ends)")
    start = list(messages)
    while (line := _ask()) is not None:
        if line.strip() == "/new":
            messages = list(start)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _print_answer(options, model, messages)})
        except OSError as error:
            messages.pop()
            print(f"tandem: {error}", file=sys.stderr)
    return 0


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _print_answer(options: ChatOptions, model: str, messages: list[dict[str, str]]) -> str:
    """Streams the answer to stdout and returns it; Ctrl-C in a conversation ends the answer and its request."""
    text = ""
    try:
        for piece in stream_chat(options, model, messages):
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print()
    return text


def stream_chat(options: ChatOptions, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
    """The pieces of the answer as they come. Raises OSError with the server's own message."""
    body: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
    for name in ("max_tokens", "temperature", "seed"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
    url = options.url.rstrip("/") + "/v1/chat/completions"
    answered = False
    secure = options.tls.context_for(url) or False
    try:
        with (
            httpx.Client(timeout=_TIMEOUT, trust_env=False, verify=secure) as client,
            client.stream("POST", url, json=body, headers=headers) as answer,
        ):
            answered = True
            if answer.status_code != 200:
                raise OSError(_error(answer.status_code, answer.read()))
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip()
                if data and data != "[DONE]" and line.startswith("data:"):
                    yield _piece(json.loads(data))
    except httpx.HTTPError as error:
        if not answered:
            raise NoAnswer(url, error) from None
        raise OSError(f"{url}: the answer broke off ({error or type(error).__name__})") from None


def _piece(message: dict[str, Any]) -> str:
    if message.get("error"):
        raise OSError(str(message["error"].get("message", message["error"])))
    choices = message.get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


def _error(status: int, body: bytes) -> str:
    try:
        return f"HTTP {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
