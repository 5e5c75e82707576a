"""The open loop with a made-up server: order, concurrency, ending early, its own lateness; and sweeps on top of it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from tandem.cluster.bench import sweep_load
from tandem.cluster.bench.interrupt import Stop, finishes, stops
from tandem.cluster.bench.load import Load, run_load
from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.run import Served
from tandem.cluster.bench.sweep_load import SweepPlan, run_sweep
from tandem.cluster.workload.datasets import BenchRequest
from tandem.cluster.workload.report import RequestRecord, summarize
from tandem.cluster.workload.sweep import SweepPoint, SweepResult, Watch

PROMISES = {"ttft": 50.0}
Send = Callable[[BenchRequest, float, str], Awaitable[RequestRecord]]


def answered(due_s: float, ttft_s: float) -> RequestRecord:
    now_s = time.monotonic()
    return RequestRecord(
        due_s=due_s,
        sent_s=now_s,
        first_token_s=now_s + ttft_s,
        last_token_s=now_s + ttft_s,
        chunk_times_s=(now_s + ttft_s,),
        output_tokens=1,
    )


def load(send: Send, count: int, **options: Any) -> Load:
    requests = [BenchRequest(prompt=str(place), max_tokens=1) for place in range(count)]
    return asyncio.run(run_load(send, requests, [0.0] * count, **options))


def test_requests_are_named_by_their_places() -> None:
    names: list[tuple[str, object]] = []

    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        names.append((request_id, request.prompt))
        return answered(due_s, 0.01)

    load(send, 3, name="run")
    assert names == [("run-0", "0"), ("run-1", "1"), ("run-2", "2")]


def test_a_closed_loop_never_has_more_under_way() -> None:
    now = most = 0

    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return answered(due_s, 0.01)

    assert len(load(send, 20, max_concurrency=3).records) == 20
    assert most == 3


def test_a_lost_load_ends_and_gives_up_what_is_under_way() -> None:
    given_up = []

    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        if request.prompt == "0":
            return answered(due_s, 0.01)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            given_up.append(request.prompt)
            raise
        return answered(due_s, 60.0)

    found = load(send, 4, watch=Watch(PROMISES, forgiven=2))
    assert found.ended_early
    assert found.overdue == 3
    assert len(found.records) == 1
    assert sorted(given_up) == ["1", "2", "3"]


def test_what_concurrency_holds_back_is_not_under_way() -> None:
    """A request that waits for its turn has no promise to miss yet."""

    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        await asyncio.sleep(0.08)  # two looks at a promise of 50 ms
        return answered(due_s, 0.01)

    found = load(send, 6, max_concurrency=1, watch=Watch(PROMISES, forgiven=1))
    assert not found.ended_early
    assert len(found.records) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_load_with_what_was_measured(number: signal.Signals) -> None:
    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        if request.prompt == "2":
            signal.raise_signal(number)
        if request.prompt in "01":
            return answered(due_s, 0.01)
        await asyncio.sleep(60)
        return answered(due_s, 60.0)

    async def run() -> tuple[Load, int]:
        with stops() as stop:
            requests = [BenchRequest(prompt=str(place), max_tokens=1) for place in range(4)]
            return await run_load(send, requests, [0.0] * 4, stop=stop), stop.exit_code

    before = signal.getsignal(number)
    found, code = asyncio.run(run())
    assert (found.interrupted, len(found.records), found.given_up) == (True, 2, 2)
    assert code == 128 + number
    assert signal.getsignal(number) == before


def test_a_second_signal_does_what_it_always_did() -> None:
    async def run() -> None:
        with stops() as stop:
            signal.raise_signal(signal.SIGINT)
            await stop.wait()
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run())


def test_work_ends_with_its_stop() -> None:
    async def run() -> tuple[bool, bool]:
        stop = Stop()
        well = await finishes(asyncio.sleep(0), stop)
        stop.set()
        return well, await finishes(asyncio.sleep(60), stop)

    assert asyncio.run(run()) == (True, False)


def test_an_event_loop_that_stalls_is_seen() -> None:
    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        for _ in range(4):
            time.sleep(0.08)  # noqa: ASYNC251
            await asyncio.sleep(0)
        await asyncio.sleep(0.06)
        return answered(due_s, 0.01)

    assert max(load(send, 1).stalls_s) > 0.1


def test_a_wrong_request_is_an_error_not_a_record() -> None:
    async def send(request: BenchRequest, due_s: float, request_id: str) -> RequestRecord:
        raise ValueError("endpoint: takes text")

    with pytest.raises(ExceptionGroup) as caught:
        load(send, 1)
    assert caught.group_contains(ValueError, match="takes text")


def sweep(
    knee: float, monkeypatch: pytest.MonkeyPatch, interrupt_at: int = 0, **plan: Any
) -> tuple[SweepResult, list[SweepPoint], list[int]]:
    """A server that keeps its promises up to `knee` requests/s, whatever else happens; and the seeds of the runs."""
    seeds: list[int] = []

    async def run_once(options: BenchOptions, served: Served, on_done: Any, watch: Watch | None, stop: Stop) -> Any:
        seeds.append(options.seed)
        ttft_s = 0.01 if options.request_rate <= knee else 0.5
        records = [
            RequestRecord(
                due_s=place / options.request_rate,
                sent_s=place / options.request_rate,
                first_token_s=place / options.request_rate + ttft_s,
                last_token_s=place / options.request_rate + ttft_s,
                output_tokens=1,
            )
            for place in range(options.num_prompts)
        ]
        early = False
        for record in records if watch is not None else ():
            watch.done(record)
            early = early or watch.is_lost(0)
        summary = summarize(records, PROMISES, (99.0,))
        if len(seeds) == interrupt_at:
            stop.set()
        found = {"records": records, "summary": summary, "ended_early": early, "overdue": 0}
        return type("Result", (), {**found, "interrupted": stop.is_set()})

    @contextlib.asynccontextmanager
    async def connect(options: BenchOptions) -> AsyncIterator[Served]:
        async def send(*_: Any) -> RequestRecord:
            raise AssertionError("nothing is sent")

        yield Served(send=send, model="m", max_model_len=None, vocabulary=())

    monkeypatch.setattr(sweep_load, "run_once", run_once)
    monkeypatch.setattr(sweep_load, "connect", connect)
    points: list[SweepPoint] = []
    options = BenchOptions(goodput_ms=PROMISES, seed=7)
    result = asyncio.run(run_sweep(options, SweepPlan(**{"duration_s": 5.0, **plan}), points.append))
    return result, points, seeds


def test_an_interrupted_sweep_keeps_its_whole_points(monkeypatch: pytest.MonkeyPatch) -> None:
    result, points, _ = sweep(50.0, monkeypatch, interrupt_at=5)
    assert [point.rate for point in points] == [1.0]
    assert result.points == tuple(points)
    assert (result.complete, result.exit_code) == (False, 130)
    assert result.as_json()["interrupted"] is True


def test_a_sweep_finds_the_knee_with_a_seed_of_its_own_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    result, points, seeds = sweep(5.0, monkeypatch, resolution=0.1)
    assert result.best is not None
    assert 5.0 / 1.1 <= result.best.rate <= 5.0
    assert result.complete
    assert seeds == list(range(7, 7 + len(seeds)))
    lost = [point for point in points if not point.keeps(0.9)]
    assert lost
    assert all(len(point.runs) == 1 and point.runs[0].ended_early for point in lost)
    assert all(len(point.runs) == 3 for point in points if point.keeps(0.9))


def test_named_rates_are_measured_to_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    result, points, _ = sweep(5.0, monkeypatch, rates=(8.0, 4.0), seeds=2)
    assert [point.rate for point in points] == [8.0, 4.0]
    assert [len(point.runs) for point in points] == [2, 2]
    assert [run.ended_early for point in points for run in point.runs] == [False] * 4
    assert [point.rate for point in result.points] == [4.0, 8.0]
    assert result.best is not None
    assert result.best.rate == 4.0


def test_a_sweep_that_runs_out_of_points_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    result, points, _ = sweep(1000.0, monkeypatch, max_points=2, seeds=1)
    assert len(points) == 2
    assert not result.complete


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"goodput_ms": {}}, "goodput: is missing"),
        ({"max_concurrency": 3}, "max_concurrency: is not allowed with sweep"),
        (
            {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1.0, "ramp_up_end_rps": 2.0},
            "ramp_up_strategy: is not allowed with sweep",
        ),
    ],
)
def test_what_makes_no_sweep_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asyncio.run(run_sweep(BenchOptions(**{"goodput_ms": PROMISES, **changes}), SweepPlan()))
