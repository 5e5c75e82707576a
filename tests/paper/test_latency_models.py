"""Latency models against what others measured and published: Vidur, aiconfigurator, DistServe."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from tandem.cluster.config_file import read_yaml
from tandem.cluster.latency.hardware import FOLDER, load_hardware
from tandem.cluster.latency.memory import DoesNotFit, worker_memory
from tandem.cluster.latency.model_facts import model_facts
from tandem.cluster.latency.profile import StepProfile, distserve_profile
from tandem.cluster.latency.roofline import Roofline
from tandem.cluster.profiler.fit_operators import fit_device
from tandem.cluster.profiler.operator_data import FILES, model_gemm_samples

PREFILL_BY_HAND, DECODE_BY_HAND = {"distserve": 1.1, "vllm": 1.4}, {"distserve": 1.0, "vllm": 1.2}
"""What DistServe's simulator multiplies its fits with: published, but not measured."""
PROMPTS = [(length, length**2, 0, 0) for length in (64, 128, 256, 512, 1024, 2048)]
DECODE = [(0, 0, rows, rows * context) for rows in (1, 8, 32, 64, 94, 128, 256) for context in (256, 512, 1024)]


def published(data: Path, model: str, ranks: int, system: str = "distserve") -> StepProfile:
    """DistServe's A100 coefficients without its control plane."""
    path = data / f"measured/distserve/profiler-a100-80g.{system}.json"
    profile = distserve_profile(path, f"facebook/{model}", tensor_parallel=ranks)
    step_s = profile.prefill_step_s - 1e-3  # `pp` ms a stage are not of the fit
    return replace(profile, prefill_step_s=step_s, overhead_s=0.0, overhead_token_s=0.0)


def median_error(data: Path, model: str, ranks: int, shapes: list, by_hand: float) -> float:
    measured = published(data, model, ranks)
    costs = Roofline(model_facts(model, dtype="float16"), load_hardware("a100-80g"), ranks)
    return median(abs(costs.step_time_s(*s) / (measured.step_time_s(*s) / by_hand) - 1.0) for s in shapes)


@pytest.mark.parametrize(
    ("model", "ranks", "prompts", "decode"),
    [
        ("opt-13b", 1, 0.06, 0.05),
        ("opt-13b", 2, 0.08, 0.06),
        ("opt-13b", 4, 0.09, 0.06),
        ("opt-66b", 2, 0.06, 0.07),
        ("opt-66b", 3, 0.06, 0.06),
        ("opt-66b", 4, 0.06, 0.04),
        ("opt-66b", 8, 0.11, 0.08),
    ],
)
def test_steps_derived_from_sizes_are_near_those_distserve_measured(
    data: Path, model: str, ranks: int, prompts: float, decode: float
) -> None:
    """Appendix A fits OPT on A100s; nothing of OPT or of DistServe's engine is in our constants. Median over sizes.

    That ranks which launch one by one wait for each other in every all-reduce is Vidur's measurement.
    """
    assert median_error(data, model, ranks, PROMPTS, PREFILL_BY_HAND["distserve"]) <= prompts
    assert median_error(data, model, ranks, DECODE, DECODE_BY_HAND["distserve"]) <= decode


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_mixed_step_saves_is_what_operators_say(data: Path, ranks: int) -> None:
    """A chunk of a prompt beside decode rows (Sarathi-Serve, OSDI '24, §3.3) pays the fixed cost once in a profile; in
    the operators that is reading the weights and launching once. The two differ by at most 5 % of a step, so that a
    plan does not flatter chunked prefill. A later chunk reads the keys of the earlier ones in both.
    """
    profile = published(data, "opt-13b", ranks)
    costs = Roofline(model_facts("opt-13b", dtype="float16"), load_hardware("a100-80g"), ranks)
    for rows in (16, 64, 128):
        for tokens, start in ((512, 0), (512, 1024), (2048, 0)):
            prompt, decode = (tokens, (start + tokens) ** 2 - start**2), (rows, rows * 900)
            saved_s, step_s = [], costs.step_time_s(*prompt, *decode)
            for model in (profile, costs):
                apart_s = model.step_time_s(*prompt, 0, 0) + model.step_time_s(0, 0, *decode)
                saved_s.append(apart_s - model.step_time_s(*prompt, *decode))
                assert model.step_time_s(tokens, tokens**2, *decode) <= model.step_time_s(*prompt, *decode)
            assert min(saved_s) > 0.0
            assert abs(saved_s[0] - saved_s[1]) <= 0.05 * step_s


def test_workers_hold_as_many_tokens_as_distserve_says(data: Path) -> None:
    """Its simulator's table of A100 memory, TP x PP up to 8 GPUs; 95 % of the memory is used."""
    errors = []
    with (data / "measured/distserve/max_num_tokens.csv").open() as file:
        for row in csv.DictReader(file):
            ranks, stages = int(row["tp"]), int(row["pp"])
            if ranks * stages > 8:
                continue
            facts = model_facts(row["model"], dtype="float16")
            held = worker_memory(facts, load_hardware("a100-80g"), ranks, stages, utilization=0.95).tokens
            errors.append(abs(held / int(row["max_num_tokens"]) - 1.0))
    assert len(errors) > 25
    assert median(errors) < 0.02
    assert max(errors) < 0.08


@pytest.mark.parametrize(("model", "ranks", "stages"), [("opt-66b", 1, 1), ("opt-175b", 4, 1), ("opt-175b", 1, 4)])
def test_what_distserve_leaves_out_of_its_table_does_not_fit(model: str, ranks: int, stages: int) -> None:
    with pytest.raises(DoesNotFit):
        worker_memory(model_facts(model), load_hardware("a100-80g"), ranks, stages, utilization=0.95)


def test_the_constants_are_those_the_data_give(data: Path) -> None:
    """The A100's file holds what the fit finds, and every operator's median error on what was left out is stated."""
    stored, found = read_yaml(FOLDER / "a100-80g.yaml"), fit_device(data / "measured", "a100-80g")
    for operator, terms in found["terms"].items():
        assert stored["terms"][operator] == pytest.approx(terms, rel=0.02), operator
    for operator, errors in found["held_out"].items():
        assert stored["held_out"][operator] == pytest.approx(errors, rel=0.05), operator
    for operator in ("gemm", "gemm of Llama-2-70b-hf", "gemm of Meta-Llama-3-70B", "prefill_attention"):
        assert found["held_out"][operator]["median"] <= 0.10
    assert found["held_out"]["decode_attention"]["median"] <= 0.10
    assert found["held_out"]["all_reduce"]["median"] <= 0.08


@pytest.mark.parametrize("device", FILES)
def test_no_shape_of_the_largest_models_is_in_the_fit(data: Path, device: str) -> None:
    """Llama-2-70B and Llama-3-70B have the same widths: one of them in the fit would flatter the other."""

    def shapes(names: Iterable[str]) -> set[tuple[float, float]]:
        samples = [model_gemm_samples(data / "measured" / name) for name in names]
        return {(n, k) for s in samples for n, k in zip(s.sizes["n"], s.sizes["k"], strict=True)}

    large = [name for name in FILES[device].held_out_models if "Llama-3-8B" not in name]
    assert len(shapes(large)) >= 16
    assert shapes(large) & shapes(FILES[device].fitted_models) == set()
