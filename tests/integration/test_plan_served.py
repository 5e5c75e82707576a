"""A plan's file is a cluster: `tandem serve --config plan.yaml` starts it as is, and it answers under a promise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
from tandem.cluster.planner.plan_file import plan_file
from tandem.cluster.planner.problem import load_problem
from tandem.cluster.planner.result import (
    Affinity,
    Candidate,
    Evaluation,
    Fate,
    Interval,
    PlanResult,
    Pool,
    Prediction,
    Quantiles,
)
from tandem.cluster.planner.setting import setting_of
from tandem.cluster.types import Role
from tandem.router.client import TandemClient

TIMEOUT_S = 240
PROBLEM = {
    "model": "tiny-llama",
    "hardware": "a100-80g",
    "gpus_per_node": 2,
    "workload.input_tokens": 32,
    "workload.output_tokens": 8,
    "workload.slo_classes": {"chat": {"ttft_s": 2.0, "tpot_s": 0.5}},
}


def write_plan(path: Path) -> None:
    """One prefill and one decode worker, as a search would hand them back."""
    pools = tuple(Pool(role=role, count=1, max_running=16) for role in (Role.PREFILL, Role.DECODE))
    latency = Quantiles(p50=0.01, p90=0.02, p99=0.03)
    chosen = Evaluation(
        candidate=Candidate(pools=pools, affinity=Affinity.HIGH),
        fate=Fate.SIMULATED,
        goodput=Interval(mean=40.0, low=39.0, high=41.0),
        prediction=Prediction(rate=40.0, attainment=0.9375, by_class={"chat": 0.9375}, ttft=latency, tpot=latency),
    )
    result = PlanResult(
        disaggregated=chosen, colocated=None, difference=None, explored=(chosen,), phases=(), seeds=(0, 1)
    )
    problem = load_problem(None, PROBLEM)
    plan_file(problem, setting_of(problem), result, chosen).save(path)


def test_a_plan_is_served_as_it_is(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.yaml")
    ports = [word for name in ("http", "grpc", "registry") for word in (f"--{name}-port", "0")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem.cluster.cli", "serve", "--config", str(tmp_path / "plan.yaml"), *ports],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ctrl-C drains" in line:
                break
        text = "".join(said)
        assert "computes nothing" in said[0]
        assert "1 prefill + 1 decode" in said[0]
        http, grpc = re.search(r"HTTP +http://(\S+)", text), re.search(r"gRPC +(\S+)", text)
        assert http is not None, text
        assert grpc is not None, text
        with TandemClient(grpc[1], timeout_s=TIMEOUT_S) as client:
            answer = client.generate("one two three", max_tokens=8, ignore_eos=True, slo_class="chat").collect()
        assert len(answer.token_ids) == 8
        metrics = httpx.get(f"http://{http[1]}/metrics", timeout=TIMEOUT_S, trust_env=False).text
        assert re.search(r"^tandem:predicted_attainment\{[^}]*\} 0\.9375$", metrics, re.MULTILINE), "what was planned"
        os.kill(process.pid, signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(TIMEOUT_S) == 0, rest
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
