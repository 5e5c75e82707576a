"""Costs of steps, whatever the model, the device and the split: positive, growing with every size, adding up."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.latency.hardware import known_hardware, load_hardware
from tandem.cluster.latency.memory import DoesNotFit, worker_memory
from tandem.cluster.latency.model_facts import ModelFacts, model_facts
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.latency.profile_fit import StepSample, fit_profile
from tandem.cluster.latency.roofline import Roofline

MODELS = ("opt-13b", "opt-66b", "llama-2-70b", "llama-3.1-8b", "qwen2.5-0.5b", "smollm2-135m")
SPLITS = ((1, 1), (2, 1), (1, 2), (2, 3), (8, 2))
SIZES = st.tuples(
    st.integers(0, 20_000), st.integers(0, 10**9), st.integers(0, 3000), st.integers(0, 10**7)
)  # prefill tokens and squares, decode rows, context tokens
SECONDS = st.floats(0.0, 0.1)


@cache
def facts_of(name: str) -> ModelFacts:
    return model_facts(name)


@cache
def roofline(name: str, device: str, split: tuple[int, int]) -> Roofline | None:
    facts = facts_of(name)
    return None if facts.config.num_heads % split[0] else Roofline(facts, load_hardware(device), *split)


ROOFLINES = [
    pytest.param(name, device, split, id=f"{name}-{device}-{split[0]}x{split[1]}")
    for number, (name, device) in enumerate((n, d) for n in MODELS for d in known_hardware())
    for split in (SPLITS[number % len(SPLITS)],)
    if facts_of(name).config.num_heads % split[0] == 0
]


@pytest.mark.parametrize(("name", "device", "split"), ROOFLINES)
@settings(max_examples=40, deadline=None)
@given(shape=SIZES, more=st.integers(1, 5000))
def test_a_step_takes_longer_with_more_of_anything(
    name: str, device: str, split: tuple[int, int], shape: tuple[int, int, int, int], more: int
) -> None:
    costs = roofline(name, device, split)
    assert costs is not None
    whole, stage = costs.step_time_s(*shape), costs.stage_time_s(*shape)
    assert 0.0 < stage <= whole * (1 + 1e-9)
    assert whole <= stage * costs.pipeline_stages * 1.01  # the embedding stands in no slowest stage
    for size in range(4):
        grown = tuple(value + more * (number == size) for number, value in enumerate(shape))
        assert costs.step_time_s(*grown) >= whole
        assert costs.stage_time_s(*grown) >= stage


@st.composite
def profiles(draw: st.DrawFn) -> StepProfile:
    decode = DecodeTerms(step_s=draw(SECONDS), row_s=draw(SECONDS), context_token_s=draw(SECONDS))
    return StepProfile(
        prefill_step_s=draw(SECONDS),
        prefill_token_s=draw(SECONDS),
        prefill_square_s=draw(SECONDS),
        decode=decode,
        large_decode=decode,
        large_batch_rows=1,
        overhead_s=draw(SECONDS),
        overhead_token_s=draw(SECONDS),
        pipeline_stages=draw(st.integers(1, 8)),
    )


@settings(max_examples=200, deadline=None)
@given(profile=profiles(), shape=SIZES, more=st.integers(1, 5000))
def test_a_profile_grows_with_every_size(profile: StepProfile, shape: tuple[int, int, int, int], more: int) -> None:
    whole, stage = profile.step_time_s(*shape), profile.stage_time_s(*shape)
    assert 0.0 <= stage <= whole * (1 + 1e-9)
    assert whole <= stage * profile.pipeline_stages * (1 + 1e-9)
    for size in range(4):
        grown = tuple(value + more * (number == size) for number, value in enumerate(shape))
        assert profile.step_time_s(*grown) >= whole


@settings(max_examples=100, deadline=None)
@given(profile=profiles(), rows=st.integers(1, 300), context=st.integers(1, 10**5), steps=st.integers(1, 60))
def test_a_run_of_decode_steps_is_its_steps(profile: StepProfile, rows: int, context: int, steps: int) -> None:
    for costs in (profile, roofline("opt-13b", "a100-80g", (2, 1))):
        assert costs is not None
        one_by_one = np.cumsum([costs.step_time_s(0, 0, rows, context + step * rows) for step in range(steps)])
        assert np.allclose(costs.decode_steps(rows, context, steps), one_by_one, rtol=1e-9, atol=0.0)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(MODELS), tensor=st.sampled_from((1, 2, 3, 4, 8)), stages=st.sampled_from((1, 2, 3, 4)))
def test_splitting_a_model_never_needs_more_memory(name: str, tensor: int, stages: int) -> None:
    facts, device = facts_of(name), load_hardware("a100-80g")
    if facts.config.num_heads % (2 * tensor):
        return
    for wider in ((2 * tensor, stages), (tensor, 2 * stages)):
        assert facts.weight_bytes_per_rank(*wider) <= facts.weight_bytes_per_rank(tensor, stages)
        assert facts.kv_bytes_per_token_per_rank(*wider) <= facts.kv_bytes_per_token_per_rank(tensor, stages)
        try:
            tokens = worker_memory(facts, device, tensor, stages).tokens
        except DoesNotFit:
            continue
        assert worker_memory(facts, device, *wider).tokens >= tokens


@settings(max_examples=30, deadline=None)
@given(profile=profiles(), noise=st.lists(st.floats(0.7, 1.4), min_size=30, max_size=30))
def test_a_fit_is_never_negative_and_says_what_it_was_given(profile: StepProfile, noise: list[float]) -> None:
    shapes = [(length, length**2, 0, 0) for length in range(10, 1510, 100)]
    shapes += [(0, 0, rows, rows * 50) for rows in range(1, 46, 3)]
    samples = [
        StepSample(*shape, seconds=max(profile.step_time_s(*shape), 1e-4) * factor)
        for shape, factor in zip(shapes, noise, strict=True)
    ]
    fitted, report = fit_profile(samples)
    assert all(fitted.step_time_s(*shape) >= 0.0 for shape in shapes)
    assert report.fitted.median <= 0.5
