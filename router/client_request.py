"""A client's arguments become one `GenerateRequest`, or a ValueError that names the argument, its value and what is
allowed.

Values go into the message as they are; only where the message cannot hold them are they looked at, with the router's
own checks (`params`), so that both say it in the same words. What fits into the message is the router's to refuse.
Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ..cluster.proto import tandem_v1_pb2 as pb
from .errors import InvalidRequest
from .params import MAX_INT32, MIN_SEED, Fields, Limits, parse_options, parse_token_ids, parse_top_logprobs, show

PROMPT_ARGUMENTS = ("text", "messages", "token_ids")
SAMPLING_FIELDS: tuple[str, ...] = tuple(pb.SamplingOptions.DESCRIPTOR.fields_by_name)
SLO_ARGUMENTS = ("slo_class", "slo_ttft_ms", "slo_tpot_ms")
_ARGUMENTS = (*PROMPT_ARGUMENTS, "model", "request_id", "timeout_s", *SLO_ARGUMENTS, *SAMPLING_FIELDS)
_OTHER_NAMES = {"prompt": "text", "logprobs": "top_logprobs", "max_completion_tokens": "max_tokens"}
"""What other clients call an argument."""
_ANY = Limits(
    vocab_size=MAX_INT32, max_model_len=MAX_INT32, max_choices=MAX_INT32, max_stop=MAX_INT32, default_max_tokens=None
)
"""The router knows the model; here only the message's own limits count."""


def check_arguments(given: Mapping[str, Any]) -> None:
    """ValueError for the first sampling option that does not exist, with the nearest ones first."""
    for name in sorted(given.keys() - set(SAMPLING_FIELDS)):
        meant = _OTHER_NAMES.get(name)
        near = [meant] if meant else difflib.get_close_matches(name, _ARGUMENTS, n=3)
        rest = [known for known in _ARGUMENTS if known not in near]
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name}: no such argument{hint}; allowed: {', '.join([*near, *rest])}")


def build_request(
    *,
    text: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    model: str,
    request_id: str,
    sampling: Mapping[str, Any],
    slo_class: str = "",
    slo_ttft_ms: float | None = None,
    slo_tpot_ms: float | None = None,
) -> pb.GenerateRequest:
    """The request for exactly one of `text`, `messages` and `token_ids`. Raises ValueError."""
    check_arguments(sampling)
    if sum(prompt is not None for prompt in (text, messages, token_ids)) != 1:
        raise ValueError("prompt: give exactly one of text, messages, token_ids")
    for name, value in (("text", text), ("model", model), ("request_id", request_id), ("slo_class", slo_class)):
        if value is not None:
            _check_text(name, value)
    for name, number in (("slo_ttft_ms", slo_ttft_ms), ("slo_tpot_ms", slo_tpot_ms)):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise ValueError(f"{name}: {show(number)} is not a number; allowed: milliseconds above 0")
    return pb.GenerateRequest(
        model=model,
        request_id=request_id,
        text=text,
        chat=None if messages is None else _chat(messages),
        tokens=None if token_ids is None else _tokens(token_ids),
        sampling=_sampling(sampling),
        slo_class=slo_class,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
    )


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: {show(value)} is not a string; allowed: a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise ValueError(
            f"{name}: has {code} at character {error.start}, a lone surrogate; allowed: Unicode text"
        ) from None


def _chat(messages: Sequence[Mapping[str, str]]) -> pb.ChatPrompt:
    allowed = "a list of messages, each with a role and a content"
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: {show(messages)} is not a list; allowed: {allowed}")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{name}: {show(message)} is no message; allowed: {allowed}")
        for key, value in message.items():
            if key not in ("role", "content"):
                raise ValueError(f"{name}.{key}: no such key; allowed: role, content")
            _check_text(f"{name}.{key}", value)
    return pb.ChatPrompt(messages=[pb.ChatMessage(**message) for message in messages])


def _tokens(token_ids: Sequence[int]) -> pb.TokenPrompt:
    try:
        return pb.TokenPrompt(token_ids=token_ids)
    except (TypeError, ValueError) as error:
        fields = Fields({"token_ids": token_ids})
        try:
            parse_token_ids(fields, "token_ids", fields.sequence("token_ids", "token ids", MAX_INT32), MAX_INT32)
        except InvalidRequest as refused:
            raise ValueError(refused.message) from None
        raise ValueError(f"token_ids: {error}") from None


def _sampling(given: Mapping[str, Any]) -> pb.SamplingOptions:
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(stop := options.get("stop"), str):
        options["stop"] = [stop]
    if isinstance(seed := options.get("seed"), int) and MIN_SEED <= seed < 0:
        options["seed"] = seed % 2**64  # as HTTP's door reads it
    try:
        return pb.SamplingOptions(**options)
    except (TypeError, ValueError) as error:
        fields = Fields(options)
        try:
            for text in parse_options(fields, _ANY, top_logprobs=parse_top_logprobs(fields, "top_logprobs")).stop:
                _check_text("stop", text)
        except InvalidRequest as refused:
            raise ValueError(refused.message) from None
        raise ValueError(f"sampling: {error}") from None
