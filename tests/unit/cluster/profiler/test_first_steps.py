"""What a worker says of its step times before it has served anybody."""

from __future__ import annotations

import pytest
from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.devices.paced import PacedDevice
from tandem.cluster.latency.linear import OnlineStepTimeFit, StepTimeModel
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.profiler.first_steps import ALWAYS, ALWAYS_ROUNDS, MORE, known_steps, time_steps
from tandem.cluster.types import Role
from tandem.router.forecast import LEARNED_STEPS

DECODE = DecodeTerms(step_s=0.012, row_s=0.0008, context_token_s=2e-6)
TRUE = StepProfile(prefill_step_s=0.01, prefill_token_s=0.0001, decode=DECODE, large_decode=DECODE, large_batch_rows=1)


@pytest.mark.parametrize("role", list(Role))
def test_a_latency_model_is_known_without_a_step(role: Role) -> None:
    clock = VirtualClock()
    device = PacedDevice(512, num_blocks=4, coefficients=TRUE, clock=clock)
    fit = known_steps(device, role, max_batched_tokens=512, max_model_len=2048, block_size=16)
    assert clock.now_s() == 0.0
    assert fit.steps >= LEARNED_STEPS
    model = StepTimeModel(fit.coefficients())
    if role is not Role.DECODE:
        assert model.predict_ttft_s(0, 400) == pytest.approx(TRUE.step_time_s(400, 400**2, 0, 0), rel=0.1)
    if role is not Role.PREFILL:
        assert model.predict_tpot_s(8, 4000) == pytest.approx(TRUE.step_time_s(0, 0, 8, 4000), rel=0.1)


class Timed:
    """A device whose steps take what a profile says, of which it does not tell."""

    def __init__(self, clock: VirtualClock) -> None:
        self.paced = PacedDevice(512, num_blocks=400, coefficients=TRUE, clock=clock)
        self.costs, self.kv, self.vocab_size = None, self.paced.kv, 512
        self.launch, self.collect = self.paced.launch, self.paced.collect


def test_a_device_without_one_is_timed_and_what_is_short_is_enough() -> None:
    """Its KV is nobody's yet: whatever a step makes of it, its time counts."""
    clock = VirtualClock()
    fit = OnlineStepTimeFit()
    time_steps(Timed(clock), fit, (*ALWAYS, *MORE), block_size=16, budget_s=0.0, now_s=clock.now_s)  # type: ignore[arg-type]
    assert fit.steps == len(ALWAYS) * (ALWAYS_ROUNDS - 1) == LEARNED_STEPS
    assert StepTimeModel(fit.coefficients()).predict_ttft_s(0, 16) == pytest.approx(0.0116, rel=0.1)


def test_a_quick_device_runs_larger_steps_too() -> None:
    fit = known_steps(Timed(VirtualClock()), Role.MIXED, max_batched_tokens=512, max_model_len=2048, block_size=16)  # type: ignore[arg-type]
    assert fit.steps > LEARNED_STEPS
    assert StepTimeModel(fit.coefficients()).predict_ttft_s(0, 256) == pytest.approx(0.0356, rel=0.1)


def test_a_worker_with_hardly_any_memory_starts_all_the_same() -> None:
    fit = known_steps(Timed(VirtualClock()), Role.MIXED, max_batched_tokens=1, max_model_len=2048, block_size=16)  # type: ignore[arg-type]
    assert fit.steps < LEARNED_STEPS
