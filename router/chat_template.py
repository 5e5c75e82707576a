"""Chat messages to one prompt text, by the model's own Jinja template, as `transformers` renders it.

Templates come with models, messages from anyone: the sandbox is immutable, the output is bounded, and whatever goes
wrong while rendering is the request's fault as far as the client can tell (templates refuse by `raise_exception`). What
the sandbox does not bound is the time and the memory that a hostile template takes before it gives output: serve models
whose files you trust that far.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import InvalidRequest
from .params import json_kind

_T = TypeVar("_T")

MAX_PROMPT_CHARS = 8 * 2**20
"""A rendered prompt longer than this is refused; no model here has a context that could hold it."""


MAX_WIDTH = 1000
"""That a template may pad or indent to."""


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_text: str,
    eos_text: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> str:
    """The prompt for `messages`, to be encoded with `add_special=False`: templates write BOS themselves.

    `kwargs` are further variables for the template. Raises `InvalidRequest` naming the field: a model without a
    template, messages of the wrong shape, content that is not text, a refusal or failure of the template, a prompt too
    long.
    """
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    variables = {
        **kwargs,
        "messages": plain_messages(messages),
        "tools": [dict(tool) for tool in tools] if tools else None,
        "documents": kwargs.get("documents"),
        "bos_token": bos_text,
        "eos_token": eos_text,
        "add_generation_prompt": add_generation_prompt,
    }
    return _render(compile_chat_template(template), variables)


@functools.lru_cache(maxsize=16)
def compile_chat_template(template: str) -> jinja2.Template:
    """Raises ValueError for a template that is not Jinja: call it at start, to fail before the first request."""
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
    except (RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"chat template: {type(error).__name__} while compiling it") from error


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    parts: list[str] = []
    size_chars = 0
    try:
        for part in template.generate(variables):
            size_chars += len(part)
            if size_chars > MAX_PROMPT_CHARS:
                raise InvalidRequest(
                    f"messages: the rendered prompt is over {MAX_PROMPT_CHARS} characters", param="messages"
                )
            parts.append(part)
    except InvalidRequest:
        raise
    except Exception as error:  # a template is a program: any error in it can be provoked by the messages
        reason = f"{error}" or type(error).__name__
        raise InvalidRequest(f"messages do not fit the model's chat template: {reason}", param="messages") from error
    return "".join(parts)


# -- the environment that templates are written for ------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Also refuses the short ways to a huge value; else constants are multiplied while compiling."""

    intercepted_binops = frozenset({"*", "**", "%"})
    _widening = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size_of_result(operator, left, right) > MAX_PROMPT_CHARS:
            raise jinja2.TemplateError(f"the result of {operator!r} would be too large")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in self._widening:
            return False
        return super().is_safe_attribute(obj, attr, value)


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """At least as much as characters, items or bits of `left operator right`, where that is more than its operands'."""
    if operator == "%":
        return sum(int(digits) for digits in re.findall(r"\d{1,18}", left)) if isinstance(left, str) else 0
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
    if operator == "*":
        for items, count in ((left, right), (right, left)):
            if isinstance(items, str | list | tuple) and isinstance(count, int):
                return len(items) * max(count, 0)
    return 0


def _narrow(name: str, filter_: Callable[..., str]) -> Callable[..., str]:
    """A filter of Jinja's whose numbers widen its result."""

    def narrowed(text: Any, *args: Any, **kwargs: Any) -> str:
        if any(isinstance(value, int) and value > MAX_WIDTH for value in (*args, *kwargs.values())):
            raise jinja2.TemplateError(f"{name}: a width of more than {MAX_WIDTH}")
        return filter_(text, *args, **kwargs)

    return narrowed


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _narrow("tojson", _tojson)
    for name in ("center", "indent"):
        environment.filters[name] = _narrow(name, environment.filters[name])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; prompts must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    """Local wall-clock time: some templates tell the model the date. Not a time that Tandem decides anything by."""
    return datetime.datetime.now().strftime(format_)


# -- messages --------------------------------------------------------------------------------------------------------


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages as templates expect them: content is text (or None beside tool calls), a tool call's arguments
    are an object. Raises `InvalidRequest(param="messages")`, naming the place.
    """
    if not messages:
        raise InvalidRequest("messages is empty; at least one message is needed", param="messages")
    return [_plain_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _plain_message(place: str, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(place, message, "an object")
    if not isinstance(message.get("role"), str):
        raise _wrong(f"{place}.role", message.get("role"), "text")
    plain = dict(message)
    calls = message.get("tool_calls")
    if calls is not None:
        plain["tool_calls"] = _plain_list(f"{place}.tool_calls", calls, _plain_tool_call)
    plain["content"] = _plain_content(f"{place}.content", message.get("content"), optional=bool(calls))
    return plain


def _plain_content(place: str, content: object, *, optional: bool) -> str | None:
    if isinstance(content, str) or (content is None and optional):
        return content
    if isinstance(content, Sequence):
        return "\n".join(_plain_list(place, content, _text_part))
    raise _wrong(place, content, "text or a list of text parts")


def _text_part(place: str, part: object) -> str:
    if not isinstance(part, Mapping):
        raise _wrong(place, part, "an object with type and text")
    if part.get("type") != "text":
        raise InvalidRequest(f"{place}.type is {part.get('type')!r}; allowed: 'text'", param="messages")
    text = part.get("text")
    if not isinstance(text, str):
        raise _wrong(f"{place}.text", text, "text")
    return text


def _plain_tool_call(place: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _wrong(place, call, "an object with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise _wrong(f"{place}.function.arguments", arguments, "a JSON object") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _plain_list(place: str, items: object, plain: Callable[[str, object], _T]) -> list[_T]:
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise _wrong(place, items, "a list")
    return [plain(f"{place}[{i}]", item) for i, item in enumerate(items)]


def _wrong(place: str, value: object, wanted: str) -> InvalidRequest:
    shown = "missing" if value is None else f"{str(value)[:80]!r} ({json_kind(value)})"
    return InvalidRequest(f"{place} is {shown}; wanted: {wanted}", param="messages")
