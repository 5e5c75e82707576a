"""The step-time model's predictions, and its on-line fit against synthetic steps whose coefficients are known."""

from __future__ import annotations

import numpy as np
import pytest
from tandem.cluster.engine.plan import StepPlan, StepRow
from tandem.cluster.engine.step_shape import StepShape, step_shape
from tandem.cluster.latency.linear import DEFAULT_PRIOR, OnlineStepTimeFit, StepTimeModel
from tandem.cluster.types import StepTimeCoefficients

TRUE = StepTimeCoefficients(step_s=0.002, prefill_token_s=5e-5, decode_row_s=2e-4, context_token_s=3e-7)


def test_step_time_is_the_sum_of_its_terms() -> None:
    model = StepTimeModel(StepTimeCoefficients(step_s=1, prefill_token_s=10, decode_row_s=100, context_token_s=1000))
    assert model.step_time_s(0) == 1
    assert model.step_time_s(2, 3, 4) == 1 + 20 + 300 + 4000


def test_ttft_counts_steps_of_the_token_budget() -> None:
    model = StepTimeModel(StepTimeCoefficients(step_s=1.0, prefill_token_s=0.01))
    assert model.predict_ttft_s(0, 100, 100) == pytest.approx(1 + 1.0)
    assert model.predict_ttft_s(1, 100, 100) == pytest.approx(2 + 1.01)
    assert model.predict_ttft_s(250, 100, 100) == pytest.approx(4 + 3.5)
    assert model.predict_ttft_s(0, 0, 100) == model.predict_ttft_s(0, 1, 100)
    with pytest.raises(ValueError, match="token_budget"):
        model.predict_ttft_s(0, 1, 0)


def test_tpot_is_a_decode_step() -> None:
    model = StepTimeModel(TRUE)
    assert model.predict_tpot_s(8, 4000) == model.step_time_s(0, 8, 4000)
    assert model.predict_tpot_s(0, 0) == model.step_time_s(0, 1, 0)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_impossible_coefficients_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="decode_row_s"):
        StepTimeModel(StepTimeCoefficients(decode_row_s=value))
    with pytest.raises(ValueError, match="decode_row_s"):
        OnlineStepTimeFit(StepTimeCoefficients(decode_row_s=value))


def test_shape_of_a_plan() -> None:
    plan = StepPlan(
        0,
        (
            StepRow("decodes", 10, [1], [0]),
            StepRow("decodes too", 99, [1], [1]),
            StepRow("one-token prompt", 0, [1], [2]),
            StepRow("later chunk", 16, [1, 2, 3], [3, 4]),
        ),
    )
    assert step_shape(plan) == StepShape(4, 2, context_tokens=11 + 100, prefill_squares=1 + 19**2 - 16**2)


def feed(
    fit: OnlineStepTimeFit,
    rng: np.random.Generator,
    steps: int,
    *,
    prefill_share: float = 0.5,
    noise: float = 0.1,
    outliers: float = 0.0,
    true: StepTimeCoefficients = TRUE,
) -> None:
    for _ in range(steps):
        rows = int(rng.integers(0, 65))
        prefill = int(rng.integers(1, 513)) if rng.random() < prefill_share else 0
        rows = max(rows, int(prefill == 0))
        context = int(rows * rng.integers(20, 3000))
        seconds = StepTimeModel(true).step_time_s(prefill, rows, context) * float(np.exp(rng.normal(0, noise)))
        if rng.random() < outliers:
            seconds *= float(rng.uniform(3, 30))
        fit.observe(prefill, rows, context, seconds)


def assert_close(found: StepTimeCoefficients, true: StepTimeCoefficients, relative: float) -> None:
    assert found == pytest.approx(true, rel=relative)


def test_before_any_step_it_is_the_prior() -> None:
    assert OnlineStepTimeFit().coefficients() == DEFAULT_PRIOR
    assert OnlineStepTimeFit(TRUE).coefficients() == TRUE
    assert min(DEFAULT_PRIOR) > 0


def test_exact_steps_give_exact_coefficients() -> None:
    fit = OnlineStepTimeFit()
    feed(fit, np.random.default_rng(0), 512, noise=0.0)
    assert_close(fit.coefficients(), TRUE, 0.02)


def test_noisy_steps_with_outliers_give_close_coefficients() -> None:
    for seed in range(3):
        fit = OnlineStepTimeFit()
        feed(fit, np.random.default_rng(seed), 1024, outliers=0.05)
        found = fit.coefficients()
        assert_close(found, TRUE, 0.25)
        for shape in [(512, 0, 0), (0, 1, 500), (0, 32, 30_000), (128, 32, 30_000)]:
            predicted, right = StepTimeModel(found).step_time_s(*shape), StepTimeModel(TRUE).step_time_s(*shape)
            assert predicted == pytest.approx(right, rel=0.06)


def test_never_negative_whatever_the_steps() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        fit = OnlineStepTimeFit(window=32)
        for _ in range(int(rng.integers(1, 100))):
            fit.observe(int(rng.integers(0, 9)), int(rng.integers(0, 9)), int(rng.integers(0, 99)), rng.exponential())
            assert min(fit.coefficients()) >= 0.0
        assert max(fit.coefficients()) < np.inf


def test_one_step_already_sets_the_speed() -> None:
    """The prior's shape at this machine's speed, rather than the prior's speed."""
    fit = OnlineStepTimeFit()
    slow = StepTimeModel(DEFAULT_PRIOR).step_time_s(512) * 40
    fit.observe(512, 0, 0, slow)
    model = StepTimeModel(fit.coefficients())
    assert model.step_time_s(512) == pytest.approx(slow, rel=0.01)
    assert model.step_time_s(0, 1, 100) == pytest.approx(
        StepTimeModel(DEFAULT_PRIOR).step_time_s(0, 1, 100) * 40, rel=0.1
    )


def test_a_known_prior_is_not_overthrown_by_a_first_request() -> None:
    """A warm-up's few steps take longer than a linear model says: its worker must not look three times slower than one
    that had none, or nobody would ask it again.
    """
    fit, shape = OnlineStepTimeFit(TRUE, prior_steps=64), (0, 16, 4800)
    for _ in range(2):
        fit.observe(1024, 0, 0, 1.5 * StepTimeModel(TRUE).step_time_s(1024))
    fit.observe(0, 1, 300, StepTimeModel(TRUE).step_time_s(0, 1, 300))
    found = StepTimeModel(fit.coefficients()).step_time_s(*shape)
    assert found == pytest.approx(StepTimeModel(TRUE).step_time_s(*shape), rel=0.05)


@pytest.mark.parametrize("observed", [3, 7])
def test_among_few_steps_none_is_an_outlier(observed: int) -> None:
    """One decode step among prompts is not the odd one out; a guessed prior leaves the step's own cost to it."""
    fit, model = OnlineStepTimeFit(), StepTimeModel(TRUE)
    for number in range(observed - 1):
        length = 500 + 20 * number
        fit.observe(length, 0, 0, model.step_time_s(length))
    fit.observe(0, 1, 300, model.step_time_s(0, 1, 300))
    assert StepTimeModel(fit.coefficients()).step_time_s(0, 1, 300) == pytest.approx(
        model.step_time_s(0, 1, 300), rel=0.1
    )


def test_real_steps_displace_a_known_prior() -> None:
    slower = StepTimeCoefficients(**{name: 3 * getattr(TRUE, name) for name in TRUE._fields})
    fit = OnlineStepTimeFit(TRUE, prior_steps=64)
    assert fit.steps == 64
    assert fit.coefficients() == TRUE
    feed(fit, np.random.default_rng(7), 1200, true=slower)
    assert_close(fit.coefficients(), slower, 0.25)


def test_more_prior_steps_than_the_window_holds_are_refused() -> None:
    assert OnlineStepTimeFit(TRUE, prior_steps=8, window=4).steps == 8
    with pytest.raises(ValueError, match="prior_steps: 9 is not in 0…8"):
        OnlineStepTimeFit(TRUE, prior_steps=9, window=4)


def test_equal_steps_only_still_predict_themselves() -> None:
    """A prefill worker under load runs full budgets only: two terms that these steps cannot tell apart."""
    fit = OnlineStepTimeFit()
    for _ in range(200):
        fit.observe(512, 0, 0, 0.1)
    assert StepTimeModel(fit.coefficients()).step_time_s(512) == pytest.approx(0.1, rel=0.01)


def test_a_long_decode_phase_does_not_forget_prefill() -> None:
    rng = np.random.default_rng(5)
    fit = OnlineStepTimeFit()
    feed(fit, rng, 400, prefill_share=1.0)
    feed(fit, rng, 5000, prefill_share=0.0)
    assert fit.coefficients().prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=0.1)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    rng = np.random.default_rng(6)
    fit = OnlineStepTimeFit()
    feed(fit, rng, 1000)
    slower = StepTimeCoefficients(**{name: 3 * getattr(TRUE, name) for name in TRUE._fields})
    feed(fit, rng, 1200, true=slower)
    assert_close(fit.coefficients(), slower, 0.25)


def test_empty_steps_are_passed_over_and_nonsense_is_refused() -> None:
    fit = OnlineStepTimeFit()
    fit.observe(0, 0, 0, 1.0)
    assert fit.coefficients() == DEFAULT_PRIOR
    fit.observe(1, 0, 0, 0.0)
    assert min(fit.coefficients()) >= 0.0
    for step in [(-1, 0, 0, 1.0), (1, -1, 0, 1.0), (1, 0, -1, 1.0), (1, 0, 0, -1.0), (1, 0, 0, float("nan"))]:
        with pytest.raises(ValueError, match="duration_s"):
            fit.observe(*step)
    with pytest.raises(ValueError, match="window"):
        OnlineStepTimeFit(window=0)
