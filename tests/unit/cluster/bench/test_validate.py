"""Prediction beside measurement: what counts, what is out, what is tried again, what is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tandem.cluster.bench import validate as validate_module
from tandem.cluster.bench.claims_cluster import System
from tandem.cluster.bench.claims_disaggregation import Kept, StairResult
from tandem.cluster.bench.claims_load import Staircase, quantiles_ms
from tandem.cluster.bench.claims_machine import Strain
from tandem.cluster.bench.validate import Figures, Row, Trial, Validation, row_of
from tandem.cluster.bench.validate_pace import Pace
from tandem.cluster.bench.validate_predict import NONE, Overheads, PredictedStair, Subject, predict
from tandem.cluster.bench.validate_show import show, show_overheads
from tandem.cluster.bench.validate_subjects import cpu_subject, paced_subject
from tandem.cluster.workload.report import RequestRecord
from tandem.cluster.workload.sweep import SweepRun
from validate_cases import load_of

CALM = Strain(cpu={"router": 0.2}, waited={"router": 0.01}, busy=0.3, stolen=0.0, others=0.1)


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
