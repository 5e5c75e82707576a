"""What is predicted of a cluster: its costs, and what a machine's overheads, measured on it, add to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster.bench import validate as validate_module
from tandem.cluster.bench.claims_load import Promise
from tandem.cluster.bench.validate import saturation
from tandem.cluster.bench.validate_calibrate import (
    LONG_TOKENS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    keep_overheads,
    kept_overheads,
    overheads_of,
    share_of,
)
from tandem.cluster.bench.validate_predict import NONE, Overheads, predict, router_for, simulate
from tandem.cluster.bench.validate_show import show_overheads
from tandem.cluster.bench.validate_subjects import QUICK_PROFILE, cpu_subject, paced_subject, parse_pools
from tandem.cluster.latency.links import LinkTerms
from tandem.cluster.latency.measured import MeasuredProfile, MeasuredStep, Measurement
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.workload.report import RequestRecord
from validate_cases import PROFILE, load_of


def test_plans_are_written_as_pools() -> None:
    assert parse_pools("2P+1D")[:3] == (2, 1, 0)
    assert parse_pools(" 3m ") == (0, 0, 3, 512)
    assert parse_pools("2M/256") == (0, 0, 2, 256)
    for text in ("", "1P", "2D+1P", "0M", "1P+0D", "9P+9D", "1P+1D+2M"):
        with pytest.raises(ValueError, match=r"plans: .* is not allowed; allowed: 2P\+1D"):
            parse_pools(text)


def test_the_machines_constants_come_out_of_answers_that_took_longer_than_modelled() -> None:
    """Prefill 20 ms and steps of 8 ms, and what is added to them here: 3 ms, 0.5 ms a step, 2 ms a handoff."""
    first_s = QUICK_PROFILE.prefill_step_s + 0.003 + 0.0005
    gaps_s = [0.008 + 0.0005 + 0.002] + [0.0085] * (OUTPUT_TOKENS - 2)

    def answer(slower: float, row_s: float = 0.0) -> RequestRecord:
        times = [first_s * slower]
        for gap_s in gaps_s:
            times.append(times[-1] + (gap_s + row_s) * slower)
        return RequestRecord(due_s=0, sent_s=0, first_token_s=times[0], last_token_s=times[-1], chunk_times_s=(*times,))

    alone = [answer(1.0)] * 6 + [answer(3.0)] * 4
    found = overheads_of(alone, [answer(1.0, row_s=0.0007)] * 8, QUICK_PROFILE, QUICK_PROFILE)
    assert found.first_token_s == pytest.approx(0.003)
    assert found.step_s == pytest.approx(0.0005)
    assert found.row_s == pytest.approx(0.0001)
    assert found.handoff_s + found.rpc_s == pytest.approx(0.002)
    assert found.own_s + 4 * found.rpc_s == pytest.approx(0.003)
    quick = [replace(one, first_token_s=0.001) for one in alone]
    assert overheads_of(quick, [], QUICK_PROFILE, QUICK_PROFILE).first_token_s == 0.0
    longer = [replace(one, first_token_s=one.first_token_s + 0.003) for one in alone]
    found = overheads_of(alone, [], QUICK_PROFILE, QUICK_PROFILE, longer)
    assert found.prompt_token_s == pytest.approx(0.003 / (LONG_TOKENS - PROMPT_TOKENS))


def test_constants_are_kept_beside_the_runs_that_they_predicted(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl.constants"
    assert kept_overheads(path, "paced") is None
    keep_overheads(path, "paced", Overheads(step_s=0.001))
    keep_overheads(path, "cpu", Overheads(step_s=0.002))
    assert kept_overheads(path, "paced") == Overheads(step_s=0.001)
    assert kept_overheads(path, "cuda") is None
    for text in ("[", '{"paced": {"nonsense": 1}}', '{"paced": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"results: .*runs.jsonl.constants holds no constants of a machine"):
            kept_overheads(path, "paced")


def test_overheads_are_added_where_they_arise(trace: str, steps: Path) -> None:
    load = load_of(trace, 0.5)
    bare, more = (
        {outcome.asked.request_id: outcome for outcome in simulate(paced_subject("1P+1D", steps), load, overheads, 4)}
        for overheads in (NONE, Overheads(first_token_s=0.004, step_s=0.001, handoff_s=0.002))
    )
    assert bare.keys() == more.keys()
    for name, outcome in bare.items():
        other = more[name]
        assert other.ttft_s is not None
        assert outcome.ttft_s is not None
        assert other.ttft_s - outcome.ttft_s >= 0.005 - 1e-9
        later_s = other.last_token_s - other.first_token_s - (outcome.last_token_s - outcome.first_token_s)
        assert later_s >= 0.001 * (outcome.output_tokens - 1)
    assert Overheads(row_s=0.001).on(PROFILE).large_decode.row_s == pytest.approx(0.0011)


def test_the_router_in_virtual_time_refuses_as_the_real_one_would(trace: str, steps: Path) -> None:
    load = replace(load_of(trace, 2.0, 250.0, time_scale=2.0), stair_s=3.0)
    config = router_for(paced_subject("1M", steps), load)
    assert (config.slo.ttft_s, config.slo.tpot_s) == (0.2, 0.06)
    outcomes = simulate(paced_subject("1M", steps), load, NONE, 0)
    refused = [outcome for outcome, on in zip(outcomes, load.judged(), strict=True) if on == 1 and outcome.refused]
    assert refused
    calm, flooded = predict(paced_subject("1M", steps), load, NONE, 0)
    assert calm.run.attainment == 1.0
    assert flooded.run.failed == len(refused)
    assert flooded.run.attainment < 0.9


def test_rates_can_be_shares_of_what_a_cluster_serves(trace: str, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate_module, "_SEARCH_S", 40.0)
    PROFILE.scaled(100.0).save(steps)
    load = replace(load_of(trace, 1.0), promises=(Promise(ttft_s=10.0, tpot_s=2.0),))
    one, two = (saturation(paced_subject(text, steps), load, NONE, 0.5) for text in ("1M", "2M"))
    assert 1.5 * one < two < 3 * one
    impossible = replace(load, promises=(Promise(ttft_s=0.001, tpot_s=0.001),))
    assert saturation(paced_subject("1M", steps), impossible, NONE, 0.5) == 0.0


def test_an_engine_that_computes_has_a_profile_of_its_own(steps: Path) -> None:
    subject = cpu_subject("1P+1D", "smollm2-135m", steps, kv_cache_bytes=2**28, max_model_len=640)
    prefill, decode = subject.workers(Overheads(step_s=0.002))
    assert (prefill.role.value, decode.role.value) == ("prefill", "decode")
    assert prefill.num_blocks == 2**28 // (30 * 2 * 3 * 64 * 2 * 16)
    assert decode.costs.step_time_s(0, 0, 1, 10) == pytest.approx(0.01 + 1e-4 + 0.002)
    with pytest.raises(ValueError, match="profile: is missing"):
        replace(subject, profile=None).workers(NONE)


def test_kv_of_engines_that_compute_takes_what_the_profile_measured(trace: str, tmp_path: Path) -> None:
    files = resolve_model("smollm2-135m")
    measured = Measurement(
        model="smollm2-135m",
        model_config=files.config,
        device="cpu",
        dtype="bfloat16",
        block_size=16,
        kv_token_bytes=23040,
        steps={"p": MeasuredStep(prefill_tokens=64, prefill_squares=4096, times_s=(0.02,))},
        links={"mapped": LinkTerms(bandwidth_gb_s=0.1, latency_us=9000.0)},
    )
    MeasuredProfile(steps=PROFILE, measured=measured).save(tmp_path / "profile.json")
    subject = cpu_subject("1P+1D", "smollm2-135m", tmp_path / "profile.json", kv_cache_bytes=2**28, max_model_len=640)
    link = subject.link()
    assert link is not None
    byte_s = 1.0 / link.bytes_per_s
    assert (link.latency_s, byte_s) == (pytest.approx(0.009), pytest.approx(1e-8))
    load = load_of(trace, 0.5)
    free, moved = (simulate(subject, load, Overheads(handoff_byte_s=each), 0) for each in (0.0, byte_s))
    for before, after in zip(free, moved, strict=True):
        if before.output_tokens > 1:
            blocks = -(-len(before.asked.prompt_token_ids) // 16)
            more_s = blocks * 16 * 23040 * byte_s
            assert after.last_token_s - before.last_token_s == pytest.approx(more_s, abs=1e-3)
    assert paced_subject("1P+1D", tmp_path / "profile.json").link() is None
    assert "10.00 ms to each MB of it" in show_overheads(Overheads(handoff_byte_s=byte_s))


def test_what_a_second_engine_takes_is_told_by_pairs_and_pays_where_both_compute(trace: str, steps: Path) -> None:
    def seen(slower: float) -> RequestRecord:
        times = [0.02 + 0.01 * slower * place for place in range(OUTPUT_TOKENS)]
        return RequestRecord(due_s=0, sent_s=0, first_token_s=0.02, last_token_s=times[-1], chunk_times_s=(*times,))

    drifting = [(seen(pace), seen(pace * share)) for pace, share in ((1.0, 1.1), (1.4, 1.25), (2.0, 1.3))]
    assert share_of(drifting) == pytest.approx(0.25)
    assert share_of([(seen(1.0), seen(0.9))]) == 0.0
    assert "25 % to what is beside another engine" in show_overheads(Overheads(beside_share=0.25))
    subject = cpu_subject("1P+1D", "smollm2-135m", steps, kv_cache_bytes=2**28, max_model_len=640)
    alone, shared = (simulate(subject, load_of(trace, 4.0), Overheads(beside_share=each), 0) for each in (0.0, 0.25))
    later_s = [
        after.last_token_s - before.last_token_s
        for before, after in zip(alone, shared, strict=True)
        if before.last_token_s is not None and after.last_token_s is not None
    ]
    assert min(later_s) >= 0.0
    assert sum(later_s) > 0.1
