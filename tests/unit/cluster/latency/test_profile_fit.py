"""Profiles out of measured steps."""

from __future__ import annotations

import random
from dataclasses import astuple, replace

import pytest
from tandem.cluster.latency.hardware import load_hardware
from tandem.cluster.latency.model_facts import model_facts
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.latency.profile_fit import StepSample, fit_profile, profile_of
from tandem.cluster.latency.roofline import Roofline

SMALL = DecodeTerms(step_s=0.02, row_s=4e-5, context_token_s=6e-7)
TRUE = StepProfile(
    prefill_step_s=0.018,
    prefill_token_s=1e-4,
    prefill_square_s=7e-9,
    decode=SMALL,
    large_decode=SMALL,
    large_batch_rows=1,
)
BROKEN = replace(TRUE, large_decode=DecodeTerms(step_s=0.007, row_s=3e-4, context_token_s=5e-7), large_batch_rows=96)


def measured(profile: StepProfile, noise: float = 0.0, mixed: bool = False) -> list[StepSample]:
    draw = random.Random(3)
    shapes = [(length, length**2, 0, 0) for length in (16, 64, 128, 256, 512, 1024, 2048, 4096)]
    shapes += [(0, 0, rows, rows * context) for rows in (1, 4, 16, 48, 96, 128, 256) for context in (64, 256, 1024)]
    if mixed:
        shapes += [(length, length**2, rows, rows * 200) for length in (64, 512) for rows in (1, 16, 200)]
    return [StepSample(*shape, profile.step_time_s(*shape) * (1 + draw.uniform(-noise, noise))) for shape in shapes]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_profile_is_found_again(mixed: bool) -> None:
    profile, report = fit_profile(measured(TRUE, mixed=mixed), source="test")
    for shape in ((300, 300**2, 0, 0), (0, 0, 10, 5000), (300, 300**2, 10, 5000)):
        assert profile.step_time_s(*shape) == pytest.approx(TRUE.step_time_s(*shape), rel=1e-6)
    assert report.large_batch_rows is None
    assert report.held_out.worst < 1e-6
    assert report.held_out.points + sum(1 for n in range(report.fitted.points) if n % 5 != 4) == report.fitted.points
    assert profile.source == "test"


def test_other_terms_of_large_batches_are_found() -> None:
    profile, report = fit_profile(measured(BROKEN))
    assert report.large_batch_rows == profile.large_batch_rows == 96
    assert astuple(profile.large_decode) == pytest.approx(astuple(BROKEN.large_decode), rel=1e-6)
    assert astuple(profile.decode) == pytest.approx(astuple(SMALL), rel=1e-6)


def test_noise_shows_in_the_errors_and_not_in_a_break() -> None:
    profile, report = fit_profile(measured(TRUE, noise=0.05, mixed=True))
    assert report.large_batch_rows is None
    assert 0.005 < report.fitted.median < 0.05
    assert report.held_out.p90 < 0.12
    assert profile.step_time_s(0, 0, 64, 64 * 300) == pytest.approx(TRUE.step_time_s(0, 0, 64, 64 * 300), rel=0.05)


def test_no_term_is_below_zero() -> None:
    falling = [StepSample(length, length**2, 0, 0, 0.1 - length * 1e-6) for length in range(100, 2100, 200)]
    falling += [StepSample(0, 0, rows, rows * 100, 0.1 - rows * 1e-5) for rows in range(1, 100, 10)]
    profile, _ = fit_profile(falling)
    assert (profile.prefill_token_s, profile.prefill_square_s, profile.decode.row_s) == (0.0, 0.0, 0.0)
    assert profile.prefill_step_s == pytest.approx(0.1, rel=0.02)


def test_a_profile_stands_for_a_roofline_where_a_file_is_wanted() -> None:
    costs = Roofline(model_facts("llama-3.1-8b"), load_hardware("h100"), 1, 2)
    profile, report = profile_of(costs, source="llama-3.1-8b on h100")
    assert report.held_out.median < 0.05
    assert report.held_out.p90 < 0.12
    assert (profile.pipeline_stages, profile.source) == (2, "llama-3.1-8b on h100")
    for shape in ((700, 700**2, 0, 0), (0, 0, 40, 40 * 900)):
        assert profile.step_time_s(*shape) == pytest.approx(costs.step_time_s(*shape), rel=0.1)
        assert profile.stage_time_s(*shape) == pytest.approx(costs.stage_time_s(*shape), rel=0.15)


def test_a_profile_of_a_profile_is_the_profile() -> None:
    profile, _ = profile_of(TRUE, max_tokens=500, max_rows=33)
    assert profile.step_time_s(300, 300**2, 10, 5000) == pytest.approx(TRUE.step_time_s(300, 300**2, 10, 5000))


def test_stages_are_kept() -> None:
    assert fit_profile(measured(TRUE), pipeline_stages=2)[0].pipeline_stages == 2


def test_too_few_samples_are_refused() -> None:
    samples = measured(TRUE)
    with pytest.raises(ValueError, match="samples: 3 of prompts are too few; allowed: 4 beside every fifth"):
        fit_profile(samples[5:])
    with pytest.raises(ValueError, match="samples: 0 of decode steps"):
        fit_profile(samples[:8])


@pytest.mark.parametrize(
    ("values", "error"),
    [((0, 0, 0, 0, 1.0), "a token to compute"), ((1, -1, 0, 0, 1.0), "sizes"), ((1, 1, 0, 0, 0.0), "seconds 0.0")],
)
def test_a_sample_that_says_nothing_is_refused(values: tuple, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        StepSample(*values)
