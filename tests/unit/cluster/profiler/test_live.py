"""A live engine under the profiler: the paced device's own terms come back."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.cluster.cli_profile import Wanted, run_profile
from tandem.cluster.clock import VirtualClock
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine.devices.paced import PacedDevice
from tandem.cluster.latency.measured import read_measured
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.planner.words import poor_text
from tandem.cluster.profiler.fit import fit_steps
from tandem.cluster.profiler.live import LiveSteps, engine_overhead_s, measure_steps, measured_steps
from tandem.cluster.profiler.points import Grid, Places, Point
from tandem.cluster.profiler.repeat import RepeatOptions

MODEL = "dummy:tiny-llama"
DECODE = DecodeTerms(step_s=0.012, row_s=0.0008, context_token_s=2e-6)
TRUE = StepProfile(
    prefill_step_s=0.01,
    prefill_token_s=0.0001,
    prefill_square_s=2e-7,
    decode=DECODE,
    large_decode=DECODE,
    large_batch_rows=1,
)
GRID = Grid(
    lengths=(8, 64, 160, 256),
    starts=(64,),
    chunk_lengths=(32, 128),
    batches=(1, 3, 8),
    contexts=(20, 200),
    mixed_batches=(2,),
    mixed_contexts=(40,),
    mixed_lengths=(16, 64),
)
SHAPES = [point.sizes for point in GRID.points()] + [(100, 100**2, 0, 0), (0, 0, 5, 500), (48, 48**2, 4, 400)]


def paced(num_blocks: int, clock: VirtualClock | None = None) -> PacedDevice:
    return PacedDevice(512, num_blocks=num_blocks, coefficients=TRUE, clock=clock)


def test_a_paced_devices_terms_are_found_again() -> None:
    """In virtual time, so exactly; every step passes the device's own check of the KV before it."""
    clock, points = VirtualClock(), GRID.points()
    device = paced(Places(points, 16).blocks, clock)
    options = RepeatOptions(budget_s=1000.0, visit_s=0.05)
    timings = measure_steps(device, points, options, block_size=16, now_s=clock.now_s)
    device.close()
    assert timings.left_out == ()
    assert device.corruptions_total == 0
    fit = fit_steps(measured_steps(timings))
    assert fit.profile.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=1e-4)
    assert fit.profile.decode.row_s == pytest.approx(DECODE.row_s, rel=1e-4)
    for shape in SHAPES:
        assert fit.profile.step_time_s(*shape) == pytest.approx(TRUE.step_time_s(*shape), rel=1e-5)
    assert fit.held_out["all steps"].worst < 1e-4


def test_a_row_that_fails_is_told_with_its_point() -> None:
    places = Places(GRID.points(), 16, vocab_size=512)
    device = paced(places.blocks, VirtualClock())
    steps = LiveSteps(device, places)
    device.kv.slots[3] = 7  # of row 0, positions 48 to 63
    with pytest.raises(RuntimeError, match=r"a row of decode 1 x 200 failed: KV corruption: sequence 'row 0', pos"):
        steps(Point(1, 200))
    steps(Point(1, 20))
    device.close()


def test_the_engine_between_two_steps_is_measured_on_the_real_scheduler() -> None:
    clock = VirtualClock()
    device = paced(64, clock)
    gap_s = engine_overhead_s(device, block_size=16, num_blocks=64, rows=4, steps=12)
    assert 0.0 < gap_s < 1.0
    ran_until_s = clock.now_s()
    assert ran_until_s >= 12 * DECODE.step_s, "the device ran the steps"
    device.looks_ahead = True
    assert engine_overhead_s(device, block_size=16, num_blocks=64) == 0.0, "it has the next step before one ends"
    assert clock.now_s() == ran_until_s
    device.close()


def test_the_command_saves_what_others_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In real time on the paced device. Bounds are wide: a step may end late on a busy machine, never early."""
    TRUE.save(tmp_path / "true.json")
    output = tmp_path / "profile.json"
    config = EngineConfig(model=MODEL, device="paced", paced_profile=str(tmp_path / "true.json"), kv_cache_bytes=2**22)
    wanted = Wanted(
        config=config,
        grid=GRID,
        repeat=RepeatOptions(rounds=4, visit_s=0.0, budget_s=20.0, max_spread=10.0),
        transfers=False,
        max_transfer_spread=10.0,
        output=output,
        plot=None,
    )
    assert run_profile(wanted) == 0
    said = capsys.readouterr().out
    assert "nothing is computed" in said.splitlines()[0]
    assert "held out" in said
    profile = read_measured(output)
    for shape in SHAPES:
        assert profile.steps.step_time_s(*shape) > 0.9 * TRUE.step_time_s(*shape)
    assert profile.costs().overhead_s == profile.measured.engine_overhead_s > 0.0
    assert (profile.measured.device, profile.facts.config) == ("paced", CONFIGS["tiny-llama"])
    assert len(profile.measured.steps) == len(GRID.points())
    again = EngineConfig(model=MODEL, device="paced", paced_profile=str(output), kv_cache_bytes=2**22)
    PacedDevice.for_model(again, CONFIGS["tiny-llama"]).close()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "nothing half-written"


def test_times_that_disagree_are_kept_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.json"
    config = EngineConfig(model=MODEL, device="paced", kv_cache_bytes=2**22, paced_step_s=0.001)
    small = Grid(
        lengths=(4, 8, 16, 24, 32, 48),
        starts=(),
        chunk_lengths=(),
        batches=(1, 2, 4),
        contexts=(8, 16),
        mixed_batches=(),
        mixed_contexts=(),
        mixed_lengths=(),
    )
    wanted = Wanted(
        config=config,
        grid=small,
        repeat=RepeatOptions(rounds=4, visit_s=0.0, budget_s=5.0, max_spread=1e-9),
        transfers=False,
        max_transfer_spread=10.0,
        output=output,
        plot=None,
    )
    assert run_profile(wanted) == 1
    said = capsys.readouterr().out
    assert "steps: repeated times of 12 of 12 points disagree" in said
    assert "so far repeated times of 12 of 12 steps disagree" in said, "told while there is time to end it"
    assert f"saved       {tmp_path / 'profile.unsteady.json'}, not as {output}" in said
    assert not output.exists()
    kept = read_measured(tmp_path / "profile.unsteady.json")
    assert "12 of 12 points disagree" in kept.measured.doubts[0]
    assert len(kept.measured.steps) == 12
    assert "A POOR PROFILE: steps: repeated times of 12 of 12 points disagree" in poor_text(kept)


def test_a_budget_that_is_too_short_says_what_to_raise_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EngineConfig(model=MODEL, device="paced", kv_cache_bytes=2**22, paced_step_s=0.05)
    wanted = Wanted(
        config=config,
        grid=GRID,
        repeat=RepeatOptions(rounds=4, visit_s=0.0, budget_s=0.4, max_spread=10.0),
        transfers=False,
        max_transfer_spread=10.0,
        output=tmp_path / "profile.json",
        plot=None,
    )
    assert run_profile(wanted) == 1
    said = capsys.readouterr().out
    assert (
        "nothing saved: this machine is too slow or too busy: the 0 s of --budget-s that steps had are enough" in said
    )
    assert "allow a larger --budget-s, or shorter --prompt-lens" in said
    assert list(tmp_path.iterdir()) == []
