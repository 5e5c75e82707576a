"""Comparing systems: what is void, what is kept and run again, whole systems in virtual time, and what is shown."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster.bench import claims_disaggregation
from tandem.cluster.bench.claims_batching_served import ServedRow, show_served
from tandem.cluster.bench.claims_cluster import StepCount, System
from tandem.cluster.bench.claims_disaggregation import Kept, StairResult, compare, goodput_of, result_of
from tandem.cluster.bench.claims_load import Promise, Staircase, sweep_of
from tandem.cluster.bench.claims_machine import Strain, strain, take_sample
from tandem.cluster.bench.claims_show import show
from tandem.cluster.config import EngineConfig
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.workload.sweep import SweepRun

LOAD = Staircase(dataset_path="x", rates=(1.0, 2.0, 4.0), stair_s=10.0, promises=(Promise(ttft_s=0.25, tpot_s=0.1),))
CALM = Strain(cpu={"router": 0.2}, waited={"router": 0.01}, busy=0.3, stolen=0.0)
HARD = replace(CALM, waited={"router": 0.4})
TERMS = DecodeTerms(step_s=0.01, row_s=1e-3, context_token_s=1e-6)
PROFILE = StepProfile(prefill_step_s=0.01, prefill_token_s=1e-4, decode=TERMS, large_decode=TERMS, large_batch_rows=100)


def system(label: str, **pools: int) -> System:
    return System(label=label, engine=EngineConfig(device="paced"), **pools)


SPLIT, MIXED = system("1 prefill + 1 decode", prefill=1, decode=1), system("2 mixed", mixed=2)


def stair(rate: float, attained: int, pressure: Strain = CALM, seed: int = 0, late_steps: int = 0) -> StairResult:
    run = SweepRun(
        seed=seed, requests=100, attained=attained, late_requests=50, late_attained=attained // 2, duration_s=10.0
    )
    return StairResult(rate=rate, runs=(run,), steps=1000, late_steps=late_steps, strain=pressure)


def proc(folder: Path, ran_ns: int, waited_ns: int, busy: int, stolen: int) -> Path:
    """A /proc with one process of two threads and one line of the machine's counters, a hundred ticks a second."""
    for thread, share in (("7", 1), ("8", 2)):
        path = folder / "7" / "task" / thread
        path.mkdir(parents=True, exist_ok=True)
        (path / "schedstat").write_text(f"{ran_ns * share} {waited_ns * share} 5\n")
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {1000 - busy - stolen} 0 0 0 {stolen} 0 0\n")
    return folder


def test_waits_of_all_threads_are_counted(tmp_path: Path) -> None:
    processes = {"router": 7, "gone": 99}
    before = take_sample(processes, proc(tmp_path, 0, 0, busy=0, stolen=0))
    after = take_sample(processes, proc(tmp_path, 10**9, 10**8, busy=400, stolen=100))
    found = strain(before, replace(after, at_s=before.at_s + 10.0, whole_s=before.whole_s + 10.0))
    assert found.cpu == pytest.approx({"router": 0.3, "gone": 0.0})
    assert found.waited == pytest.approx({"router": 0.03, "gone": 0.0})
    assert (found.busy, found.stolen) == pytest.approx((0.4, 0.1))


@pytest.mark.parametrize(
    ("pressure", "words"),
    [
        (HARD, "router waited 40 % of the time for a processor"),
        (replace(CALM, cpu={"router": 0.97}), "router used 97 % of a processor"),
        (replace(CALM, stolen=0.2), "the host took 20 % of the machine away"),
    ],
)
def test_a_stair_that_the_machine_limited_is_void(pressure: Strain, words: str) -> None:
    assert stair(1.0, 100, pressure).void == words
    assert stair(1.0, 100).void == ""
    assert stair(1.0, 100, late_steps=30).void == "30 of 1000 steps were late"


def compared(
    monkeypatch: pytest.MonkeyPatch, kept: Kept, pressures: list[Strain], seeds: int = 1, left_s: float = 1e6
) -> tuple[list[list[list[StairResult]]], list[tuple[str, int]]]:
    """`compare`, whose runs are made up: one after the other under these pressures, then calm ones."""
    made: list[tuple[str, int]] = []

    async def run_system(which: System, load: Staircase, say: object) -> list[StairResult]:
        pressure = pressures[len(made)] if len(made) < len(pressures) else CALM
        made.append((which.label, load.seed))
        return [stair(rate, 95, pressure, load.seed) for rate in load.rates]

    monkeypatch.setattr(claims_disaggregation, "run_system", run_system)
    end_s = time.monotonic() + left_s
    found = asyncio.run(compare((SPLIT, MIXED), LOAD, seeds=seeds, kept=kept, end_s=end_s, say=lambda text: None))
    return found, made


def test_void_runs_are_made_once_more_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = compared(monkeypatch, Kept(path=None), [HARD, CALM, HARD])
    assert made == [("1 prefill + 1 decode", 0), ("2 mixed", 0), ("1 prefill + 1 decode", 0)]
    assert [len(attempts) for attempts in found] == [2, 1]


def test_what_was_kept_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    first, made = compared(monkeypatch, Kept(path=path), [], seeds=2)
    assert len(made) == 4
    again, made = compared(monkeypatch, Kept(path=path), [], seeds=3)
    assert made == [("1 prefill + 1 decode", 2), ("2 mixed", 2)]
    assert [len(attempts) for attempts in again] == [3, 3]
    assert repr(again[0][:2]) == repr(first[0])  # NaN, which equals nothing, among them
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"results: .*runs.jsonl, line 1: no saved run"):
        Kept(path=path)


def test_nothing_starts_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = compared(monkeypatch, Kept(path=None), [], left_s=40.0)
    assert (made, found) == ([], [[], []])


def test_void_stairs_are_shown_and_count_nowhere() -> None:
    attempts = [
        [stair(1.0, 100), stair(2.0, 10, HARD), stair(4.0, 80)],
        [stair(1.0, 98), stair(2.0, 96), stair(4.0, 80)],
    ]
    split = result_of(SPLIT, LOAD, attempts, ())
    assert [point.attainment for point in split.sweep(0).points] == [0.98, 0.96, 0.8], "of one seed the last counts"
    assert str(split.goodput(0)) == "1.37"  # 90 % lies at 2.75/s, on two GPUs
    mixed = result_of(MIXED, LOAD, [[stair(1.0, 95), stair(2.0, 10, HARD), stair(4.0, 85)]], ())
    text = show((split, mixed, result_of(system("none", mixed=2), LOAD, [], ())), LOAD)
    assert "VOID at 2/s, seed 0: router waited 40 %" in text
    table = text.splitlines()[1:5]
    assert table[1].split()[-5:] == ["98.0", "96.0", "80.0", "1.37", "1.10x"]
    assert table[2].split()[-5:] == ["95.0", "VOID", "85.0", "1.25", "1.00x"]
    assert table[3].split()[-5:] == ["-", "-", "-", "-", "-"]


def test_goodput_beyond_the_rates_is_a_bound() -> None:
    def found(*attained: int) -> str:
        runs = [[stair(rate, share).runs[0]] for rate, share in zip(LOAD.rates, attained, strict=True)]
        return str(goodput_of(sweep_of("x", LOAD, LOAD.promises[0], runs), 2))

    assert found(100, 99, 95) == ">=2.00"
    assert found(80, 70, 60) == "<0.50"
    assert math.isnan(goodput_of(sweep_of("x", LOAD, LOAD.promises[0], [[], [], []]), 2).per_gpu)


def test_batching_that_was_served_stands_beside_its_prediction() -> None:
    iteration = ServedRow(
        system="iteration level", rate=4.0, requests=240, normalized_s=0.05, predicted_s=0.046, void=""
    )
    request = replace(iteration, system="request level, streamed", rate=0.5)
    assert "one worker took 8.0x the requests by iteration" in show_served([iteration, request])
    limited = show_served([iteration, replace(request, void="router used 97 % of a processor")])
    assert "VOID: router used 97 %" in limited
    assert "one worker took" not in limited
    assert StepCount(steps=10, late=3).since(StepCount(steps=6, late=1)) == StepCount(steps=4, late=2)


def test_requests_have_the_traces_lengths_and_warm_ups_are_short(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,30,40\n1,50,3\n2,3000,9\n")
    load = replace(LOAD, dataset_path=str(path), rates=(1.0,))
    warm, sent = load.requests(range(100, 200), warmups=5)
    assert all(request.max_tokens in (3, 8) for request in warm)
    assert {(len(request.prompt), request.max_tokens) for request in sent} == {(30, 40), (50, 3)}
    assert [row.input_tokens for row in load.rows()] == [len(request.prompt) for request in sent]
    assert load.key() == replace(load).key() != replace(load, seed=1).key()
    path.write_text("arrival_s,input_tokens,output_tokens\n0,3000,40\n")
    with pytest.raises(ValueError, match="dataset_path: nothing in it fits into a context of 2048 tokens"):
        load.rows()
