"""Measures a router, of one process or several behind one port, against workers that answer at once.

1. The router starts as it does in a cluster, each process pinned to one core where there are more; two instant workers
   (`bench.router_worker`: the real gRPC servicer, no engine) and the client share the others.
2. One request at a time: what the router adds to TTFT, which is TTFT through its door minus that of the same prompt
   submitted to the prefill worker without a router.
3. Many at once, in a closed loop: requests and tokens a second, and the processor time that the router took for them
   (`/proc/<pid>/task/*/schedstat`), which a busy machine does not change much.

What one core of its own would serve is 1 / (processor time per request): client, workers and router need three cores to
reach that, and it is named apart from what was reached. Several processes with a core each would serve as much as the
busiest of them lets them: the kernel spreads connections by chance, not by load.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from ..config import RouterConfig, to_dict
from ..ports import pin_ports
from ..types import SLO
from .processes import addresses_of, end
from .router_load import GrpcDoor, Shape, Tally, closed_loop, direct_ttfts_s, http_asks

START_TIMEOUT_S = 60.0
WARMUP_S = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBenchOptions:
    """What `tandem bench router` was asked for."""

    model: str = "dummy:tiny-llama"
    """Whose tokenizer the router uses."""
    seconds: float = 4.0
    """Of every row."""
    concurrency: int = 64
    prompt_tokens: int = 64
    output_tokens: tuple[int, ...] = (2, 16, 256)
    doors: tuple[str, ...] = ("http", "grpc")
    step_ms: float = 1.0
    """Between two tokens of a sequence."""
    low_load_requests: int = 300
    """One after the other, for the TTFT that is added; the first tenth does not count."""
    processes: int = 1
    """Of the router."""

    def __post_init__(self) -> None:
        allowed: tuple[tuple[str, float, float, float], ...] = (
            ("seconds", self.seconds, 0.1, 600),
            ("concurrency", self.concurrency, 1, 1024),
            ("prompt_tokens", self.prompt_tokens, 1, 4096),
            ("step_ms", self.step_ms, 0, 1000),
            ("low_load_requests", self.low_load_requests, 1, 100_000),
            ("processes", self.processes, 1, 16),
            *(("output_tokens", float(tokens), 1, 4096) for tokens in self.output_tokens),
        )
        for name, value, low, high in allowed:
            if not low <= value <= high:
                raise ValueError(f"{name}: {value:g} is not allowed; allowed: {low:g} to {high:g}")
        for door in self.doors:
            if door not in ("http", "grpc"):
                raise ValueError(f"doors: {door!r} is not allowed; allowed: http, grpc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One load on one door."""

    door: str
    stream: bool
    output_tokens: int
    requests: int
    failed: int
    requests_per_s: float
    tokens_per_s: float
    tokens_per_event: float
    """1: every token left in an event of its own; more: the router sent together what had come together."""
    router_core_share: float
    """Processor time of all router processes over time: near their number (or that of its cores), the router is the
    bottleneck; else client or workers are."""
    cpu_ms_per_request: float
    busiest_share: float
    """Of that processor time: the busiest router process's; 1 where there is one."""
    own_core_requests_per_s: float
    """With a core for every router process."""
    own_core_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTTFT:
    """One request at a time, milliseconds."""

    door: str
    ttft_ms_p50: float
    direct_ms_p50: float
    added_ms_p50: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBenchResult:
    """Everything that was measured. `token_us`: what one more token costs, from the shortest and the longest stream."""

    options: RouterBenchOptions
    rows: tuple[Row, ...]
    added: tuple[AddedTTFT, ...]
    token_us: dict[str, float]
    facts: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


def cpu_s(pid: int) -> float:
    """Processor time of the threads of a process, seconds, to the nanosecond where Linux counts it (schedstat)."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


class RouterUnderTest:
    """A router process and its workers; ends both."""

    def __init__(self, options: RouterBenchOptions) -> None:
        self.model = options.model
        cores = sorted(os.sched_getaffinity(0))
        enough = len(cores) > options.processes
        self._router_cores = cores[: options.processes] if enough else cores
        self._other_cores = cores[options.processes :] if enough else cores
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-")))
        slo = SLO(ttft_s=3600.0, tpot_s=3600.0)  # none is refused: the forecast is not what is measured
        plain = RouterConfig(model=options.model, http_port=0, grpc_port=0, registry_port=0, slo=slo, max_waiting=4096)
        self.pids: list[int] = []
        registries: list[str] = []
        try:
            for each in pin_ports(replace(plain, processes=options.processes)).each_process():
                config = folder / f"router-{each.process}.json"
                config.write_text(json.dumps(to_dict(each)))
                command = ["-m", "tandem.cluster.launch.process", "router", "--config", str(config)]
                pid, self.addresses = self._start(command, self._router_cores)
                self.pids.append(pid)
                registries.append(str(self.addresses["registry"]))
            command = ["-m", "tandem.cluster.bench.router_worker", "--registry", *registries]
            command += ["--step-ms", str(options.step_ms)]
            self.worker_pid, self.workers = self._start(command, self._other_cores)
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        os.sched_setaffinity(0, self._other_cores)
        self._stack.callback(os.sched_setaffinity, 0, cores)

    def _start(self, command: list[str], cores: list[int]) -> tuple[int, dict[str, Any]]:
        process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/"
        )
        self._stack.callback(end, process)
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)
        return process.pid, addresses_of(process, command[1], START_TIMEOUT_S)

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        with httpx.Client(base_url=f"http://{self.addresses['http']}", trust_env=False) as client:
            while not _all_ready(client.get("/ready").json()):
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"the router was not ready within {START_TIMEOUT_S:g} s")
                time.sleep(0.05)

    def close(self) -> None:
        """Ends router and workers."""
        self._stack.close()


def _all_ready(answer: dict[str, Any]) -> bool:
    """Every process, where there are several; else the one that was asked."""
    return bool(answer["ready"]) and all(account["ready"] for account in answer.get("routers", ()))


async def run_router_bench(options: RouterBenchOptions, on_row: Callable[[str], None]) -> RouterBenchResult:
    """Starts everything, measures, ends everything. `on_row`: is told what is measured next. RuntimeError where a
    process does not start.
    """
    under_test = RouterUnderTest(options)
    try:
        added = [await _added_ttft(under_test, options, door, on_row) for door in options.doors]
        rows = []
        for door in options.doors:
            for stream in (True, False) if door == "http" else (True,):
                lengths = options.output_tokens if stream else options.output_tokens[:2]
                for tokens in lengths:
                    on_row(f"{door} {'stream' if stream else 'whole'} {tokens}")
                    shape = Shape(prompt_tokens=options.prompt_tokens, output_tokens=tokens, stream=stream)
                    rows.append(await _row(under_test, options, door, shape))
        facts = {"cores": len(os.sched_getaffinity(under_test.pids[0])), "python": sys.version.split()[0]}
    finally:
        under_test.close()
    token_us = {door: us for door in options.doors if (us := _token_us(rows, door)) is not None}
    return RouterBenchResult(options=options, rows=tuple(rows), added=tuple(added), token_us=token_us, facts=facts)


def _token_us(rows: list[Row], door: str) -> float | None:
    """Processor time of one more streamed token, microseconds; None: there are no two lengths."""
    of_door = [row for row in rows if row.door == door and row.stream]
    short = min(of_door, key=lambda row: row.output_tokens)
    long = max(of_door, key=lambda row: row.output_tokens)
    if short.output_tokens == long.output_tokens:
        return None
    more_ms = long.cpu_ms_per_request - short.cpu_ms_per_request
    return more_ms * 1000 / (long.output_tokens - short.output_tokens)


async def _row(under_test: RouterUnderTest, options: RouterBenchOptions, door: str, shape: Shape) -> Row:
    async def load(asks: list[Any]) -> tuple[Tally, float, list[float]]:
        await closed_loop(asks, min(WARMUP_S, options.seconds), Tally())
        tally, before_s = Tally(), [cpu_s(pid) for pid in under_test.pids]
        took_s = await closed_loop(asks, options.seconds, tally)
        after_s = [cpu_s(pid) for pid in under_test.pids]
        return tally, took_s, [after - before for after, before in zip(after_s, before_s, strict=True)]

    tally, took_s, each_s = await _with_door(under_test, door, shape, options.concurrency, load)
    requests, used_s = max(tally.requests, 1), sum(each_s)
    cpu_per_request_s = max(used_s / requests, 1e-9)
    busiest_share = max(each_s) / max(used_s, 1e-9)
    return Row(
        door=door,
        stream=shape.stream,
        output_tokens=shape.output_tokens,
        requests=tally.requests,
        failed=tally.failed,
        requests_per_s=tally.requests / took_s,
        tokens_per_s=tally.requests * shape.output_tokens / took_s,
        tokens_per_event=tally.requests * shape.output_tokens / max(tally.events, 1) if shape.stream else 0.0,
        router_core_share=used_s / took_s,
        cpu_ms_per_request=cpu_per_request_s * 1000,
        busiest_share=busiest_share,
        own_core_requests_per_s=1 / (cpu_per_request_s * busiest_share),
        own_core_tokens_per_s=shape.output_tokens / (cpu_per_request_s * busiest_share),
    )


async def _with_door(under_test: RouterUnderTest, door: str, shape: Shape, count: int, load: Any) -> Any:
    if door == "http":
        asks, close = await http_asks(under_test.addresses["http"], under_test.model, shape, count)
        try:
            return await load(asks)
        finally:
            close()
    grpc_door = GrpcDoor(under_test.addresses["grpc"], under_test.model, shape)
    try:
        return await load(grpc_door.asks(count))
    finally:
        await grpc_door.close()


async def _added_ttft(
    under_test: RouterUnderTest, options: RouterBenchOptions, door: str, on_row: Callable[[str], None]
) -> AddedTTFT:
    on_row(f"{door} added TTFT")
    shape = Shape(prompt_tokens=options.prompt_tokens, output_tokens=2)

    async def load(asks: list[Any]) -> list[float]:
        tally = Tally()
        for _ in range(options.low_load_requests):
            await asks[0](tally)
        return tally.ttfts_s[options.low_load_requests // 10 :]

    ttfts_s = await _with_door(under_test, door, shape, 1, load)
    prefill = under_test.workers["prefill"]
    direct_s = await direct_ttfts_s(prefill["address"], prefill["epoch"], shape, options.low_load_requests)
    ttft_ms = statistics.median(ttfts_s) * 1000
    direct_ms = statistics.median(direct_s[options.low_load_requests // 10 :]) * 1000
    return AddedTTFT(door=door, ttft_ms_p50=ttft_ms, direct_ms_p50=direct_ms, added_ms_p50=ttft_ms - direct_ms)


def _count(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes behind one port, a core for each in 'own core'"


def show(result: RouterBenchResult) -> str:
    """The tables."""
    lines = [
        f"instant workers (no engine, no KV): what is measured is the router alone, {_count(result.options.processes)}",
        f"{'door':<6}{'TTFT p50 ms':>13}{'without router ms':>19}{'added ms':>10}",
        *(f"{a.door:<6}{a.ttft_ms_p50:>13.2f}{a.direct_ms_p50:>19.2f}{a.added_ms_p50:>10.2f}" for a in result.added),
        "",
        f"{'door':<6}{'answer':<8}{'tokens':>7}{'requests/s':>12}{'tokens/s':>10}{'tok/event':>11}{'core':>6}"
        f"{'CPU ms/req':>12}{'busiest':>9}{'own core: req/s':>17}{'tokens/s':>10}{'failed':>8}",
    ]
    for row in result.rows:
        per_event = f"{row.tokens_per_event:.2f}" if row.stream else "-"
        lines.append(
            f"{row.door:<6}{'stream' if row.stream else 'whole':<8}{row.output_tokens:>7}{row.requests_per_s:>12.0f}"
            f"{row.tokens_per_s:>10.0f}{per_event:>11}{row.router_core_share:>6.0%}{row.cpu_ms_per_request:>12.3f}{row.busiest_share:>9.0%}"
            f"{row.own_core_requests_per_s:>17.0f}{row.own_core_tokens_per_s:>10.0f}{row.failed:>8}"
        )
    lines += ["", *(f"one more streamed token over {door}: {us:.1f} µs" for door, us in result.token_us.items())]
    return "\n".join(lines)
