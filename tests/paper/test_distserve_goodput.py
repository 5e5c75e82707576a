"""DistServe (OSDI '24): what its A100 profile says, and how attainment against rate is judged."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.cluster.bench.claims_disaggregation import Promise, Staircase, crossing, judge
from tandem.cluster.bench.claims_systems import (
    DISTSERVE_MODEL,
    KV_TOKENS,
    paced_systems,
    token_bytes,
    tuned_budget,
)
from tandem.cluster.bench.report import RequestRecord
from tandem.cluster.latency.profile import DecodeTerms, StepProfile, distserve_profile

PROFILE = "measured/distserve/profiler-a100-80g.distserve.json"


def test_prefill_is_bound_by_arithmetic_and_decode_by_memory(data: Path) -> None:
    """§2.2 and figure 3 (13B, A100): some 512 tokens saturate prefill, so that twice the tokens take nearly twice as
    long; a decode step of 32 rows takes hardly longer than one of a single row.
    """
    profile = distserve_profile(data / PROFILE, DISTSERVE_MODEL)
    assert profile.step_time_s(2048, 2048**2, 0, 0) > 1.8 * profile.step_time_s(1024, 1024**2, 0, 0)
    assert profile.step_time_s(0, 0, 32, 32 * 64) < 1.2 * profile.step_time_s(0, 0, 1, 64)


def test_a_prompt_beside_decodes_slows_both(data: Path) -> None:
    """§2.3: one prefill in a decode batch lengthens its step several times, and the prefill's own time too."""
    profile = distserve_profile(data / PROFILE, DISTSERVE_MODEL)
    alone = profile.step_time_s(0, 0, 32, 32 * 512)
    mixed = profile.step_time_s(1024, 1024**2, 32, 32 * 512)
    assert mixed > 3 * alone
    assert mixed > 1.05 * profile.step_time_s(1024, 1024**2, 0, 0)


def test_the_systems_use_as_many_gpus_and_the_memory_of_an_a100() -> None:
    """§6.1's testbed: 66,144 tokens of KV fit beside OPT-13B's weights on one A100-80G."""
    assert KV_TOKENS[1] * token_bytes() == 54_185_164_800
    for gpus, parallel in ((2, 1), (4, 1), (3, 2), (4, 2)):
        systems = paced_systems(gpus, "p.json", budget=512, prefill_profile="q.json", prefill_tp=parallel)
        assert [system.gpus for system in systems] == [gpus] * 3
        assert systems[0].prefill_gpus == parallel
        assert [system.engine.batching for system in systems] == ["iteration", "iteration", "prompts_alone"]
    with pytest.raises(ValueError, match="gpus: 2 with prefill_tp 2"):
        paced_systems(2, "p.json", budget=512, prefill_tp=2)


def test_goodput_is_where_attainment_falls_below_the_target() -> None:
    """§6.1: goodput is the highest rate at which 90 % of the requests keep both promises."""
    assert crossing([(1.0, 1.0), (2.0, 0.95), (4.0, 0.85)], 0.9) == pytest.approx(3.0)
    assert crossing([(1.0, 0.8), (2.0, 0.95)], 0.9) == 0.0
    assert crossing([(1.0, 1.0), (2.0, 0.9)], 0.9) == 2.0
    assert crossing([(1.0, 1.0), (2.0, 0.9), (3.0, 0.5), (4.0, 0.95)], 0.9) == 2.0


def test_attainment_is_joint_by_stair_and_scaled_back() -> None:
    """§6.2: a request attains only if it keeps TTFT and TPOT; here on a clock that runs four times slower."""
    load = Staircase(
        dataset_path="", rates=(2.0, 4.0), stair_s=1.0, promises=(Promise(ttft_s=0.25, tpot_s=0.1),), time_scale=4.0
    )
    assert load.stairs == (0, 0, 1, 1, 1, 1)
    arrivals = load.arrivals_s()
    assert list(arrivals) == sorted(arrivals)
    assert [time_s < 4.0 for time_s in arrivals] == [stair == 0 for stair in load.stairs]

    def record(ttft_s: float, tpot_s: float) -> RequestRecord:
        return RequestRecord(
            due_s=0.0, sent_s=0.0, first_token_s=ttft_s, last_token_s=ttft_s + 4 * tpot_s, output_tokens=5
        )

    good, late, slow = record(1.0, 0.4), record(1.01, 0.4), record(1.0, 0.41)
    sweep = judge("x", [good, late, good, good, good, slow], load, load.promises[0], False)
    assert [point.attainment for point in sweep.points] == [0.5, 0.75]
    assert sweep.points[0].runs[0].median_tpot_ms == pytest.approx(100.0)


def test_the_chunk_that_attains_most_is_chosen() -> None:
    terms = DecodeTerms(step_s=0.01, row_s=0.0, context_token_s=0.0)
    profile = StepProfile(
        prefill_step_s=0.01, prefill_token_s=1e-4, decode=terms, large_decode=terms, large_batch_rows=1
    )
    lengths = [(1024, 20)] * 20
    roomy, _ = tuned_budget(lengths, profile, rate=1.0, ttft_s=0.12, tpot_s=1.0, budgets=(256, 1024))
    assert roomy == 1024  # whole prompts pay a step's fixed time once
    tight, attained = tuned_budget(lengths, profile, rate=8.0, ttft_s=10.0, tpot_s=0.028, budgets=(256, 1024))
    assert set(attained) == {256, 1024}
    assert attained[tight] == max(attained.values())
