"""DistServe (OSDI '24): what its A100 profile says, how attainment against rate is judged, and what it foretells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from tandem.cluster.bench.claims_load import Promise, Staircase, crossing, judge
from tandem.cluster.bench.claims_predict import predict
from tandem.cluster.bench.claims_systems import (
    DISTSERVE_MODEL,
    KV_TOKENS,
    candidates,
    colocated,
    split,
    token_bytes,
)
from tandem.cluster.latency.profile import distserve_profile
from tandem.cluster.workload.report import RequestRecord

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
    profiles: Mapping[int, str | Path] = {parallel: f"tp{parallel}.json" for parallel in (1, 2, 4)}
    assert {system.gpus for system in candidates(4, profiles)} == {4}
    assert len({system.label for system in candidates(4, profiles)}) == len(candidates(4, profiles))
    wide = split(3, profiles, prefill_tp=2)
    assert (wide.label, wide.workers, wide.gpus) == ("1 prefill (TP 2) + 1 decode", 2, 3)
    assert wide.prefill_engine is not None
    assert wide.prefill_engine.paced_profile == "tp2.json"
    assert split(4, profiles, prefill=1).label == "1 prefill + 3 decode"
    alone = colocated(4, profiles, budget=None, tensor_parallel=2)
    assert (alone.mixed, alone.gpus, alone.engine.batching) == (2, 4, "prompts_alone")
    for gpus, asked in ((2, {"prefill_tp": 2}), (4, {"prefill": 4}), (4, {"prefill": 1, "decode_tp": 2})):
        with pytest.raises(ValueError, match=f"gpus: {gpus} with prefill"):
            split(gpus, profiles, **asked)


def test_goodput_is_where_attainment_falls_below_the_target() -> None:
    """§6.1: goodput is the highest rate at which 90 % of the requests keep both promises."""
    assert crossing([(1.0, 1.0), (2.0, 0.95), (4.0, 0.85)], 0.9) == pytest.approx(3.0)
    assert crossing([(1.0, 0.8), (2.0, 0.95)], 0.9) == 0.0
    assert crossing([(1.0, 1.0), (2.0, 0.9)], 0.9) == 2.0
    assert crossing([(1.0, 1.0), (2.0, 0.9), (3.0, 0.5), (4.0, 0.95)], 0.9) == 2.0


def test_attainment_is_joint_by_stair_and_scaled_back() -> None:
    """§6.2: a request attains only if it keeps TTFT and TPOT; here on a clock that runs four times slower."""
    promise = Promise(ttft_s=0.25, tpot_s=0.1)
    load = Staircase(dataset_path="", rates=(2.0, 4.0), stair_s=1.0, promises=(promise,), time_scale=4.0)
    assert load.judged() == (0, 0, 1, 1, 1, 1)
    arrivals = load.arrivals_s()
    assert list(arrivals) == sorted(arrivals)
    assert [time_s < 4.0 for time_s in arrivals] == [stair == 0 for stair in load.judged()]

    def record(ttft_s: float, tpot_s: float) -> RequestRecord:
        return RequestRecord(
            due_s=0.0, sent_s=0.0, first_token_s=ttft_s, last_token_s=ttft_s + 4 * tpot_s, output_tokens=5
        )

    good, late, slow = record(1.0, 0.4), record(1.01, 0.4), record(1.0, 0.41)
    records = [good, late, good, good, None, slow]  # one had not ended when the run was over
    runs = [judge(records, load, promise, stair, client_late=False) for stair in (0, 1)]
    assert [run.attainment for run in runs] == [0.5, 0.5]
    assert runs[1].requests == 4
    assert runs[0].median_tpot_ms == pytest.approx(100.0)


def test_what_comes_before_and_after_a_rate_is_not_judged() -> None:
    """A short run from empty flatters, and an answer that runs under the next rate does not."""
    load = Staircase(
        dataset_path="",
        rates=(10.0, 20.0),
        stair_s=2.0,
        settle_s=1.0,
        guard_s=1.0,
        promises=(Promise(ttft_s=1, tpot_s=1),),
    )
    assert load.counts == (40, 80)
    for arrival_s, stair in zip(load.arrivals_s(), load.judged(), strict=True):
        inside_s = arrival_s % 4.0
        assert stair == (int(arrival_s // 4.0) if 1.0 <= inside_s < 3.0 else None)


def test_tight_tpot_is_where_disaggregation_wins(data: Path, tmp_path: Path) -> None:
    """§2.3 and §6.2: the tighter TPOT, the more a prompt beside decodes costs. At one TTFT of a second, one prefill and
    three decode GPUs keep more than four colocated ones at 40 ms a token, and fewer at 100.
    """
    path = tmp_path / "tp1.json"
    distserve_profile(data / PROFILE, DISTSERVE_MODEL).save(path)
    load = Staircase(
        dataset_path=str(data / "workloads/sharegpt_distserve_opt_poisson16rps.csv.gz"),
        rates=(8.0, 10.0),
        stair_s=20.0,
        settle_s=10.0,
        promises=(Promise(ttft_s=1.0, tpot_s=0.04), Promise(ttft_s=0.25, tpot_s=0.1)),
    )
    tight, loose = (sweep.points[0].attainment for sweep in predict(split(4, {1: path}, prefill=1), load))
    mixed_tight, mixed_loose = (
        sweep.points[0].attainment for sweep in predict(colocated(4, {1: path}, budget=512), load)
    )
    assert tight > mixed_tight
    assert loose < mixed_loose
