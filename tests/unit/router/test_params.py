"""Options at the door: every field in range comes through, every other is refused by name; lengths are settled."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem.cluster.types import MAX_SEED, SamplingParams
from tandem.router.errors import ContextLengthExceeded, InvalidRequest
from tandem.router.params import Fields, Limits, check_prompt_length, parse_options

LIMITS = Limits(vocab_size=1000, max_model_len=100, max_choices=4, max_stop=2, default_max_tokens=None)


def parse(**values: Any) -> SamplingParams:
    return parse_options(Fields(values), LIMITS, top_logprobs=None).resolve(10, param="prompt")


def test_absent_and_null_take_openais_defaults() -> None:
    names = [name for name in SamplingParams.__slots__ if name not in {"choice", "top_logprobs"}]
    for params in (parse(), parse(**dict.fromkeys(names))):
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
        assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (90, 0, False)
        assert (params.stop_token_ids, params.logit_bias, params.top_logprobs) == ((), (), None)


def test_a_seed_is_drawn_where_none_came() -> None:
    assert parse().seed != parse().seed
    assert parse(seed=0).seed == 0
    assert parse(seed=MAX_SEED).seed == MAX_SEED
    assert parse(seed=-(2**63)).seed == 2**63


def test_edges_of_ranges_are_inside() -> None:
    assert parse(temperature=0).temperature == 0.0
    assert parse(temperature=2).temperature == 2.0
    assert parse(temperature=1e-7).temperature == 0.0, "too small to divide by: greedy"
    assert parse(top_k=-1).top_k == 0
    assert parse(top_p=1e-6).top_p == 1e-6
    assert parse(logit_bias={"0": -100, "999": 100}).logit_bias == ((0, -100.0), (999, 100.0))
    assert parse(stop_token_ids=[0, 999]).stop_token_ids == (0, 999)


def test_max_tokens_is_settled_by_the_prompt() -> None:
    def settled(prompt_tokens: int, default: int | None = None, **values: Any) -> int:
        limits = Limits(vocab_size=9, max_model_len=5000, max_choices=1, max_stop=1, default_max_tokens=default)
        return (
            parse_options(Fields(values), limits, top_logprobs=None).resolve(prompt_tokens, param="prompt").max_tokens
        )

    assert settled(10) == 1024
    assert settled(4999) == 1
    assert settled(10, default=7) == 7
    assert settled(10, default=7, min_tokens=20) == 20
    assert settled(10, max_tokens=4990) == 4990
    assert settled(10, max_tokens=3, max_completion_tokens=5) == 5
    with pytest.raises(
        ContextLengthExceeded, match="5000 tokens, but 10 in the prompt and 4991 for the answer make 5001"
    ):
        settled(10, max_tokens=4991)
    with pytest.raises(InvalidRequest, match="min_tokens: 2 is more than the 1 tokens"):
        settled(4999, min_tokens=2)


def test_prompt_length() -> None:
    check_prompt_length(99, 100, param="prompt")
    for length in (100, 101):
        with pytest.raises(ContextLengthExceeded, match=f"100 tokens, but the prompt has {length}"):
            check_prompt_length(length, 100, param="prompt")
    with pytest.raises(InvalidRequest, match="prompt: the prompt is empty"):
        check_prompt_length(0, 100, param="prompt")


def test_a_prefix_names_the_place() -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling\.n: 9 is out of range") as refused:
        parse_options(Fields({"n": 9}, prefix="sampling."), LIMITS, top_logprobs=None)
    assert refused.value.param == "sampling.n"


def test_long_values_are_shown_short() -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(temperature="x" * 10_000)
    assert len(refused.value.message) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a0.-", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("09a", max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
    *("max_tokens", "max_completion_tokens", "min_tokens", "n", "stop", "stop_token_ids", "logit_bias", "ignore_eos"),
    "skip_special_tokens",
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), st.integers(0, 120))
def test_whatever_comes_is_taken_or_refused_by_name(values: dict[str, Any], prompt_tokens: int) -> None:
    refusal: InvalidRequest | None = None
    try:
        options = parse_options(Fields(values), LIMITS, top_logprobs=None)
        params = options.resolve(prompt_tokens, param="prompt")
    except InvalidRequest as error:
        refusal = error
    if refusal is not None:
        assert refusal.param in {*values, "prompt", "max_tokens"}
        assert refusal.message.startswith(f"{refusal.param}:")
        return
    assert 0 <= params.temperature <= 2
    assert 0 < params.top_p <= 1
    assert params.top_k >= 0
    assert 0 <= params.min_tokens <= params.max_tokens <= LIMITS.max_model_len - prompt_tokens
    assert 0 <= params.seed <= MAX_SEED
    assert 1 <= options.n <= LIMITS.max_choices
    assert all(math.isfinite(bias) for _, bias in params.logit_bias)
    assert all(isinstance(item, str) and item for item in options.stop)
