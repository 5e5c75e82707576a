"""More than the cluster can serve: who is refused hears when to come back, who is let in keeps the promise, and nothing
is left. On the paced device: a prompt takes 40 ms, the promise is two seconds. A machine that is busy with something
else serves more slowly: what may be expected of waits and numbers is told by the pace at which answers came.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc import aio
from tandem.cluster.config import EngineConfig, RouterConfig
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.proto.tandem_v1_pb2_grpc import TandemStub
from tandem.cluster.types import SLO, Role

MODEL = "dummy:tiny-llama"
PROMISE_S = 2.0
SLACK = 1.5
"""For pauses of the machine, beside its pace; without refusals the last would wait for seven seconds."""
PROMPT_TOKENS = 100
CAPACITY_PER_S = 25.0
MAX_WAITING = 120
Start = Callable[..., Any]
Paced = Callable[..., EngineConfig]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one client saw; two tokens are an answer, so that its whole time is about its TTFT."""

    answered: bool
    took_s: float
    ended_s: float
    retry_after_s: float | None = None
    code: str = ""


def slowdown(served: Sequence[Outcome]) -> float:
    """How many times longer than it should a prompt took while a queue of them was served; at least 1."""
    ends_s = sorted(outcome.ended_s for outcome in served)
    return max(1.0, (ends_s[-1] - ends_s[0]) * CAPACITY_PER_S / max(len(ends_s) - 1, 1))


Ask = Callable[[int, str], Awaitable[Outcome]]


def slow_prefill(start_cluster: Start, paced: Paced, wait: Start) -> Any:
    """One pair of workers that have learned their step times."""
    router = RouterConfig(slo=SLO(ttft_s=PROMISE_S, tpot_s=1.0), max_waiting=MAX_WAITING)
    cluster = start_cluster(paced(prefix_cache=False), router=router)
    cluster.add(Role.PREFILL, paced_prefill_token_s=0.0004)
    cluster.add(Role.DECODE)
    cluster.wait_ready()
    for i in range(12):
        cluster.grpc.generate(token_ids=prompt(1000 + i), max_tokens=2, temperature=0).collect()
    steps = 'tandem:engine_steps_total{role="prefill",worker="prefill-0"}'
    wait(lambda: metric(cluster, steps) >= 12, "the router to hear of the steps that were run")
    return cluster


def metric(cluster: Any, series: str) -> float:
    """The sum of all series of the router that begin so."""
    lines = cluster.http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series))


def prompt(i: int) -> list[int]:
    return random.Random(i).choices(range(40, 240), k=PROMPT_TOKENS)


def over_http(client: httpx.AsyncClient) -> Ask:
    async def ask(i: int, slo_class: str) -> Outcome:
        begun_s = time.monotonic()
        body = {"model": MODEL, "prompt": prompt(i), "max_tokens": 2, "temperature": 0}
        answer = await client.post("/v1/completions", json=body, headers={"x-slo-class": slo_class})
        ended_s = time.monotonic()
        took_s = ended_s - begun_s
        if answer.status_code == 200:
            return Outcome(True, took_s, ended_s)
        assert answer.status_code == 429, answer.text
        error = answer.json()["error"]
        assert error["type"] == "rate_limit_error"
        return Outcome(False, took_s, ended_s, float(answer.headers["retry-after"]), error["code"])

    return ask


def over_grpc(stub: TandemStub) -> Ask:
    async def ask(i: int, slo_class: str) -> Outcome:
        begun_s = time.monotonic()
        request = pb.GenerateRequest(slo_class=slo_class, tokens=pb.TokenPrompt(token_ids=prompt(i)))
        request.sampling.max_tokens = 2
        try:
            async for response in stub.Generate(request, timeout=60):
                assert response.timings.slo_class in ("", slo_class)
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            advice = dict(error.trailing_metadata() or ())["retry-after-ms"]
            ended_s = time.monotonic()
            return Outcome(False, ended_s - begun_s, ended_s, float(advice) / 1000)
        ended_s = time.monotonic()
        return Outcome(True, ended_s - begun_s, ended_s)

    return ask


async def arrive(
    ask: Ask, count: int, per_s: float, slo_class: str, look: Callable[[], None], *, most: int | None = None
) -> list[Outcome]:
    """Sends requests evenly, whatever becomes of them; `most`: but never so many at a time that a slow machine would
    not keep up.
    """
    begun_s = time.monotonic()
    tasks = []
    free = asyncio.Semaphore(most or count)

    async def one(i: int) -> Outcome:
        try:
            return await ask(i, slo_class)
        finally:
            free.release()

    for i in range(count):
        await asyncio.sleep(max(0.0, begun_s + i / per_s - time.monotonic()))
        await free.acquire()
        tasks.append(asyncio.create_task(one(i)))
        look()
    return list(await asyncio.gather(*tasks))


async def through(cluster: Any, door: str, work: Callable[[Ask], Awaitable[Any]]) -> Any:
    """Runs `work` with a client of that door."""
    if door == "http":
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=f"http://{cluster.router.http_address}", timeout=60, trust_env=False, limits=limits
        ) as client:
            return await work(over_http(client))
    async with aio.insecure_channel(cluster.router.grpc_address) as channel:
        return await work(over_grpc(TandemStub(channel)))


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_at_three_times_the_capacity_who_is_let_in_keeps_the_promise(
    start_cluster: Start, paced: Paced, wait: Start, door: str
) -> None:
    cluster = slow_prefill(start_cluster, paced, wait)
    process = psutil.Process()
    rss_before = process.memory_info().rss
    waiting: list[int] = []
    sent_s: list[float] = []
    core = cluster.router.runtime.core

    def look() -> None:
        waiting.append(core._admission.waiting)
        sent_s.append(time.monotonic())

    async def storm(ask: Ask) -> list[Outcome]:
        return await arrive(ask, 260, 3 * CAPACITY_PER_S, "interactive", look)

    outcomes = asyncio.run(through(cluster, door, storm))
    admitted = [outcome for outcome in outcomes if outcome.answered]
    refused = [outcome for outcome in outcomes if not outcome.answered]
    slow = slowdown(admitted)
    assert len(admitted) >= 60 / slow, "about three seconds' work, and two seconds' queue"
    servable = CAPACITY_PER_S / slow * (sent_s[-1] - sent_s[0] + SLACK * PROMISE_S)
    assert len(refused) >= 0.5 * (len(outcomes) - servable), "about a hundred, where the client itself is not late"
    assert all(1 <= (outcome.retry_after_s or 0) <= 60 for outcome in refused)
    assert {outcome.code for outcome in refused} <= {"", "slo_unattainable"}
    kept = sum(outcome.took_s <= SLACK * PROMISE_S * slow for outcome in admitted)
    assert kept >= 0.9 * len(admitted), f"{kept} of {len(admitted)}, {slow:.2f} times slower than it should be"
    assert max(waiting) < MAX_WAITING, "the promise refuses before the bound does"
    assert process.memory_info().rss - rss_before < 100 * 2**20
    assert metric(cluster, "tandem:router_queue_choices{") == 0
    assert asyncio.run(through(cluster, door, lambda ask: ask(0, "interactive"))).answered
    text = cluster.http.get("/metrics").text
    assert not refused or f'reason="slo_unattainable"}} {float(len(refused))}' in text
    assert f'slo_choices_total{{model_name="{MODEL}",slo_class="interactive"}} {float(len(admitted) + 13)}' in text
    cluster.wait_clean()


def test_below_the_capacity_nobody_is_refused(start_cluster: Start, paced: Paced, wait: Start) -> None:
    cluster = slow_prefill(start_cluster, paced, wait)

    async def calm(ask: Ask) -> list[Outcome]:
        return await arrive(ask, 45, 0.6 * CAPACITY_PER_S, "interactive", lambda: None, most=6)

    outcomes = asyncio.run(through(cluster, "grpc", calm))
    assert all(outcome.answered for outcome in outcomes)
    cluster.wait_clean()


def test_a_flood_of_batch_beside_interactive_waits_and_goes_on(start_cluster: Start, paced: Paced, wait: Start) -> None:
    cluster = slow_prefill(start_cluster, paced, wait)
    progress: list[int] = []

    async def both(ask: Ask) -> tuple[list[Outcome], list[Outcome]]:
        done = 0

        async def flood(i: int, slo_class: str) -> Outcome:
            nonlocal done
            outcome = await ask(i, slo_class)
            done += outcome.answered
            return outcome

        batch = asyncio.create_task(arrive(flood, 80, 1000.0, "batch", lambda: None))
        await asyncio.sleep(0.3)
        promised = await arrive(ask, 24, 0.4 * CAPACITY_PER_S, "interactive", lambda: progress.append(done), most=6)
        return await batch, promised

    batch, promised = asyncio.run(through(cluster, "http", both))
    assert all(outcome.answered for outcome in promised), "their promise can be kept, whatever waits in batch"
    answered = [outcome for outcome in batch if outcome.answered]
    slow = slowdown([*answered, *promised])
    assert sum(outcome.took_s <= SLACK * PROMISE_S * slow for outcome in promised) >= 0.9 * len(promised)
    assert len(answered) >= 60, "half of the places are for those without a promise, and what was let in is served"
    assert all((outcome.retry_after_s or 0) >= 1 for outcome in batch if not outcome.answered)
    assert progress[-1] > progress[0], "batch goes on beside interactive"
    cluster.wait_clean()


def test_a_promise_that_no_cluster_could_keep_is_refused_with_what_it_would_take(
    start_cluster: Start, paced: Paced, wait: Start
) -> None:
    cluster = slow_prefill(start_cluster, paced, wait)
    body = {"model": MODEL, "prompt": prompt(0), "max_tokens": 2}
    answer = cluster.http.post("/v1/completions", json=body, headers={"x-slo-ttft-ms": "5"})
    assert answer.status_code == 429
    assert "even an idle cluster would need about 0.0" in answer.json()["error"]["message"]
    long_prompt = [40 + i % 200 for i in range(1900)]
    body = {"model": MODEL, "prompt": long_prompt[: cluster.status("prefill-0").max_model_len - 10], "max_tokens": 2}
    answer = cluster.http.post("/v1/completions", json=body, headers={"x-slo-class": "interactive"})
    assert answer.status_code == 200, "a lone long prompt is served, however long it takes"
    cluster.wait_clean()
