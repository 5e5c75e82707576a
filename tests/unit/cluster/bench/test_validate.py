"""Prediction beside measurement: what counts, what is out, what a machine's overheads do to a prediction."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tandem.cluster.bench import validate as validate_module
from tandem.cluster.bench.claims_cluster import System
from tandem.cluster.bench.claims_disaggregation import Kept, StairResult
from tandem.cluster.bench.claims_load import Promise, Staircase, quantiles_ms
from tandem.cluster.bench.claims_machine import Strain
from tandem.cluster.bench.validate import Figures, Row, Trial, Validation, row_of, saturation
from tandem.cluster.bench.validate_calibrate import (
    LONG_TOKENS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    keep_overheads,
    kept_overheads,
    overheads_of,
    share_of,
)
from tandem.cluster.bench.validate_pace import Pace
from tandem.cluster.bench.validate_predict import (
    NONE,
    Overheads,
    PredictedStair,
    Subject,
    predict,
    router_for,
    simulate,
)
from tandem.cluster.bench.validate_show import show, show_overheads
from tandem.cluster.bench.validate_subjects import QUICK_PROFILE, cpu_subject, paced_subject, parse_pools
from tandem.cluster.latency.links import LinkTerms
from tandem.cluster.latency.measured import MeasuredProfile, MeasuredStep, Measurement
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.workload.report import RequestRecord
from tandem.cluster.workload.sweep import SweepRun

CALM = Strain(cpu={"router": 0.2}, waited={"router": 0.01}, busy=0.3, stolen=0.0, others=0.1)
TERMS = DecodeTerms(step_s=0.01, row_s=1e-4, context_token_s=0.0)
PROFILE = StepProfile(prefill_step_s=0.01, prefill_token_s=1e-4, decode=TERMS, large_decode=TERMS, large_batch_rows=64)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "lengths.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arrival_s", "input_tokens", "output_tokens"])
        writer.writerows([["", 50 + 7 * number % 90, 5 + 3 * number % 20] for number in range(100)])
    return str(path)


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    PROFILE.save(tmp_path / "steps.json")
    return tmp_path / "steps.json"


def load_of(trace: str, *rates: float, **fields: float) -> Staircase:
    promise = Promise(ttft_s=0.1, tpot_s=0.03)
    return Staircase(dataset_path=trace, rates=rates, stair_s=20.0, promises=(promise,), **fields)


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


def run_of(attained: int, requests: int = 100, seed: int = 0) -> SweepRun:
    return SweepRun(seed=seed, requests=requests, attained=attained, late_requests=0, late_attained=0, duration_s=10.0)


def stair(attained: int, *, seed: int = 0, ttft_ms: float = 100.0, late: int = 0) -> StairResult:
    found = {"ttft_p50": (ttft_ms, ttft_ms - 5, ttft_ms + 5)}
    return StairResult(
        rate=1.0, runs=(run_of(attained, seed=seed),), steps=100, late_steps=late, strain=CALM, quantiles_ms=found
    )


def told(attained: int, *, seed: int = 0, ttft_ms: float = 100.0) -> PredictedStair:
    return PredictedStair(run=run_of(attained, seed=seed), quantiles_ms={"ttft_p50": (ttft_ms, 0.0, 0.0)})


def row(attained: int, predicted: int, ttft_ms: float = 100.0) -> Row:
    load, run = load_of("t", 1.0), stair(attained, ttft_ms=ttft_ms)
    return row_of("x", load, 0, [[told(predicted)]], [[run]])


def test_a_machine_that_the_cluster_itself_fills_says_nothing_of_the_prediction() -> None:
    """Waiting for processors is not modelled, so what is asked for is a machine or a pace at which nobody waits."""
    run = replace(stair(80), strain=replace(CALM, busy=0.875, others=0.125))
    found = row_of("x", load_of("t", 1.0, time_scale=2.0), 0, [[told(99)]], [[run]])
    assert (found.counts, found.own_cpu, found.misses) == (False, 0.75, ())
    assert "used 75 % of the machine: --time-scale 3" in found.void[0]
    computes = replace(stair(80), strain=replace(CALM, cpu={}, waited={}, busy=0.9))
    assert row_of("x", load_of("t", 1.0), 0, [[told(99)]], [[computes]]).counts
    crowded = replace(stair(80), strain=replace(CALM, cpu={}, waited={}, busy=0.9, others=0.5))
    assert row_of("x", load_of("t", 1.0), 0, [[told(99)]], [[crowded]]).void == (
        "seed 0: others used 50 % of the machine",
    )


def test_what_differs_by_too_much_below_saturation_is_out() -> None:
    assert row(97, 99).misses == ()
    assert row(95, 99).misses == ("attainment",)
    assert row(95, 99).points == pytest.approx(-4.0)
    assert row(99, 99, ttft_ms=115.0).misses == ("ttft_p50",)
    assert row(99, 99, ttft_ms=115.0).error("ttft_p50") == pytest.approx(0.15)
    assert math.isnan(row(99, 99).error("tpot_p90"))
    assert row(40, 80).misses == ()
    assert not row(40, 80).below_saturation


def test_void_stairs_do_not_count_and_predictions_are_of_the_seeds_that_do() -> None:
    load = load_of("t", 1.0)
    predicted = [[told(99, seed=0)], [told(91, seed=1)]]
    attempts = [[stair(10, seed=0, late=50)], [stair(90, seed=1)]]
    found = row_of("x", load, 0, predicted, attempts)
    assert (found.predicted.attained, found.measured) == (
        91,
        Figures(requests=100, attained=90, quantiles_ms={"ttft_p50": (100.0, 95.0, 105.0)}),
    )
    assert len(found.void) == 1
    assert "seed 0: 50 of 100 steps were late" in found.void[0]
    nothing = row_of("x", load, 0, predicted, attempts[:1])
    assert (nothing.counts, nothing.misses, nothing.predicted.attained) == (False, (), 99)
    assert nothing.measured is not None, "what was measured is shown all the same"
    assert nothing.measured.attained == 10
    none = row_of("x", load, 0, predicted, [])
    assert (none.counts, none.measured, none.predicted.requests) == (False, None, 200)
    # A seed that was tried again counts with the try that counts.
    again = row_of("x", load, 0, [predicted[0], [told(97)]], [*attempts[:1], [stair(98, seed=0)]])
    assert again.predicted.attained == 97, "what was foretold of that try"
    assert again.measured is not None
    assert again.measured.attained == 98


def test_a_cluster_that_fails_leaves_the_others_alone(trace: str, steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def run(subject: Subject, look: object, system: System, load: Staircase, say: object) -> list[StairResult]:
        asked.append(system.label)
        if system.mixed:
            raise RuntimeError("a worker ended with 1, not serving")
        return [replace(stair(97, late=50 * (len(asked) == 1)), rate=load.rates[0])]

    monkeypatch.setattr(validate_module, "run_behind_promises", run)
    load, lines, told = replace(load_of(trace, 1.0), stair_s=2.0), list[str](), dict[int, object]()
    trials = [Trial(subject=paced_subject(text, steps), load=load) for text in ("1P+1D", "2M")]
    found = asyncio.run(
        validate_module.validate(
            trials,
            NONE,
            seeds=1,
            kept=Kept(path=None),
            end_s=math.inf,
            say=lines.append,
            on_rows=lambda number, rows: told.__setitem__(number, rows),
        )
    )
    split, mixed = "1 prefill + 1 decode", "2 mixed, chunks of 512"
    assert asked == [split, mixed, split, mixed], "what is void is tried again when all have been measured"
    assert [(row.label, row.counts) for row in found.rows] == [(split, True), (mixed, False)]
    assert lines.count(f"{mixed}: a worker ended with 1, not serving") == 2
    assert set(told) == {0, 1}


def test_clusters_run_in_turns_seed_by_seed_and_what_is_kept_does_not(
    trace: str, steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    async def run(subject: Subject, look: object, system: System, load: Staircase, say: object) -> list[StairResult]:
        asked.append((system.label, load.seed))
        return [stair(97, seed=load.seed)]

    monkeypatch.setattr(validate_module, "run_behind_promises", run)
    load = replace(load_of(trace, 1.0), stair_s=2.0)
    trials = [Trial(subject=paced_subject(text, steps), load=load) for text in ("1P+1D", "1M")]
    for _ in range(2):
        work = validate_module.validate(
            trials,
            NONE,
            seeds=2,
            kept=Kept(path=tmp_path / "runs.jsonl"),
            end_s=math.inf,
            say=lambda text: None,
        )
        found = asyncio.run(work)
        assert [row.measured and row.measured.requests for row in found.rows] == [200, 200]
    split, mixed = (trial.subject.label for trial in trials)
    assert asked == [(split, 0), (mixed, 0), (split, 1), (mixed, 1)]


def test_a_run_is_foretold_at_the_pace_that_the_machine_had_around_it(
    trace: str, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([Pace(), Pace(prefill=1.1, decode=1.06), Pace(), Pace(decode=1.5)])
    monkeypatch.setattr(validate_module, "RunningSystem", lambda *_: contextlib.nullcontext(None))
    monkeypatch.setattr(validate_module, "options_for", lambda *_: None)
    monkeypatch.setattr(validate_module, "connect", lambda _: contextlib.nullcontext(SimpleNamespace(vocabulary=(1,))))
    monkeypatch.setattr(validate_module, "warm_up", nothing)
    monkeypatch.setattr(validate_module, "climb", one_stair)
    load = replace(load_of(trace, 1.0), stair_s=4.0)
    work = validate_module.validate(
        [Trial(subject=cpu_subject("1M", "smollm2-135m", steps, kv_cache_bytes=2**28, max_model_len=640), load=load)],
        NONE,
        seeds=2,
        kept=Kept(path=None),
        end_s=math.inf,
        say=lambda text: None,
        look=lambda: at_once(next(looks)),
    )
    monkeypatch.setattr(validate_module, "ATTEMPTS", 1)
    [found] = asyncio.run(work).rows
    assert found.pace == Pace(prefill=1.05, decode=1.03), "of the run that counts"
    assert found.void == ("seed 1: the machine's pace changed by 50 % meanwhile",)
    pace = Pace(prefill=1.05, decode=1.03)
    subject = cpu_subject("1M", "smollm2-135m", steps, kv_cache_bytes=2**28, max_model_len=640)
    slower = predict(replace(subject, pace=pace), load, NONE, validate_module.WARMUPS)[0]
    assert found.predicted.quantiles_ms == slower.quantiles_ms
    assert slower.quantiles_ms["tpot_p50"][0] > predict(subject, load, NONE, 4)[0].quantiles_ms["tpot_p50"][0]
    assert "105 %, 103 %" in show(Validation(overheads=NONE, rows=(found,)))


async def at_once(pace: Pace) -> Pace:
    return pace


async def nothing(*_: object) -> None:
    pass


async def one_stair(system: System, running: object, served: object, load: Staircase) -> list[StairResult]:
    return [stair(97, seed=load.seed)]


def test_quantiles_come_with_intervals_and_are_scaled_back() -> None:
    records = [
        RequestRecord(due_s=0, sent_s=0, first_token_s=0.2 + 0.002 * number, last_token_s=2.0, output_tokens=1)
        for number in range(101)
    ]
    failed = RequestRecord(due_s=0, sent_s=0, first_token_s=99.0, error="gone")
    found = quantiles_ms([*records, failed], 2.0)
    assert set(found) == {"ttft_p50", "ttft_p90"}
    value, low, high = found["ttft_p50"]
    assert value == pytest.approx(150.0)
    assert 130.0 < low < 150.0 < high < 170.0
    assert quantiles_ms([failed], 1.0) == {}


def test_the_table_says_what_is_within_what_is_out_and_what_was_void() -> None:
    void = row_of("y", load_of("t", 1.0), 0, [[told(99)]], [[stair(99, late=50)]])
    found = Validation(overheads=Overheads(first_token_s=0.002), rows=(row(98, 99), row(90, 99), row(30, 50), void))
    text = show(found)
    assert "below saturation: 1 of 2 rates within 3 points" in text
    assert "at most 9.0 points" in text
    assert "OUT: attainment" in text
    assert "saturated" in text
    assert text.count("VOID") == 2
    assert "100.0 / 115.0 (+15.0 %)" in show(replace(found, rows=(row(99, 99, ttft_ms=115.0),)))
    assert "20 %, 30 %" in text, "ours, all"
    assert "VOID  y at 1/s, seed 0: 50 of 100 steps were late" in text
    assert show(Validation(overheads=NONE, rows=())).endswith("nothing below saturation was measured")
    saved = json.loads(json.dumps(found.as_json({"a": 1}), allow_nan=False))
    assert saved["rows"][0]["attainment_points"] == pytest.approx(-1.0)
    assert saved["rows"][3]["counts"] is False
    assert "2.00 ms to a first token" in show_overheads(found.overheads)
    assert "others used" not in text
    assert "others used 40 % of it meanwhile" in show_overheads(Overheads(others_busy=0.4))
