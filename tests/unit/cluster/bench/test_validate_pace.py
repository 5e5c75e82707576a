"""The machine's pace: which points are looked at, what their times say, and what becomes of a profile."""

from __future__ import annotations

import asyncio

import pytest
from tandem.cluster.bench.validate_pace import IdleEngine, Pace, check_same, pace_of, watched_steps
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine.devices.base import Device
from tandem.cluster.engine.devices.paced import PacedDevice
from tandem.cluster.engine.plan import StepPlan
from tandem.cluster.latency.measured import MeasuredProfile, MeasuredStep, Measurement
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import StepTimeCoefficients

TERMS = DecodeTerms(step_s=0.01, row_s=0.001, context_token_s=1e-6)
PROFILE = StepProfile(
    prefill_step_s=0.02,
    prefill_token_s=1e-3,
    prefill_square_s=1e-7,
    decode=TERMS,
    large_decode=TERMS,
    large_batch_rows=8,
    overhead_s=0.5,
)


def prompt(tokens: int, *times_s: float) -> MeasuredStep:
    return MeasuredStep(prefill_tokens=tokens, prefill_squares=tokens**2, times_s=times_s)


def rows(count: int, context: int, *times_s: float) -> MeasuredStep:
    return MeasuredStep(decode_rows=count, context_tokens=count * (context + 1), times_s=times_s)


def test_a_profile_at_another_pace_keeps_what_is_not_computing() -> None:
    slower = Pace(prefill=1.2, decode=0.5).on(PROFILE)
    assert slower.step_time_s(100, 10_000, 0, 0) == pytest.approx(0.5 + 1.2 * (0.02 + 0.1 + 0.001))
    assert slower.step_time_s(0, 0, 4, 1000) == pytest.approx(0.5 + 0.5 * (0.01 + 0.004 + 0.001))
    assert slower.large_decode == slower.decode
    assert Pace().on(PROFILE) == PROFILE


def test_a_look_visits_the_cheapest_of_both_kinds_but_no_prompt_that_is_all_fixed_cost() -> None:
    steps = {str(size): prompt(size, 0.003 * size) for size in (16, 512, 64, 128, 256, 1024)}
    steps |= {f"{count} rows": rows(count, 64, 0.02 * count) for count in (32, 1, 2, 8, 4)}
    steps["both"] = MeasuredStep(
        prefill_tokens=64, prefill_squares=4096, decode_rows=1, context_tokens=1, times_s=(0.001,)
    )
    found = watched_steps(steps)
    assert [step.prefill_tokens for step in found] == [64, 128, 0, 0, 0, 0]
    assert [step.decode_rows for step in found] == [0, 0, 1, 2, 4, 8]
    with pytest.raises(ValueError, match="profile: it has no decode steps"):
        watched_steps({"512": prompt(512, 1.0)})


def test_the_pace_is_the_mean_and_interruptions_are_part_of_it() -> None:
    steps = [prompt(64, 0.1, 0.2, 0.3), prompt(128, 0.4), rows(1, 64, 0.01)]
    times_s = [[0.22, 0.22], [0.44, 0.44], [0.01, 0.01, 0.01, 0.012]]
    assert pace_of(steps, times_s) == Pace(prefill=pytest.approx(1.1), decode=pytest.approx(1.05))
    assert Pace(prefill=1.0, decode=0.8).change_to(Pace(prefill=0.9, decode=1.0)) == pytest.approx(0.25)
    assert Pace.between(Pace(prefill=1.0, decode=1.2), Pace(prefill=1.1, decode=1.0)) == Pace(
        prefill=pytest.approx(1.05), decode=pytest.approx(1.1)
    )


def test_a_profile_of_another_engine_is_no_slow_machine() -> None:
    files, other = resolve_model("smollm2-135m"), resolve_model("dummy:tiny-llama")
    measured = Measurement(
        model="smollm2-135m",
        model_config=files.config,
        device="cpu",
        dtype="bfloat16",
        block_size=16,
        kv_token_bytes=23040,
        steps={"p": prompt(64, 0.02)},
    )
    check_same(measured, EngineConfig(), files.config)
    with pytest.raises(ValueError, match="it is of model smollm2-135m; allowed: one of model dummy:tiny-llama"):
        check_same(measured, EngineConfig(model="dummy:tiny-llama"), other.config)
    with pytest.raises(ValueError, match="it is of quantization None; allowed: one of quantization w8a8"):
        check_same(measured, EngineConfig(quantization="w8a8"), files.config)
    with pytest.raises(ValueError, match="it is of threads 1; allowed: one of threads 2"):
        check_same(measured, EngineConfig(threads=2), files.config)


def test_an_idle_engine_computes_the_profiles_own_points() -> None:
    files = resolve_model("smollm2-135m")
    measured = Measurement(
        model="smollm2-135m",
        model_config=files.config,
        device="cpu",
        dtype="bfloat16",
        block_size=16,
        kv_token_bytes=23040,
        steps={"p": prompt(64, 0.002), "d": rows(2, 40, 0.001)},
    )
    computed: list[tuple[int, int]] = []

    class Watched(PacedDevice):
        def launch(self, plan: StepPlan) -> None:
            computed.append((plan.num_tokens, len(plan.rows)))
            super().launch(plan)

    def build(config: EngineConfig) -> Device:
        terms = StepTimeCoefficients(
            step_s=0.0, prefill_token_s=2 * 0.002 / 64, decode_row_s=0.003 / 2, context_token_s=0.0
        )
        return Watched(49152, num_blocks=config.kv_cache_bytes // (16 * 23040), coefficients=terms)

    with IdleEngine(EngineConfig(), MeasuredProfile(steps=PROFILE, measured=measured), build) as engine:
        computed.clear()
        found = asyncio.run(engine.look())
    assert computed == 4 * [(64, 1), *[(2, 2)] * 5]
    assert found.prefill >= 2.0, "a paced step is late, never early"
    assert found.decode >= 3.0
