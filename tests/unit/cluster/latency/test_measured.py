"""Files of `tandem profile`: what they say, and what is refused in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.latency.links import LinkTerms
from tandem.cluster.latency.measured import (
    MeasuredProfile,
    MeasuredStep,
    MeasuredTransfer,
    Measurement,
    PointErrors,
    read_measured,
)
from tandem.cluster.latency.memory import DoesNotFit
from tandem.cluster.latency.model_facts import model_facts
from tandem.cluster.latency.profile import DecodeTerms, StepProfile, read_profile
from tandem.cluster.models.registry import CONFIGS

TERMS = DecodeTerms(step_s=0.01, row_s=0.003, context_token_s=4e-6)
STEPS = StepProfile(
    prefill_step_s=0.01, prefill_token_s=0.003, decode=TERMS, large_decode=TERMS, large_batch_rows=1, source="a test"
)
MEASURED = Measurement(
    model="smollm2-135m",
    model_config=CONFIGS["smollm2-135m"],
    device="cpu",
    dtype="bfloat16",
    kernels="compiled",
    threads=2,
    block_size=16,
    kv_token_bytes=23040,
    machine="a CPU, 2 cores",
    memory_bytes=24 * 2**30,
    versions={"tandem": "0.1"},
    date="2026-11-23T12:00:00+00:00",
    max_spread=0.15,
    steps={
        "prefill 16": MeasuredStep(prefill_tokens=16, prefill_squares=256, times_s=(0.058, 0.057, 0.06)),
        "decode 2 x 64": MeasuredStep(decode_rows=2, context_tokens=130, times_s=(0.016,)),
    },
    transfers={"mapped 1 MiB": MeasuredTransfer(link="mapped", size_bytes=2**20, times_s=(0.002, 0.003))},
    links={"mapped": LinkTerms(bandwidth_gb_s=2.0, latency_us=1500)},
    engine_overhead_s=0.0004,
    held_out={"prefill": PointErrors(median=0.01, p90=0.02, worst=0.03, points=1)},
    left_out=("decode 32 x 4096",),
)
PROFILE = MeasuredProfile(steps=STEPS, measured=MEASURED)


def changed(folder: Path, **values: Any) -> Path:
    """The file with some values of its section replaced (None: left out)."""
    path = folder / "changed.json"
    PROFILE.save(path)
    data = json.loads(path.read_text())
    data["measured"] = {key: value for key, value in {**data["measured"], **values}.items() if value is not None}
    path.write_text(json.dumps(data))
    return path


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert read_measured(tmp_path / "profile.json") == PROFILE
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_its_steps_are_read_by_who_wants_no_more(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == STEPS


def test_costs_have_what_the_engine_adds_and_the_file_for_a_paced_device_has_not() -> None:
    sizes = MEASURED.steps["decode 2 x 64"].sizes
    assert PROFILE.costs().step_time_s(*sizes) == pytest.approx(STEPS.step_time_s(*sizes) + 0.0004)


def test_kinds_and_medians_are_those_of_the_steps() -> None:
    prefill, decode = MEASURED.steps.values()
    assert (prefill.kind, prefill.median_s, decode.kind) == ("prefill", 0.058, "decode")
    assert MeasuredStep(prefill_tokens=4, decode_rows=1, context_tokens=9, times_s=(1.0,)).kind == "mixed"
    assert MEASURED.transfers["mapped 1 MiB"].median_s == 0.0025


def test_links_are_there_by_transport() -> None:
    assert PROFILE.link("mapped").transfer_time_s(2e6) == pytest.approx(0.0025)
    with pytest.raises(ValueError, match="transport: 'grpc' is not allowed; allowed: one that was measured: mapped"):
        PROFILE.link("grpc")
    without = replace(PROFILE, measured=replace(MEASURED, links={}))
    with pytest.raises(ValueError, match="measured without transfers"):
        without.link("mapped")


def test_facts_are_those_of_the_model_in_the_precision_that_ran() -> None:
    assert PROFILE.facts == model_facts("smollm2-135m")
    assert PROFILE.block_bytes == 16 * 23040 == 16 * PROFILE.facts.kv_bytes_per_token()
    eight = replace(PROFILE, measured=replace(MEASURED, quantization="w8a8"))
    assert (eight.facts.dtype, eight.facts.kv_dtype) == ("int8", "bfloat16")


def test_a_worker_holds_what_its_memory_leaves() -> None:
    half, whole = PROFILE.memory(2**30), PROFILE.memory()
    assert 0 < half.blocks < whole.blocks
    assert half.block_bytes == PROFILE.block_bytes
    assert "a CPU, 2 cores" in half.arithmetic
    with pytest.raises(DoesNotFit, match=r"smollm2-135m in bfloat16 .* does not fit"):
        PROFILE.memory(2**28)
    unknown = replace(PROFILE, measured=replace(MEASURED, memory_bytes=0))
    with pytest.raises(ValueError, match="memory_bytes: is missing"):
        unknown.memory()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"model": None}, "changed.json: measured.model: is missing"),
        ({"modell": "x"}, "measured.modell.*did you mean model"),
        ({"threads": 0}, "measured.threads: 0 is not allowed; allowed: at least 1"),
        ({"steps": {"a": {"decode_rows": 1, "times_s": []}}}, "measured.steps.a.times_s: is missing"),
        ({"steps": {"a": {"decode_rows": 1, "times_s": [0.1, 0]}}}, r"measured.steps.a.times_s\[1\]: 0"),
        ({"steps": {"a": {"times_s": [0.1]}}}, "measured.steps.a.prefill_tokens"),
        ({"links": {"grpc": {"bandwidth_gb_s": -1}}}, "measured.links.grpc.bandwidth_gb_s: -1"),
        ({"model_config": {"vocab_size": 3}}, "measured.model_config.architecture"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, values: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_measured(changed(tmp_path, **values))


def test_a_profile_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    STEPS.save(tmp_path / "steps.json")
    with pytest.raises(ValueError, match=r"steps.json has no section measured; allowed: a file of `tandem profile`"):
        read_measured(tmp_path / "steps.json")
