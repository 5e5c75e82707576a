"""`tandem demo`: the whole thing once, on this machine: start, a streamed answer, where its time went, load, stop."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

import uvloop

from ..router.client import ClientDelta, TandemClient
from .bench.options import BenchOptions
from .bench.run import BenchResult, run_bench
from .bench.show import table
from .bench.waterfall import draw, spans
from .cli_display import Display
from .cli_serve import SignalsTold, headline, watched_cluster
from .config import ClusterConfig
from .config_file import build_config
from .launch.interrupts import Interrupts
from .launch.ray_cluster import Interrupted, RayCluster
from .launch.state import Endpoints, LaunchError
from .proto import tandem_v1_pb2 as pb

QUESTION = "Explain in two sentences why the sky is blue."
ANSWER_TOKENS = 64
LOAD_TOKENS = 16
PROMISES_MS = {"ttft": 1000.0, "tpot": 100.0}
"""What the load is judged by. The router is not told: it would refuse what a slow machine cannot do in that time."""
_REQUEST_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the demo runs on, and how much load it makes."""

    model: str
    device: str
    num_prompts: int
    request_rate: float

    def __post_init__(self) -> None:
        self.load("http://127.0.0.1")

    def load(self, base_url: str) -> BenchOptions:
        """ValueError for a load that cannot be."""
        return BenchOptions(
            base_url=base_url,
            num_prompts=self.num_prompts,
            output_len=LOAD_TOKENS,
            request_rate=self.request_rate,
            goodput_ms=PROMISES_MS,
            num_warmups=0,
            timeout_s=_REQUEST_TIMEOUT_S,
        )

    def cluster(self) -> ClusterConfig:
        """One router, one prefill worker, one decode worker, on free ports."""
        return build_config(
            None,
            {
                "model": self.model,
                "engine.device": self.device,
                "engine.kv_cache_bytes": "128MiB",
                "router.http_port": 0,
                "router.grpc_port": 0,
                "router.registry_port": 0,
            },
        )


def run_demo(options: DemoOptions) -> int:
    """Runs it and returns the exit code; whatever happens, nothing is left running. Raises LaunchError."""
    began_s = time.monotonic()
    display = Display()
    config = options.cluster()
    display.line(headline(config))
    told = SignalsTold(display)
    with (
        Interrupts(told) as interrupts,
        watched_cluster(config, display, interrupts) as cluster,
    ):
        try:
            endpoints = _start(cluster, display, told)
        except Interrupted:
            return 130
        code = _show(options, endpoints, display, interrupts)
        if interrupts.first.is_set():
            return 130
        cluster.drain()
        cluster.stop()
        display.line(f"\nstopped; {time.monotonic() - began_s:.0f} s in all")
    return code


def _start(cluster: RayCluster, display: Display, told: SignalsTold) -> Endpoints:
    with display.steps() as progress:
        endpoints = cluster.start(told.follow(progress))
    display.line(f"ready: http://{endpoints.http}, gRPC {endpoints.grpc}\n")
    return endpoints


def _show(options: DemoOptions, endpoints: Endpoints, display: Display, interrupts: Interrupts) -> int:
    """The exit code. A signal ends it after the answer; one to the load, which listens itself, ends that."""
    timings = _answer(endpoints, display)
    display.line("\nwhere that request's time went")
    display.line(waterfall(timings))
    if interrupts.first.is_set():
        return 130
    result = _load(options, endpoints, display, interrupts)
    display.line(table(result.summary))
    failed = sorted({record.error for record in result.records if record.error})
    for error in failed:
        display.line(f"failed      {error}")
    return result.exit_code or (1 if failed else 0)


def _answer(endpoints: Endpoints, display: Display) -> pb.Timings:
    """Streams one chat answer over gRPC and returns its waterfall."""
    display.line(f"> {QUESTION}")
    timings: pb.Timings | None = None
    with TandemClient(endpoints.grpc, timeout_s=_REQUEST_TIMEOUT_S) as client:
        deltas = client.generate(
            messages=[{"role": "user", "content": QUESTION}], max_tokens=ANSWER_TOKENS, temperature=0.0
        )
        last: ClientDelta | None = None
        for last in deltas:
            display.piece(last.text)
            timings = last.timings or timings
    display.line()
    if timings is None:
        raise LaunchError("the answer came without timings")
    return timings


def waterfall(timings: pb.Timings) -> str:
    """The timings as a drawing, headed by the way the request took."""
    way = {
        "split": f"prefilled by {timings.prefill_worker}, decoded by {timings.decode_worker}",
        "local": f"prefilled and decoded by {timings.decode_worker}, not split",
        "mixed": f"prefilled and decoded by {timings.decode_worker}, not split",
        "prefill_only": f"answered by {timings.prefill_worker} alone",
    }.get(timings.path, timings.path)
    tpot = f", TPOT {timings.tpot_s * 1e3:.1f} ms" if timings.HasField("tpot_s") else ""
    bars = draw(
        spans(
            queue_s=timings.queue_s,
            prefill_s=timings.prefill_s,
            ttft_s=timings.ttft_s,
            transfer_s=timings.transfer_s,
            exposed_transfer_s=timings.exposed_transfer_s,
            decode_s=timings.decode_s,
            e2e_s=timings.e2e_s,
            transferred_bytes=timings.transferred_bytes,
            path=timings.path,
        )
    )
    return f"{way}; TTFT {timings.ttft_s * 1e3:.1f} ms{tpot}\n{bars}"


def _load(options: DemoOptions, endpoints: Endpoints, display: Display, interrupts: Interrupts) -> BenchResult:
    display.line(
        f"\n{options.num_prompts} real prompts, {LOAD_TOKENS} tokens each, "
        f"arriving at random at {options.request_rate:g}/s whatever the answers do"
    )
    with display.count("load", options.num_prompts) as advance:

        def done(_: object) -> None:
            advance()
            if interrupts.first.is_set():  # before the load listened
                signal.raise_signal(signal.SIGINT)

        return uvloop.run(run_bench(options.load(f"http://{endpoints.http}"), done))
