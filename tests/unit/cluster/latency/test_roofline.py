"""Step times from a model's sizes and a hardware file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from tandem.cluster.latency.hardware import load_hardware
from tandem.cluster.latency.interface import StepCosts
from tandem.cluster.latency.links import Link
from tandem.cluster.latency.model_facts import model_facts
from tandem.cluster.latency.operators import gemm_s
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.latency.roofline import TABLE_ROWS, TABLE_TOKENS, Roofline

A100, H100 = load_hardware("a100-80g"), load_hardware("h100")
OPT_13B, LLAMA_70B = model_facts("opt-13b"), model_facts("llama-2-70b")


def test_both_sources_answer_the_same_interface() -> None:
    terms = DecodeTerms(step_s=1, row_s=1, context_token_s=1)
    profile = StepProfile(prefill_step_s=1, prefill_token_s=1, decode=terms, large_decode=terms, large_batch_rows=1)
    for costs in (profile, Roofline(OPT_13B, A100)):
        answer: StepCosts = costs
        assert answer.pipeline_stages == 1
        assert answer.step_time_s(0, 0, 1, 10) == answer.stage_time_s(0, 0, 1, 10) == answer.decode_steps(1, 10, 1)[0]


def test_a_lone_decode_row_is_bound_by_the_weights() -> None:
    costs = Roofline(OPT_13B, A100)
    weights_s = OPT_13B.parameters * 2 / 2.039e12
    assert 1.0 < costs.step_time_s(0, 0, 1, 512) / weights_s < 1.8
    assert costs.step_time_s(0, 0, 16, 16 * 512) < 1.5 * costs.step_time_s(0, 0, 1, 512)


def test_a_long_prompt_is_bound_by_arithmetic() -> None:
    costs = Roofline(OPT_13B, A100)
    linears_s = 2 * OPT_13B.parameters * 4096 / 312e12
    assert 1.0 < costs.step_time_s(4096, 4096**2, 0, 0) / linears_s < 2.0
    assert Roofline(OPT_13B, H100).step_time_s(4096, 4096**2, 0, 0) < 0.5 * costs.step_time_s(4096, 4096**2, 0, 0)


def test_a_step_holds_at_least_its_products() -> None:
    costs, config = Roofline(OPT_13B, A100), OPT_13B.config
    one_s = gemm_s(A100.terms.gemm, A100.peaks("bfloat16"), 512, 5120, 5120, 2, 2)
    assert costs.step_time_s(512, 512**2, 0, 0) > config.num_layers * 10 * one_s  # of its 12 products' worth


def test_chunks_of_a_prompt_add_up_but_for_what_each_step_pays() -> None:
    costs = Roofline(LLAMA_70B, H100, 8)
    whole = costs.step_time_s(4096, 4096**2, 0, 0)
    chunks = costs.step_time_s(2048, 2048**2, 0, 0) + costs.step_time_s(2048, 4096**2 - 2048**2, 0, 0)
    assert whole < chunks < 1.3 * whole


def test_a_mixed_step_costs_less_than_its_halves_and_more_than_each() -> None:
    costs = Roofline(OPT_13B, A100)
    prompt, rows = costs.step_time_s(512, 512**2, 0, 0), costs.step_time_s(0, 0, 32, 32 * 512)
    assert max(prompt, rows) < costs.step_time_s(512, 512**2, 32, 32 * 512) < prompt + rows


def test_a_run_of_decode_steps_is_its_steps() -> None:
    costs, now = Roofline(LLAMA_70B, H100, 4, 2), 0.0
    ends = costs.decode_steps(32, 32 * 700, 40)
    for step in range(40):
        now += costs.step_time_s(0, 0, 32, 32 * (700 + step))
        assert ends[step] == pytest.approx(now)


def test_tables_go_on_beyond_their_ends() -> None:
    costs = Roofline(OPT_13B, A100)
    tokens = [costs.step_time_s(TABLE_TOKENS + more, 10**6, 0, 0) for more in (-1, 0, 1, 2)]
    rows = [costs.step_time_s(0, 0, TABLE_ROWS + more, 10**6) for more in (-1, 0, 1, 2)]
    for series in (tokens, rows):
        first, second, third = (b - a for a, b in itertools.pairwise(series))
        assert second == pytest.approx(third, rel=1e-4)
        assert first == pytest.approx(second, rel=0.2)


def test_more_ranks_divide_the_work_and_pay_to_add_it_up() -> None:
    steps = [Roofline(LLAMA_70B, A100, ranks).step_time_s(0, 0, 8, 8 * 512) for ranks in (1, 2, 4, 8)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] / 8 < steps[3]
    terms = A100.terms.all_reduce
    launches_s = 2 * 80 * (terms.launch_us + 7 * terms.rank_us) * 1e-6
    instant = replace(A100, terms=replace(A100.terms, all_reduce=replace(terms, launch_us=0, rank_us=0)))
    without_s = Roofline(LLAMA_70B, instant, 8).step_time_s(0, 0, 8, 8 * 512)
    assert without_s == pytest.approx(steps[3] - launches_s, rel=0.01)


def test_ranks_on_several_nodes_add_up_over_the_slower_link() -> None:
    inside, across = Roofline(LLAMA_70B, A100, 8), Roofline(LLAMA_70B, replace(A100, devices_per_node=4), 8)
    assert across.step_time_s(2048, 2048**2, 0, 0) > 1.5 * inside.step_time_s(2048, 2048**2, 0, 0)
    fast = Link(name="fast", bandwidth_gb_s=10_000)
    named = Roofline(LLAMA_70B, replace(A100, devices_per_node=4), 8, tensor_link=fast)
    assert named.step_time_s(2048, 2048**2, 0, 0) < inside.step_time_s(2048, 2048**2, 0, 0)


def test_a_stage_is_taken_for_its_share_of_the_step() -> None:
    shape = (2048, 2048**2, 0, 0)
    one, four = Roofline(OPT_13B, A100), Roofline(OPT_13B, A100, 1, 4)
    assert four.pipeline_stages == 4
    assert one.stage_time_s(*shape) == one.step_time_s(*shape)
    assert one.step_time_s(*shape) / 4 < four.stage_time_s(*shape) < one.step_time_s(*shape) / 3.5
    assert one.step_time_s(*shape) < four.step_time_s(*shape) < 1.05 * one.step_time_s(*shape)
    assert four.step_time_s(*shape) < 4.1 * four.stage_time_s(*shape)


def test_the_stage_with_most_layers_is_the_slowest() -> None:
    three = Roofline(OPT_13B, A100, 1, 3)  # 14, 13, 13 layers
    even = Roofline(OPT_13B, A100, 1, 4)
    assert three.stage_time_s(2048, 2048**2, 0, 0) == pytest.approx(
        even.stage_time_s(2048, 2048**2, 0, 0) * 14 / 10, rel=0.03
    )


def test_stages_on_several_nodes_pass_on_over_the_link_between_them() -> None:
    slow = Link(name="slow", bandwidth_gb_s=0.1)
    inside, named = Roofline(OPT_13B, A100, 1, 2), Roofline(OPT_13B, A100, 1, 2, stage_link=slow)
    across = Roofline(OPT_13B, replace(A100, devices_per_node=1), 1, 2)
    moved = 2048 * 5120 * 2
    extra_s = named.step_time_s(2048, 0, 0, 0) - inside.step_time_s(2048, 0, 0, 0)
    assert extra_s == pytest.approx(moved / 1e8 - A100.link(inside_node=True).transfer_time_s(moved), rel=0.01)
    assert inside.step_time_s(2048, 0, 0, 0) < across.step_time_s(2048, 0, 0, 0) < named.step_time_s(2048, 0, 0, 0)


def test_lighter_precisions_are_faster() -> None:
    full, half, eight = (
        Roofline(model_facts("llama-3.1-8b", dtype=dtype), H100) for dtype in ("float32", "bfloat16", "fp8")
    )
    for shape in ((2048, 2048**2, 0, 0), (0, 0, 8, 8 * 100)):
        assert full.step_time_s(*shape) > half.step_time_s(*shape) > eight.step_time_s(*shape)


def test_what_the_hardware_or_the_model_does_not_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel: 3"):
        Roofline(OPT_13B, A100, 3)
    with pytest.raises(ValueError, match="dtype: 'fp8'"):
        Roofline(model_facts("opt-13b", dtype="fp8"), A100)


@pytest.mark.parametrize(
    ("shape", "measured_ms"),
    [((64, 64**2, 0, 0), 108), ((0, 0, 1, 65), 9.6), ((0, 0, 8, 8 * 1025), 37.0), ((0, 0, 32, 32 * 1025), 169)],
)
def test_the_small_machine_is_near_what_was_measured_there(shape: tuple[int, ...], measured_ms: float) -> None:
    """BENCHMARKS.md, SmolLM2-135M in bfloat16 on two AVX2 cores with two threads."""
    costs = Roofline(model_facts("smollm2-135m"), load_hardware("cpu-avx2"))
    assert costs.step_time_s(*shape) * 1e3 == pytest.approx(measured_ms, rel=0.15)
