"""Step plans and step outputs as bytes: what the leader of a worker sends to the ranks of its replica, and their
answers.

msgpack, no pickle. Token and block ids travel as packed little-endian u32, so that a long prompt is one copy and no
list is allocated on a sender's word. Whatever does not parse is a ValueError naming the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from ..types import MAX_SEED, MAX_TOP_LOGPROBS, SampledToken, SamplingParams
from .plan import DRAWN, RowOutput, SampleSpec, StepOutput, StepPlan, StepRow

VERSION = 1
MAX_ROWS = 65_536
MAX_TOKENS_PER_ROW = 1024
"""Drawn in one step: more than any speculation draws."""
MAX_BIASES = 4096
MAX_TEXT_BYTES = 4096
MAX_IDS_BYTES = 4 * 2**24
_PLAN, _OUTPUT = 1, 2
_DRAWN = np.array([DRAWN], dtype="<i4").tobytes()
"""The tokens of a row that goes on from one that is being drawn."""
_U31, _U63 = 2**31 - 1, 2**63 - 1


def encode_plan(plan: StepPlan) -> bytes:
    """The inverse of `decode_plan`."""
    return _pack([_PLAN, VERSION, plan.plan_id, [_row_fields(row) for row in plan.rows]])


def decode_plan(data: bytes) -> StepPlan:
    """ValueError for anything but an encoded plan."""
    plan_id, rows = _unpack(data, _PLAN, 4)
    return StepPlan(
        plan_id=_int(plan_id, "plan_id", _U63), rows=tuple(_row(row) for row in _list(rows, "rows", MAX_ROWS))
    )


def encode_output(output: StepOutput) -> bytes:
    """The inverse of `decode_output`."""
    rows = [
        [row.seq_id, [[t.token_id, t.logprob, [list(pair) for pair in t.top]] for t in row.tokens], row.error]
        for row in output.rows
    ]
    return _pack([_OUTPUT, VERSION, output.plan_id, rows, output.duration_s])


def decode_output(data: bytes) -> StepOutput:
    """ValueError for anything but an encoded output."""
    plan_id, rows, duration_s = _unpack(data, _OUTPUT, 5)
    duration_s = _finite(duration_s, "duration_s")
    if duration_s < 0:
        raise ValueError(f"duration_s: {duration_s} is negative")
    return StepOutput(
        plan_id=_int(plan_id, "plan_id", _U63),
        rows=tuple(_row_output(row) for row in _list(rows, "rows", MAX_ROWS)),
        duration_s=duration_s,
    )


def _pack(fields: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def _unpack(data: bytes, kind: int, length: int) -> list[Any]:
    """What follows kind and version."""
    try:
        fields = msgpack.unpackb(
            data,
            max_array_len=min(MAX_ROWS, len(data)),
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=MAX_IDS_BYTES,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ValueError(f"not msgpack: {error}") from error
    if not isinstance(fields, list) or len(fields) != length or fields[:2] != [kind, VERSION]:
        raise ValueError(f"not a message of kind {kind}, version {VERSION}, with {length} fields")
    return fields[2:]


def _row_fields(row: StepRow) -> list[Any]:
    sample = None if row.sample is None else _sample_fields(row.sample)
    tokens = np.asarray(row.token_ids, dtype="<i4").tobytes()
    return [row.seq_id, row.start, tokens, _packed(row.block_ids), sample]


def _row(fields: object) -> StepRow:
    seq_id, start, token_ids, block_ids, sample = _fields(fields, "row", 5)
    return StepRow(
        seq_id=_text(seq_id, "seq_id"),
        start=_int(start, "start", _U31),
        token_ids=[DRAWN] if token_ids == _DRAWN else _ids(token_ids, "token_ids"),
        block_ids=_ids(block_ids, "block_ids"),
        sample=None if sample is None else _sample(sample),
    )


def _sample_fields(sample: SampleSpec) -> list[Any]:
    p = sample.params
    shape = [p.temperature, p.top_k, p.top_p, p.min_p]
    penalties = [p.repetition_penalty, p.presence_penalty, p.frequency_penalty]
    draw = [p.seed, p.choice, p.max_tokens, p.min_tokens, p.ignore_eos, p.top_logprobs]
    bias = [list(pair) for pair in p.logit_bias]
    params = [*shape, *penalties, *draw, _packed(p.stop_token_ids), bias]
    context = [_packed(sample.prompt_token_ids), _packed(sample.output_token_ids), _packed(sample.banned_token_ids)]
    return [params, sample.output_index, *context]


def _sample(fields: object) -> SampleSpec:
    params, output_index, prompt, output, banned = _fields(fields, "sample", 5)
    return SampleSpec(
        params=_params(params),
        output_index=_int(output_index, "output_index", _U31),
        prompt_token_ids=_ids(prompt, "prompt_token_ids"),
        output_token_ids=_ids(output, "output_token_ids"),
        banned_token_ids=tuple(_ids(banned, "banned_token_ids")),
    )


def _params(fields: object) -> SamplingParams:
    values = _fields(fields, "params", 15)
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    temperature, top_p, min_p, repetition, presence, frequency = (
        _finite(values[index], name) for index, name in zip((0, 2, 3, 4, 5, 6), floats, strict=True)
    )
    ignore_eos, top_logprobs = values[11], values[12]
    if not isinstance(ignore_eos, bool):
        raise ValueError("ignore_eos: not a boolean")
    pairs = [_fields(pair, "logit_bias", 2) for pair in _list(values[14], "logit_bias", MAX_BIASES)]
    return SamplingParams(
        temperature=temperature,
        top_k=_int(values[1], "top_k", _U31, lowest=-1),
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        seed=_int(values[7], "seed", MAX_SEED),
        choice=_int(values[8], "choice", _U31),
        max_tokens=_int(values[9], "max_tokens", _U31, lowest=1),
        min_tokens=_int(values[10], "min_tokens", _U31),
        ignore_eos=ignore_eos,
        top_logprobs=None if top_logprobs is None else _int(top_logprobs, "top_logprobs", MAX_TOP_LOGPROBS),
        stop_token_ids=tuple(_ids(values[13], "stop_token_ids")),
        logit_bias=tuple((_int(token, "logit_bias", _U31), _finite(bias, "logit_bias")) for token, bias in pairs),
    )


def _row_output(fields: object) -> RowOutput:
    seq_id, tokens, error = _fields(fields, "row", 3)
    return RowOutput(
        seq_id=_text(seq_id, "seq_id"),
        tokens=tuple(_token(token) for token in _list(tokens, "tokens", MAX_TOKENS_PER_ROW)),
        error=_text(error, "error"),
    )


def _token(fields: object) -> SampledToken:
    token_id, logprob, top = _fields(fields, "token", 3)
    pairs = [_fields(pair, "top", 2) for pair in _list(top, "top", MAX_TOP_LOGPROBS)]
    return SampledToken(
        token_id=_int(token_id, "token_id", _U31),
        logprob=None if logprob is None else _number(logprob, "logprob"),
        top=tuple((_int(token, "top", _U31), _number(value, "top")) for token, value in pairs),
    )


def _packed(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<u4").tobytes()


def _ids(value: object, name: str) -> list[int]:
    if not isinstance(value, bytes) or len(value) % 4:
        raise ValueError(f"{name}: not packed ids")
    ids: list[int] = np.frombuffer(value, dtype="<u4").tolist()
    if ids and max(ids) > _U31:
        raise ValueError(f"{name}: {max(ids)} is more than {_U31}")
    return ids


def _list(value: object, name: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name}: not a list of at most {most}")
    return value


def _fields(value: object, name: str, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name}: not a list of {count} fields")
    return value


def _int(value: object, name: str, highest: int, *, lowest: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(f"{name}: not an integer in {lowest}…{highest}")
    return value


def _number(value: object, name: str) -> float:
    """Not NaN; the logarithm of nothing is minus infinity."""
    if not isinstance(value, float | int) or isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"{name}: not a number")
    return float(value)


def _finite(value: object, name: str) -> float:
    number = _number(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name}: {number} is not finite")
    return number


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: not a text")
    return value
