"""OpenAI request bodies, checked: chat completions and completions become one `OpenAICall` each, or a 400 naming
the field.

The API is OpenAI's (platform.openai.com/docs/api-reference), with vLLM's extra sampling fields. Unknown fields are
tolerated, as OpenAI's are; a known field that asks for what is not built here is refused, never silently ignored.
Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InvalidRequest
from .params import (
    Fields,
    Limits,
    Options,
    check_prompt_length,
    parse_options,
    parse_token_ids,
    parse_top_logprobs,
    show,
)

MAX_PROMPTS = 128
"""Prompts in one completions request."""
MAX_MESSAGES = 4096
MAX_TOOL_CALLS = 128
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAICall:
    """A checked body. Chat has `messages`, completions `prompts`."""

    model: str
    options: Options
    stream: bool
    include_usage: bool
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    echo: bool = False


def _is_absent(value: Any) -> bool:
    return value is None or value is False or value in ("", 0) or (isinstance(value, list | dict) and not value)


def _is_plain_text(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and value.get("type") == "text")


_UNSUPPORTED = (
    *("audio", "functions", "function_call", "prediction", "web_search_options", "suffix", "use_beam_search"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "bad_words"),
    *("allowed_token_ids", "prompt_embeds", "logits_processors", "include_stop_str_in_output", "documents"),
    *("continue_final_message", "chat_template", "chat_template_kwargs", "mm_processor_kwargs"),
)
_NOT_BUILT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "response_format": (_is_plain_text, '{"type": "text"}'),
    "modalities": (lambda value: value in (None, [], ["text"]), '["text"]'),
    "truncate_prompt_tokens": (lambda value: value is None, "null"),
    "prompt_logprobs": (lambda value: value is None, "null"),
    **dict.fromkeys(_UNSUPPORTED, (_is_absent, "leaving it out")),
}
"""Fields whose silent loss would change an answer: when a value is harmless, and what is allowed."""


def refuse_what_is_not_built(fields: Fields) -> None:
    """InvalidRequest for a field that asks for something Tandem does not do."""
    for name in fields.among(_NOT_BUILT):
        value, (is_harmless, allowed) = fields.raw(name), _NOT_BUILT[name]
        if not is_harmless(value):
            raise fields.refuse(name, f"{show(value)} is not supported", allowed)
    tool_choice = fields.raw("tool_choice")
    if tool_choice not in (None, "none", "auto"):
        raise fields.refuse("tool_choice", f"{show(tool_choice)} is not supported", "'none'")
    if fields.raw("tools") and tool_choice != "none":
        raise fields.refuse("tools", "calling tools is not supported", "no tools, or tool_choice 'none'")


def parse_chat(body: Mapping[str, Any], limits: Limits) -> OpenAICall:
    """Checks a body of `/v1/chat/completions`."""
    fields = Fields(body)
    refuse_what_is_not_built(fields)
    wants_logprobs = fields.boolean("logprobs", False)
    top_logprobs = parse_top_logprobs(fields, "top_logprobs")
    if top_logprobs and not wants_logprobs:
        raise fields.refuse("top_logprobs", f"{top_logprobs} without logprobs", "top_logprobs only with logprobs: true")
    stream, include_usage = _parse_stream(fields)
    return OpenAICall(
        model=parse_model(fields),
        options=parse_options(fields, limits, top_logprobs=(top_logprobs or 0) if wants_logprobs else None),
        stream=stream,
        include_usage=include_usage,
        messages=parse_messages(fields),
    )


def parse_completion(body: Mapping[str, Any], limits: Limits) -> OpenAICall:
    """Checks a body of `/v1/completions`."""
    fields = Fields(body)
    refuse_what_is_not_built(fields)
    top_logprobs = parse_top_logprobs(fields, "logprobs")
    echo = fields.boolean("echo", False)
    if echo and top_logprobs is not None:
        raise fields.refuse("echo", "true together with logprobs is not supported", "echo without logprobs")
    if fields.raw("max_completion_tokens") is not None:
        raise fields.refuse("max_completion_tokens", "is a field of chat completions", "max_tokens")
    options = parse_options(fields, limits, top_logprobs=top_logprobs)
    best_of = fields.integer("best_of", 1, limits.max_choices)
    if best_of not in (None, options.n):
        raise fields.refuse("best_of", f"{best_of} is not supported", f"the same as n, {options.n}")
    stream, include_usage = _parse_stream(fields)
    return OpenAICall(
        model=parse_model(fields),
        options=options,
        stream=stream,
        include_usage=include_usage,
        prompts=parse_prompts(fields, limits),
        echo=echo,
    )


def parse_model(fields: Fields) -> str:
    """The model's name, which OpenAI's API wants in every request."""
    model = fields.string("model")
    if not model:
        raise fields.refuse("model", "is missing", "the id of a served model, see /v1/models")
    return model


def _parse_stream(fields: Fields) -> tuple[bool, bool]:
    stream = fields.boolean("stream", False)
    options = fields.mapping("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise fields.refuse("stream_options", "given without stream", "stream_options only with stream: true")
    return stream, Fields(options, prefix="stream_options.").boolean("include_usage", False)


def parse_prompts(fields: Fields, limits: Limits) -> tuple[Prompt, ...]:
    """`prompt`: a string, a list of strings, a list of token ids, or a list of lists of token ids."""
    prompt = fields.raw("prompt")
    allowed = f"a string, a list of token ids, or a list of at most {MAX_PROMPTS} of either"
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list):
        raise fields.refuse("prompt", "is missing" if prompt is None else f"{show(prompt)} is no prompt", allowed)
    if not prompt:
        raise fields.refuse("prompt", "is an empty list", allowed)
    if not isinstance(prompt[0], str | list):
        return (_token_prompt(fields, prompt, limits),)
    if len(prompt) > MAX_PROMPTS:
        raise fields.refuse("prompt", f"has {len(prompt)} prompts", allowed)
    prompts: list[Prompt] = []
    for item in prompt:
        if isinstance(item, str) and isinstance(prompt[0], str):
            prompts.append(item)
        elif isinstance(item, list) and isinstance(prompt[0], list):
            prompts.append(_token_prompt(fields, item, limits))
        else:
            raise fields.refuse("prompt", f"{show(item)} is not of the kind of the first prompt", allowed)
    return tuple(prompts)


def _token_prompt(fields: Fields, ids: list[Any], limits: Limits) -> tuple[int, ...]:
    # Length first: a list of a million ids is refused without a walk over it.
    check_prompt_length(len(ids), limits.max_model_len, param="prompt")
    return parse_token_ids(fields, "prompt", ids, limits.vocab_size)


def parse_messages(fields: Fields) -> tuple[dict[str, Any], ...]:
    """`messages`, with text parts joined, so that a chat template sees strings."""
    messages = fields.sequence("messages", "messages", MAX_MESSAGES)
    if not messages:
        raise fields.refuse("messages", "is missing or empty", "a list of at least one message")
    return tuple(_parse_message(message, f"{fields.prefix}messages[{index}]") for index, message in enumerate(messages))


def _parse_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{name}: {show(message)} is not an object; allowed: role and content", param=name)
    fields = Fields(message, prefix=f"{name}.")
    role = fields.string("role")
    if role not in ROLES:
        raise fields.refuse("role", "is missing" if role is None else f"{show(role)} is no role", ", ".join(ROLES))
    calls = fields.sequence("tool_calls", "tool calls", MAX_TOOL_CALLS)
    content = None if calls and fields.raw("content") is None else _parse_content(fields, fields.raw("content"))
    # "developer" is OpenAI's newer word for the system role; most models' templates know only the older.
    parsed: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if calls:
        parsed["tool_calls"] = list(calls)
    for extra in ("name", "tool_call_id"):
        value = fields.string(extra)
        if value is not None:
            parsed[extra] = value
    return parsed


def _parse_content(fields: Fields, content: Any) -> str:
    allowed = "a string, or a list of parts of type 'text'"
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise fields.refuse("content", "is missing" if content is None else f"{show(content)} is no text", allowed)
    texts: list[str] = []
    for index, part in enumerate(content):
        name = f"content[{index}]"
        if not isinstance(part, Mapping):
            raise fields.refuse(name, f"{show(part)} is not an object", allowed)
        if part.get("type") != "text":
            raise fields.refuse(f"{name}.type", f"{show(part.get('type'))} is not supported", "'text'")
        if not isinstance(part.get("text"), str):
            raise fields.refuse(f"{name}.text", f"{show(part.get('text'))} is not a string", "a string")
        texts.append(part["text"])
    return "\n".join(texts)
