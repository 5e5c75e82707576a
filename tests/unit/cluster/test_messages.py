"""Messages between members: what goes in comes out, up to float32; what no router sends is refused with its name."""

from __future__ import annotations

import math
import struct
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.messages import (
    sampling_from_proto,
    sampling_to_proto,
    sequence_from_proto,
    step_time_from_proto,
    step_time_to_proto,
    token_to_proto,
    tokens_from_proto,
    urgency_from_proto,
    urgency_to_proto,
)
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import MAX_SEED, Handoff, SampledToken, SamplingParams, StepTimeCoefficients, Urgency

F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
U32 = st.integers(0, 2**32 - 1)
LOGPROB = st.floats(width=32, max_value=0.0, allow_nan=False)
SAMPLING = st.builds(
    SamplingParams,
    temperature=F32,
    top_k=st.integers(0, 2**31 - 1),
    top_p=F32,
    min_p=F32,
    repetition_penalty=F32,
    presence_penalty=F32,
    frequency_penalty=F32,
    seed=st.integers(0, MAX_SEED),
    choice=U32,
    max_tokens=st.integers(1, 2**32 - 1),
    min_tokens=U32,
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(U32, max_size=4).map(tuple),
    logit_bias=st.dictionaries(U32, F32, max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
    top_logprobs=st.none() | st.integers(0, 20),
)
TOKENS = st.builds(
    SampledToken,
    token_id=U32,
    logprob=st.none() | LOGPROB,
    top=st.lists(st.tuples(U32, LOGPROB), max_size=3).map(tuple),
)


def over_the_wire(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


@given(SAMPLING)
def test_sampling_comes_back_whole(params: SamplingParams) -> None:
    assert sampling_from_proto(over_the_wire(sampling_to_proto(params))) == params


def test_every_sampling_field_travels() -> None:
    """A field added to `SamplingParams` and not to the message would be dropped without a word."""
    assert {field.name for field in fields(SamplingParams)} == set(pb.Sampling.DESCRIPTOR.fields_by_name)


@given(st.floats(0, 2))
def test_what_is_not_a_float32_is_rounded_the_same_on_every_hop(temperature: float) -> None:
    once = sampling_from_proto(over_the_wire(sampling_to_proto(SamplingParams(temperature=temperature))))
    assert once.temperature == struct.unpack("f", struct.pack("f", temperature))[0]
    assert sampling_from_proto(over_the_wire(sampling_to_proto(once))) == once


@given(st.lists(TOKENS, max_size=4))
def test_tokens_come_back_whole(tokens: list[SampledToken]) -> None:
    event = over_the_wire(pb.TokensEvent(tokens=[token_to_proto(token) for token in tokens]))
    assert tokens_from_proto(event.tokens) == tuple(tokens)


@given(st.tuples(*[st.floats(0, 1e6)] * 4))
def test_step_times_come_back_whole(values: tuple[float, ...]) -> None:
    coefficients = StepTimeCoefficients(*values)
    assert step_time_from_proto(over_the_wire(step_time_to_proto(coefficients))) == coefficients


def sequence(**changes: Any) -> pb.Sequence:
    values = {"prompt_token_ids": [1, 2], "output_token_ids": [3], "timeout_s": 5.0, "cache_salt": b"s", **changes}
    sampling = values.pop("sampling", sampling_to_proto(SamplingParams(max_tokens=4)))
    return pb.Sequence(request_id="q", sampling=sampling, **values)


def read(message: pb.Sequence, vocab_size: int = 10) -> Any:
    return sequence_from_proto(message, seq_id="q/0/p1", handoff=Handoff.OUT, now_s=100.0, vocab_size=vocab_size)


def test_a_sequence_is_read_as_arriving_now_on_this_clock() -> None:
    spec = read(over_the_wire(sequence()))
    assert (spec.seq_id, spec.handoff, spec.context_tokens) == ("q/0/p1", Handoff.OUT, 3)
    assert (spec.prompt_token_ids, spec.output_token_ids, spec.cache_salt) == ((1, 2), (3,), b"s")
    assert spec.arrival_s == 100.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids: empty"),
        ({"prompt_token_ids": [10]}, "prompt_token_ids: 10 is not in 0…9"),
        ({"output_token_ids": [9, 11]}, "output_token_ids: 11"),
        ({"timeout_s": 0.0}, "timeout_s: 0"),
        ({"timeout_s": math.nan}, "timeout_s: nan"),
        ({"timeout_s": math.inf}, "timeout_s: inf"),
        ({"urgency": pb.Urgency(share=-1.0)}, "urgency.share: -1"),
        ({"urgency": pb.Urgency(share=math.nan)}, "urgency.share: nan"),
        ({"urgency": pb.Urgency(share=1e-300)}, "urgency.share: 1e-300"),
        ({"urgency": pb.Urgency(share=math.inf)}, "urgency.share: inf"),
        ({"urgency": pb.Urgency(ttft_left_s=math.nan)}, "urgency.ttft_left_s: nan"),
        ({"sampling": pb.Sampling(max_tokens=0)}, "max_tokens: 0"),
        ({"sampling": pb.Sampling(max_tokens=1, top_p=math.nan)}, "top_p: nan"),
        ({"sampling": pb.Sampling(max_tokens=1, logit_bias={10: 1.0})}, "logit_bias: 10"),
        ({"sampling": pb.Sampling(max_tokens=1, logit_bias={1: math.inf})}, "logit_bias: inf"),
    ],
)
def test_what_no_router_sends_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(sequence(**changes))


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        sampling_from_proto(pb.Sampling(max_tokens=1, **{name: value}))


@pytest.mark.parametrize("deadline_s", [math.inf, 107.5, 3.0])
def test_an_urgency_travels_as_time_that_is_left(deadline_s: float) -> None:
    """Clocks differ: what is due in 7.5 s here is due in 7.5 s there, and what is late stays as late."""
    sent = urgency_to_proto(Urgency(slo_class="chat", share=4.0, deadline_s=deadline_s), now_s=100.0)
    assert urgency_from_proto(sent, now_s=900.0) == Urgency(slo_class="chat", share=4.0, deadline_s=deadline_s + 800.0)


def test_no_urgency_is_no_promise() -> None:
    assert urgency_from_proto(pb.Urgency(), now_s=5.0) == Urgency()
    assert read(sequence()).urgency == Urgency()
