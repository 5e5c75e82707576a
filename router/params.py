"""Checks at the door: options from a client become `SamplingParams`, or an error that names the field.

Both front ends (HTTP and gRPC) hand their options over as one mapping, so that a value is allowed or refused in one
place and in the same words. `None` means absent, as in OpenAI's API. Pure.
"""

from __future__ import annotations

import secrets
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..cluster.types import MAX_SEED, MAX_TOP_LOGPROBS, SamplingParams
from .errors import ContextLengthExceeded, InvalidRequest

MAX_STOP_CHARS = 1024
"""Of one stop string: the detokenizer holds back as much text as could still become one."""
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_INT32 = 2**31 - 1
DEFAULT_MAX_TOKENS_CAP = 1024
"""Of a request that names no `max_tokens`: what the context still holds, at most this."""
GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing logits by it would overflow single precision."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MIN_SEED = -(2**63)
_SHOWN_CHARS = 80

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What options are checked against."""

    vocab_size: int
    max_model_len: int
    max_choices: int
    max_stop: int
    default_max_tokens: int | None


def show(value: object) -> str:
    """A client's value, short enough for an error message."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def json_kind(value: object) -> str:
    """What a value is in JSON's words, for an error message."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


class Fields:
    """Typed reading of a mapping that came from outside. Every method raises InvalidRequest naming field, value,
    allowed.
    """

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "") -> None:
        self._values = values
        self.prefix = prefix

    def raw(self, name: str) -> Any:
        """The value as it came; None if absent."""
        return self._values.get(name)

    def among(self, names: Container[str]) -> list[str]:
        """Those of them that are there, null or not, as they came."""
        return [name for name in self._values if name in names]

    def refuse(self, name: str, problem: str, allowed: str) -> InvalidRequest:
        """The error to raise about a field."""
        param = self.prefix + name
        return InvalidRequest(f"{param}: {problem}; allowed: {allowed}", param=param)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high]; a boolean or a float is none."""
        value = self.raw(name)
        if value is None:
            return None
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if is_integer and low <= value <= high:
            return int(value)
        problem = "is out of range" if is_integer else "is not an integer"
        raise self.refuse(name, f"{show(value)} {problem}", f"an integer from {low} to {high}")

    def number(self, name: str, low: float, high: float, *, above_low: bool = False) -> float | None:
        """A finite number in [low, high], or in (low, high]."""
        value = self.raw(name)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and low <= value <= high and not (above_low and value == low):
            return float(value)
        problem = "is out of range" if is_number else "is not a number"
        allowed = f"a number {'above' if above_low else 'from'} {low:g} {'up ' if above_low else ''}to {high:g}"
        raise self.refuse(name, f"{show(value)} {problem}", allowed)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, f"{show(value)} is not a boolean", "true or false")
        return value

    def string(self, name: str) -> str | None:
        """A string."""
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.refuse(name, f"{show(value)} is not a string", "a string")
        return value

    def sequence(self, name: str, what: str, max_items: int) -> Sequence[Any]:
        """A list of at most `max_items`; empty if absent."""
        value = self.raw(name)
        if value is None:
            return ()
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
            raise self.refuse(name, f"{show(value)} is not a list", f"a list of {what}")
        if len(value) > max_items:
            raise self.refuse(name, f"has {len(value)} entries", f"at most {max_items} {what}")
        return value

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object."""
        value = self.raw(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.refuse(name, f"{show(value)} is not an object", "an object")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Checked options of one request, before the length of its prompt is known."""

    limits: Limits
    prefix: str
    n: int
    stop: tuple[str, ...]
    skip_special_tokens: bool
    max_tokens: int | None
    max_tokens_field: str
    sampling: SamplingParams
    """With `max_tokens` still to be set."""

    def resolve(self, prompt_tokens: int, *, param: str) -> SamplingParams:
        """The sampling parameters for a prompt of that many tokens, read from the field `param`.

        Raises ContextLengthExceeded, naming both numbers, where the prompt leaves no room for an output token or an
        explicit `max_tokens` does not fit.
        """
        check_prompt_length(prompt_tokens, self.limits.max_model_len, param=param)
        room = self.limits.max_model_len - prompt_tokens
        if self.max_tokens is None:
            wanted = self.limits.default_max_tokens or DEFAULT_MAX_TOKENS_CAP
            max_tokens = min(max(wanted, self.sampling.min_tokens), room)
        elif self.max_tokens > room:
            name = self.prefix + self.max_tokens_field
            raise ContextLengthExceeded(
                f"{name}: this model's maximum context length is {self.limits.max_model_len} tokens, but "
                f"{prompt_tokens} in the prompt and {self.max_tokens} for the answer make "
                f"{prompt_tokens + self.max_tokens}; allowed: at most {room} for this prompt",
                param=name,
            )
        else:
            max_tokens = self.max_tokens
        if self.sampling.min_tokens > max_tokens:
            name = f"{self.prefix}min_tokens"
            raise InvalidRequest(
                f"{name}: {self.sampling.min_tokens} is more than the {max_tokens} tokens the answer may have; "
                f"allowed: an integer from 0 to {max_tokens}",
                param=name,
            )
        return replace(self.sampling, max_tokens=max_tokens)


def check_prompt_length(prompt_tokens: int, max_model_len: int, *, param: str) -> None:
    """Refuses an empty prompt, and one that leaves no room for a single output token."""
    if prompt_tokens == 0:
        raise InvalidRequest(f"{param}: the prompt is empty; allowed: at least one token", param=param)
    if prompt_tokens >= max_model_len:
        raise ContextLengthExceeded(
            f"{param}: this model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{prompt_tokens}; allowed: at most {max_model_len - 1}, which leaves room for one output token",
            param=param,
        )


def parse_options(fields: Fields, limits: Limits, *, top_logprobs: int | None) -> Options:
    """Checks everything about how to answer, except what depends on the prompt's length (`Options.resolve`).

    `top_logprobs` comes apart, because the chat, completions and gRPC APIs spell it differently.
    """
    max_tokens_field = "max_tokens" if fields.raw("max_completion_tokens") is None else "max_completion_tokens"
    fields.integer("max_tokens", 1, MAX_INT32)
    n = fields.integer("n", 1, limits.max_choices)
    return Options(
        limits=limits,
        prefix=fields.prefix,
        n=1 if n is None else n,
        stop=parse_stop(fields, limits.max_stop),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        max_tokens=fields.integer(max_tokens_field, 1, MAX_INT32),
        max_tokens_field=max_tokens_field,
        sampling=_parse_sampling(fields, limits, top_logprobs),
    )


def _parse_sampling(fields: Fields, limits: Limits, top_logprobs: int | None) -> SamplingParams:
    temperature = _default(fields.number("temperature", 0.0, 2.0), 1.0)
    top_k = _default(fields.integer("top_k", -1, MAX_INT32), 0)
    seed = fields.integer("seed", MIN_SEED, MAX_SEED)
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=max(top_k, 0),
        top_p=_default(fields.number("top_p", 0.0, 1.0, above_low=True), 1.0),
        min_p=_default(fields.number("min_p", 0.0, 1.0), 0.0),
        repetition_penalty=_default(
            fields.number("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY), 1.0
        ),
        presence_penalty=_default(fields.number("presence_penalty", -2.0, 2.0), 0.0),
        frequency_penalty=_default(fields.number("frequency_penalty", -2.0, 2.0), 0.0),
        seed=secrets.randbits(63) if seed is None else seed % 2**64,
        min_tokens=_default(fields.integer("min_tokens", 0, MAX_INT32), 0),
        ignore_eos=fields.boolean("ignore_eos", False),
        stop_token_ids=parse_token_ids(
            fields,
            "stop_token_ids",
            fields.sequence("stop_token_ids", "token ids", MAX_STOP_TOKEN_IDS),
            limits.vocab_size,
        ),
        logit_bias=parse_logit_bias(fields, limits.vocab_size),
        top_logprobs=top_logprobs,
    )


def _default(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def parse_top_logprobs(fields: Fields, name: str) -> int | None:
    """A number of most likely tokens to report, from 0 to MAX_TOP_LOGPROBS."""
    return fields.integer(name, 0, MAX_TOP_LOGPROBS)


def parse_stop(fields: Fields, max_stop: int) -> tuple[str, ...]:
    """Stop strings: one string or a list, without repetitions."""
    value = fields.raw("stop")
    if not isinstance(value, str | Sequence | None):
        raise fields.refuse(
            "stop", f"{show(value)} is neither a string nor a list", "a string or a list of stop strings"
        )
    items = [value] if isinstance(value, str) else fields.sequence("stop", "stop strings", max_stop)
    allowed = f"a string, or a list of at most {max_stop} strings, each of 1 to {MAX_STOP_CHARS} characters"
    for item in items:
        if not isinstance(item, str):
            raise fields.refuse("stop", f"{show(item)} is not a string", allowed)
        if not 1 <= len(item) <= MAX_STOP_CHARS:
            raise fields.refuse("stop", f"{show(item)} has {len(item)} characters", allowed)
    return tuple(dict.fromkeys(items))


def parse_token_ids(fields: Fields, name: str, ids: Sequence[Any], vocab_size: int) -> tuple[int, ...]:
    """Token ids below `vocab_size`; the sequence was read from the field `name`."""
    ids = tuple(ids)  # a message makes its numbers anew each time they are looked at
    # At once, because it may be a whole context; booleans are integers, but not of that type.
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return ids
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise fields.refuse(
                name, f"{show(token_id)} is not a token id of this model", f"integers from 0 to {vocab_size - 1}"
            )
    return ids


def parse_logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """OpenAI's `{"token id": bias}`; ids as decimal strings (JSON) or integers (gRPC), biases from -100 to 100."""
    bias = fields.mapping("logit_bias")
    if bias is None:
        return ()
    allowed = f"token ids from 0 to {vocab_size - 1}, each with a number from -100 to 100"
    if len(bias) > MAX_LOGIT_BIAS:
        raise fields.refuse("logit_bias", f"has {len(bias)} entries", f"at most {MAX_LOGIT_BIAS}")
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        text = str(key)
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < vocab_size):
            raise fields.refuse("logit_bias", f"{show(key)} is not a token id of this model", allowed)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fields.refuse("logit_bias", f"{show(value)} is not a number", allowed)
        if not -100 <= value <= 100:
            raise fields.refuse("logit_bias", f"{show(value)} is out of range", allowed)
        pairs[int(text)] = float(value)
    return tuple(pairs.items())
