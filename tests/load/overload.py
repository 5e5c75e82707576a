"""More requests than the cluster can serve, on real processes: who is refused, who keeps the promise, what is left.

    .venv/bin/python tests/load/overload.py                  # a minute at three times the capacity
    .venv/bin/python tests/load/overload.py --factor 0.8 --seconds 20
    .venv/bin/python tests/load/overload.py --bottleneck decode

One router, one prefill and one decode worker on the paced device, which computes nothing and takes the time that a
latency model says: capacity follows from its coefficients. Arrivals are Poisson, `--factor` times the capacity; every
twentieth refused client comes back when it was told to, until it is let in. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from grpc import aio
from tandem.cluster.config import EngineConfig, RouterConfig, SLOClass, WorkerConfig, to_dict
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.proto.tandem_v1_pb2_grpc import TandemStub
from tandem.cluster.types import SLO, Role

MODEL = "dummy:tiny-llama"
PROMPT_TOKENS = 100
PREFILL_TOKEN_S = 0.0004
STEP_S = 0.002
DECODE_ROWS = 8
DECODE_STEP_S = 0.02
SAMPLE_EVERY = 20
"""Of refused clients, so many come back."""
MAX_RETRIES = 60
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is run."""

    factor: float
    seconds: float
    promise_s: float
    bottleneck: str
    batch_share: float
    seed: int

    @property
    def output_tokens(self) -> int:
        """Of every answer."""
        return 4 if self.bottleneck == "prefill" else 41

    @property
    def capacity_per_s(self) -> float:
        """Requests per second, from the coefficients: full prefill steps, or full decode batches."""
        if self.bottleneck == "prefill":
            return 512 / (STEP_S + 512 * PREFILL_TOKEN_S) / PROMPT_TOKENS
        return DECODE_ROWS / (DECODE_STEP_S * self.output_tokens)


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it."""

    slo_class: str
    sent_s: float
    ttft_s: float | None = None
    retry_after_s: float | None = None
    error: str = ""


@dataclass(slots=True)
class Retry:
    """One refused client that came back until it was let in."""

    advised_s: float
    waited_s: float = 0.0
    tries: int = 0
    admitted: bool = False


@dataclass(slots=True)
class Run:
    """Everything that was seen."""

    outcomes: list[Outcome] = field(default_factory=list)
    retries: list[Retry] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)


class Members:
    """The processes; `close` ends them."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[str]] = []
        router = RouterConfig(
            model=MODEL,
            http_port=0,
            grpc_port=0,
            registry_port=0,
            slo=SLO(ttft_s=scene.promise_s, tpot_s=1.0),
            slo_classes={"batch": SLOClass(share=0.1)},
        )
        process, self.addresses = self._start("router", router)
        self.router = psutil.Process(process.pid)
        engine: dict[str, Any] = {"model": MODEL, "device": "paced", "kv_cache_bytes": 16 * 2**20}
        engine |= {"paced_step_s": STEP_S, "paced_decode_row_s": 0.0}
        prefill = EngineConfig(**engine, paced_prefill_token_s=PREFILL_TOKEN_S, prefix_cache=False)
        decode = EngineConfig(**engine, prefix_cache=False)
        if scene.bottleneck == "decode":
            slow = engine | {"paced_step_s": DECODE_STEP_S, "max_running": DECODE_ROWS, "max_waiting": 2}
            decode = EngineConfig(**slow, prefix_cache=False)
            prefill = EngineConfig(**engine, paced_prefill_token_s=PREFILL_TOKEN_S / 20, prefix_cache=False)
        for role, config in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            registry = (self.addresses["registry"],)
            self._start("worker", WorkerConfig(worker_id=f"{role}-0", role=role, engine=config, routers=registry))

    def _start(self, kind: str, config: RouterConfig | WorkerConfig) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        path = self._folder / f"{kind}-{len(self._running)}.json"
        path.write_text(json.dumps(to_dict(config)))
        command = [sys.executable, "-m", "tandem.cluster.launch.process", kind, "--config", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=self._folder)
        self._running.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    def wait_ready(self) -> None:
        """Returns when both workers can take work."""
        deadline_s = time.monotonic() + 60
        while httpx.get(f"http://{self.addresses['http']}/ready", trust_env=False).status_code != 200:
            if time.monotonic() > deadline_s:
                raise TimeoutError("the cluster is not ready after a minute")
            time.sleep(0.1)

    def gauge(self, name: str) -> float:
        """A metric of the router, summed over its labels."""
        text = httpx.get(f"http://{self.addresses['http']}/metrics", trust_env=False).text
        lines = (line for line in text.splitlines() if line.startswith(f"tandem:{name}{{"))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def close(self) -> None:
        """Ends what still runs."""
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            process.wait(30)


class Client:
    """Sends requests and notes what becomes of them."""

    def __init__(self, stub: TandemStub, scene: Scene, run: Run) -> None:
        self._stub = stub
        self._scene = scene
        self._run = run
        self._random = random.Random(scene.seed)
        self._refused = 0

    async def ask(self, slo_class: str) -> Outcome:
        """One request, to its end."""
        request = pb.GenerateRequest(slo_class=slo_class)
        request.tokens.token_ids.extend(self._random.choices(range(40, 240), k=PROMPT_TOKENS))
        request.sampling.max_tokens = self._scene.output_tokens
        request.sampling.temperature = 0.0
        outcome = Outcome(slo_class, time.monotonic())
        call = self._stub.Generate(request, timeout=TIMEOUT_S)
        try:
            async for _ in call:
                if outcome.ttft_s is None:
                    outcome.ttft_s = time.monotonic() - outcome.sent_s
        except aio.AioRpcError as error:
            outcome.error = error.code().name
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                advice = dict(error.trailing_metadata() or ()).get("retry-after-ms")
                outcome.retry_after_s = None if advice is None else float(advice) / 1000
        return outcome

    async def one(self, slo_class: str) -> None:
        """One arrival; some of those that are refused come back when they were told to."""
        outcome = await self.ask(slo_class)
        self._run.outcomes.append(outcome)
        if outcome.retry_after_s is None:
            return
        self._refused += 1
        if self._refused % SAMPLE_EVERY:
            return
        retry = Retry(advised_s=outcome.retry_after_s)
        self._run.retries.append(retry)
        begun_s, advice_s = time.monotonic(), outcome.retry_after_s
        while advice_s is not None and retry.tries < MAX_RETRIES:
            await asyncio.sleep(advice_s)
            retry.tries += 1
            retry.waited_s = time.monotonic() - begun_s
            outcome = await self.ask(slo_class)
            advice_s = outcome.retry_after_s
        retry.admitted = outcome.ttft_s is not None


async def watch(members: Members, run: Run) -> None:
    """Looks at the router twice a second."""
    while True:
        run.rss_bytes.append(members.router.memory_info().rss)
        run.waiting.append(await asyncio.to_thread(members.gauge, "router_queue_choices"))
        await asyncio.sleep(0.5)


async def storm(scene: Scene, members: Members) -> tuple[Run, float, float]:
    """Warms up, sends the load, and returns what was seen, the idle TTFT and the seconds that recovery took."""
    run = Run()
    draw = random.Random(scene.seed)
    async with aio.insecure_channel(members.addresses["grpc"]) as channel:
        client = Client(TandemStub(channel), scene, run)
        idle = [outcome.ttft_s or 0.0 for outcome in [await client.ask("") for _ in range(12)]]
        watcher = asyncio.create_task(watch(members, run))
        tasks = []
        begin_s = next_s = time.monotonic()
        while (next_s := next_s + draw.expovariate(scene.factor * scene.capacity_per_s)) < begin_s + scene.seconds:
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
            slo_class = "batch" if draw.random() < scene.batch_share else ""
            tasks.append(asyncio.create_task(client.one(slo_class)))
        end_s = time.monotonic()
        quick_s = max(scene.promise_s / 4, 3 * statistics.median(idle))
        while True:
            probe = await client.ask("")
            if probe.ttft_s is not None and probe.ttft_s <= quick_s:
                break
            await asyncio.sleep(0.05)
        recovery_s = time.monotonic() - end_s
        await asyncio.gather(*tasks)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    return run, statistics.median(idle), recovery_s


def report(scene: Scene, run: Run, idle_s: float, recovery_s: float, left: float) -> dict[str, Any]:
    """The figures."""
    admitted = [outcome for outcome in run.outcomes if outcome.ttft_s is not None]
    refused = [outcome for outcome in run.outcomes if outcome.retry_after_s is not None]
    promised = sorted(outcome.ttft_s or 0.0 for outcome in admitted if outcome.slo_class != "batch")
    batch = [outcome for outcome in run.outcomes if outcome.slo_class == "batch"]
    back = [retry for retry in run.retries if retry.admitted]
    kept = sum(ttft_s <= scene.promise_s for ttft_s in promised)
    quantile = statistics.quantiles(promised, n=100) if len(promised) > 1 else [0.0] * 99
    return {
        "device": "paced (computes nothing, takes the time its latency model says)",
        "scene": asdict(scene),
        "capacity_per_s": round(scene.capacity_per_s, 2),
        "idle_ttft_s": round(idle_s, 4),
        "offered": len(run.outcomes),
        "admitted": len(admitted),
        "refused": len(refused),
        "other_errors": sorted({o.error for o in run.outcomes if o.error and o.retry_after_s is None}),
        "admitted_per_s": round(len(admitted) / scene.seconds, 2),
        "attainment_of_admitted": round(kept / max(len(promised), 1), 4),
        "ttft_s": {"p50": round(quantile[49], 3), "p90": round(quantile[89], 3), "p99": round(quantile[98], 3)},
        "batch": {"offered": len(batch), "answered": sum(o.ttft_s is not None for o in batch)},
        "retry_after": {
            "followed": len(run.retries),
            "let_in": len(back),
            "advised_s_median": round(statistics.median([r.advised_s for r in back]), 2) if back else None,
            "waited_s_median": round(statistics.median([r.waited_s for r in back]), 2) if back else None,
            "waited_s_p90": round(sorted(r.waited_s for r in back)[int(0.9 * len(back))], 2) if back else None,
            "let_in_at_first_return": sum(r.tries == 1 for r in back),
        },
        "queue_peak_requests": max(run.waiting, default=0.0),
        "router_rss_mib": {
            "begin": round(run.rss_bytes[0] / 2**20, 1),
            "peak": round(max(run.rss_bytes) / 2**20, 1),
        },
        "recovery_s": round(recovery_s, 2),
        "left_in_flight": left,
    }


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=3.0, help="arrivals as a multiple of the capacity")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--promise-s", type=float, default=2.0, help="TTFT of the class interactive")
    parser.add_argument("--bottleneck", choices=("prefill", "decode"), default="prefill")
    parser.add_argument("--batch-share", type=float, default=0.0, help="of the requests, in the class batch")
    parser.add_argument("--seed", type=int, default=0)
    scene = Scene(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        members = Members(scene, Path(folder))
        try:
            members.wait_ready()
            run, idle_s, recovery_s = asyncio.run(storm(scene, members))
            time.sleep(0.5)
            left = members.gauge("requests_in_flight")
        finally:
            members.close()
    print(json.dumps(report(scene, run, idle_s, recovery_s, left), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
