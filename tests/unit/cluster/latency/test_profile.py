"""Step times of a profile, and the files that they are read from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.latency.linear import StepTimeModel
from tandem.cluster.latency.profile import DecodeTerms, StepProfile, distserve_profile, read_profile
from tandem.cluster.types import StepTimeCoefficients

PROFILE = StepProfile(
    prefill_step_s=0.5,
    prefill_token_s=0.01,
    prefill_square_s=0.001,
    decode=DecodeTerms(step_s=0.25, row_s=0.125, context_token_s=0.0625),
    large_decode=DecodeTerms(step_s=1.0, row_s=0.0, context_token_s=0.0),
    large_batch_rows=8,
    overhead_s=0.002,
    overhead_token_s=1e-7,
)
DISTSERVE = {
    "org/model": {
        "2": {
            "decoding_large_small_bs_threshold": 95,
            "prefill": [18.0, 0.1, 7e-6],
            "decoding_smallbs": [20.0, 6e-4, 0.04],
            "decoding_largebs": [7.0, 5e-4, 0.16],
        }
    }
}


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_a_step_is_the_sum_of_its_terms() -> None:
    assert PROFILE.step_time_s(10, 100, 0, 0) == pytest.approx(0.5 + 0.1 + 0.1 + 0.002 + 10e-7)
    assert PROFILE.step_time_s(0, 0, 2, 30) == pytest.approx(0.25 + 0.25 + 30 * 0.0625 + 0.002 + 30e-7)


def test_a_mixed_step_pays_the_larger_fixed_cost_once() -> None:
    alone = PROFILE.step_time_s(10, 100, 0, 0) + PROFILE.step_time_s(0, 0, 2, 30)
    assert PROFILE.step_time_s(10, 100, 2, 30) == pytest.approx(alone - 0.25 - 0.002)


def test_decode_follows_other_terms_in_large_batches() -> None:
    assert PROFILE.step_time_s(0, 0, 7, 0) == pytest.approx(0.25 + 7 * 0.125 + 0.002)
    assert PROFILE.step_time_s(0, 0, 8, 10_000) == pytest.approx(1.0 + 0.002 + 1e-3)


def test_the_linear_model_is_a_profile() -> None:
    terms = StepTimeCoefficients(step_s=0.5, prefill_token_s=0.25, decode_row_s=0.125, context_token_s=0.0625)
    profile, model = StepProfile.linear(terms), StepTimeModel(terms)
    for shape in ((3, 0, 0), (0, 2, 9), (3, 2, 9), (0, 500, 1)):
        prefill, rows, context = shape
        assert profile.step_time_s(prefill, 10**6, rows, context) == model.step_time_s(prefill, rows, context)


def test_a_stage_is_taken_for_its_share_and_the_overhead() -> None:
    staged = replace(PROFILE, pipeline_stages=4)
    assert PROFILE.stage_time_s(10, 100, 2, 30) == PROFILE.step_time_s(10, 100, 2, 30)
    assert staged.step_time_s(10, 100, 2, 30) == PROFILE.step_time_s(10, 100, 2, 30)
    overhead_s = 0.002 + 40e-7
    share_s = (PROFILE.step_time_s(10, 100, 2, 30) - overhead_s) / 4
    assert staged.stage_time_s(10, 100, 2, 30) == pytest.approx(share_s + overhead_s)


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_a_run_of_decode_steps_ends_where_its_steps_add_up_to(rows: int) -> None:
    ends, now = PROFILE.decode_steps(rows, 100, 50), 0.0
    for step in range(50):
        now += PROFILE.step_time_s(0, 0, rows, 100 + step * rows)
        assert ends[step] == pytest.approx(now)
    for steps in (0, 10**9):
        with pytest.raises(ValueError, match=f"steps: {steps}"):
            PROFILE.decode_steps(rows, 100, steps)


def test_a_scaled_profile_takes_that_many_times_as_long() -> None:
    slower = PROFILE.scaled(2.5)
    for shape in ((10, 100, 0, 0), (0, 0, 2, 30), (10, 100, 9, 30)):
        assert slower.step_time_s(*shape) == pytest.approx(2.5 * PROFILE.step_time_s(*shape))
    assert slower.large_batch_rows == PROFILE.large_batch_rows


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = replace(PROFILE, source="measured")
    profile.save(tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile


def test_distserve_files_are_milliseconds_by_model_and_parallelism(tmp_path: Path) -> None:
    path = written(tmp_path / "distserve.json", DISTSERVE)
    profile = distserve_profile(path, "org/model", tensor_parallel=2)
    assert profile.step_time_s(100, 100**2, 0, 0) == pytest.approx(
        (18.0 + 0.1 * 100 + 7e-6 * 100**2 + 1 + 2 + 1e-4 * 100) / 1000
    )
    assert profile.step_time_s(0, 0, 94, 5000) == pytest.approx(
        (20.0 + 6e-4 * 5000 + 0.04 * 94 + 2 + 1e-4 * 5000) / 1000
    )
    assert profile.step_time_s(0, 0, 95, 5000) == pytest.approx(
        (7.0 + 5e-4 * 5000 + 0.16 * 95 + 2 + 1e-4 * 5000) / 1000
    )
    staged = distserve_profile(path, "org/model", tensor_parallel=2, pipeline_stages=2)
    assert staged.stage_time_s(100, 0, 0, 0) == pytest.approx((28.0 / 2 + 2 + 2 + 0.01) / 1000)
    assert staged.step_time_s(100, 0, 0, 0) == pytest.approx((2 * (28.0 / 2 + 2) + 2 + 0.01) / 1000)
    assert staged.stage_time_s(0, 0, 10, 50) == pytest.approx((20.43 / 2 + 2 + 0.005) / 1000)
    assert staged.step_time_s(0, 0, 10, 50) == pytest.approx((20.43 + 2 + 0.005) / 1000)
    assert "TP 2, PP 2" in staged.source


def test_a_coefficient_below_zero_is_taken_for_zero(tmp_path: Path) -> None:
    entry = {**DISTSERVE["org/model"]["2"], "prefill": [18.0, 0.1, -7e-6]}
    path = written(tmp_path / "distserve.json", {"org/model": {"2": entry}})
    assert distserve_profile(path, "org/model", tensor_parallel=2).prefill_square_s == 0.0


@pytest.mark.parametrize(("model", "parallel"), [("org/model", 1), ("org/other", 2)])
def test_what_a_distserve_file_lacks_is_named(tmp_path: Path, model: str, parallel: int) -> None:
    path = written(tmp_path / "distserve.json", DISTSERVE)
    with pytest.raises(ValueError, match=rf"no '{model}' at tensor parallelism {parallel}; it has org/model"):
        distserve_profile(path, model, tensor_parallel=parallel)


def test_a_distserve_entry_that_is_none_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "distserve.json", {"org/model": {"2": {"prefill": [1, 2, 3]}}})
    with pytest.raises(ValueError, match="is not what DistServe's files hold"):
        distserve_profile(path, "org/model", tensor_parallel=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prefill_step_s": -1}, "prefill_step_s"),
        ({"prefill_token_s": "1"}, "prefill_token_s"),
        ({"overhead_s": 1e9}, "overhead_s"),
        ({"large_batch_rows": 0}, "large_batch_rows"),
        ({"large_batch_rows": 1.5}, "large_batch_rows"),
        ({"pipeline_stages": 0}, "pipeline_stages"),
        ({"decode": {"step_s": 1}}, "decode"),
        ({"decode": None}, "decode"),
        ({"large_decode": {"step_s": 1, "row_s": None, "context_token_s": 0}}, "large_decode.*row_s"),
        ({"steps_s": 1}, "steps_s"),
    ],
)
def test_a_wrong_value_in_a_file_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    PROFILE.save(tmp_path / "profile.json")
    values = json.loads((tmp_path / "profile.json").read_text())
    path = written(tmp_path / "wrong.json", {**values, **change})
    with pytest.raises(ValueError, match=f"wrong.json.*{named}"):
        read_profile(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"prefill_step_s": 1}'])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"profile\.json"):
        read_profile(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_profile(tmp_path / "missing.json")
