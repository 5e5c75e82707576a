"""Step plans and outputs survive the way to a rank and back; nothing else does."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.engine.plan import DRAWN, RowOutput, SampleSpec, StepOutput, StepPlan, StepRow
from tandem.cluster.engine.plan_wire import decode_output, decode_plan, encode_output, encode_plan
from tandem.cluster.types import MAX_SEED, MAX_TOP_LOGPROBS, SampledToken, SamplingParams

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PARAMS = st.builds(
    SamplingParams,
    temperature=FINITE,
    top_k=st.integers(-1, 2**31 - 1),
    top_p=FINITE,
    seed=st.integers(0, MAX_SEED),
    max_tokens=st.integers(1, 2**31 - 1),
    ignore_eos=st.booleans(),
    stop_token_ids=IDS.map(tuple),
    logit_bias=st.lists(st.tuples(st.integers(0, 2**31 - 1), FINITE), max_size=3).map(tuple),
    top_logprobs=st.none() | st.integers(0, MAX_TOP_LOGPROBS),
)
SAMPLES = st.builds(
    SampleSpec,
    params=PARAMS,
    output_index=st.integers(0, 2**31 - 1),
    prompt_token_ids=IDS,
    output_token_ids=IDS,
    banned_token_ids=IDS.map(tuple),
)
ROWS = st.builds(
    StepRow,
    seq_id=st.text(max_size=20),
    start=st.integers(0, 2**31 - 1),
    token_ids=IDS,
    block_ids=IDS,
    sample=st.none() | SAMPLES,
)
LOGPROBS = st.floats(max_value=0, allow_nan=False)
TOKENS = st.builds(
    SampledToken,
    token_id=st.integers(0, 2**31 - 1),
    logprob=st.none() | LOGPROBS,
    top=st.lists(st.tuples(st.integers(0, 2**31 - 1), LOGPROBS), max_size=3).map(tuple),
)
OUTPUT_ROWS = st.builds(
    RowOutput, seq_id=st.text(max_size=9), tokens=st.lists(TOKENS, max_size=3).map(tuple), error=st.text(max_size=9)
)


@given(st.integers(0, 2**63 - 1), st.lists(ROWS, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_plan_comes_back(plan_id: int, rows: list[StepRow]) -> None:
    plan = StepPlan(plan_id, tuple(rows))
    assert decode_plan(encode_plan(plan)) == plan


@given(st.integers(0, 2**63 - 1), st.lists(OUTPUT_ROWS, max_size=4), st.floats(0, 1e6))
@settings(max_examples=100, deadline=None)
def test_an_output_comes_back(plan_id: int, rows: list[RowOutput], duration_s: float) -> None:
    output = StepOutput(plan_id, tuple(rows), duration_s)
    assert decode_output(encode_output(output)) == output


PLAN = encode_plan(StepPlan(1, (StepRow("a", 0, [1, 2], [3], SampleSpec(SamplingParams(), 0, [1, 2], [])),)))


def changed(path: tuple[int, ...], value: Any) -> bytes:
    """The plan with one field replaced."""
    fields = msgpack.unpackb(PLAN)
    place = fields
    for index in path[:-1]:
        place = place[index]
    place[path[-1]] = value
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not msgpack"),
        (PLAN[:-1], "not msgpack"),
        (PLAN + b"\x00", "not msgpack"),
        (b"\x91" * 5000 + b"\x90", "not msgpack"),
        (b"\xdd\x7f\xff\xff\xff", "not msgpack"),
        (encode_output(StepOutput(1, ())), "not a message of kind 1"),
        (changed((1,), 2), "version 1"),
        (changed((2,), -1), "plan_id: not an integer in 0"),
        (changed((2,), True), "plan_id"),
        (changed((3,), "x"), "rows: not a list"),
        (changed((3, 0, 0), b"a"), "seq_id: not a text"),
        (changed((3, 0, 1), 2**31), "start"),
        (changed((3, 0, 2), b"abc"), "token_ids: not packed ids"),
        (changed((3, 0, 3), b"\xff\xff\xff\xff"), "block_ids: 4294967295 is more than"),
        (changed((3, 0, 4, 0, 0), math.nan), "temperature: not a number"),
        (changed((3, 0, 4, 0, 2), math.inf), "top_p: inf is not finite"),
        (changed((3, 0, 4, 0, 9), 0), "max_tokens"),
        (changed((3, 0, 4, 0, 11), 1), "ignore_eos: not a boolean"),
        (changed((3, 0, 4, 0, 14), [[1]]), "logit_bias: not a list of 2"),
    ],
)
def test_anything_else_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_plan(data)


def test_a_row_of_a_token_that_is_being_drawn_comes_back() -> None:
    """No other number below 0 does."""
    waiting = StepPlan(1, (StepRow("a", 5, [DRAWN], [1, 2]),))
    assert decode_plan(encode_plan(waiting)) == waiting
    for tokens in ([DRAWN, 3], [-2]):
        with pytest.raises(ValueError, match=r"token_ids: \d+ is more than"):
            decode_plan(encode_plan(StepPlan(1, (StepRow("a", 5, tokens, [1, 2]),))))
