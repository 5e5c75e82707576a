"""Members as plain processes, without Ray: they serve, survive each other's deaths, drain on SIGTERM, die with their
parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig, to_dict
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
PROMPT = list(range(1, 120))
ENGINE = EngineConfig(
    model=MODEL, device="paced", kv_cache_bytes=16 * 2**20, paced_step_s=0.01, paced_prefill_token_s=0.00001
)
Wait = Callable[..., None]


def expected(prompt: list[int], n: int) -> list[int]:
    config = resolve_model(MODEL).config
    return list(expected_tokens(prompt, n, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


@pytest.fixture
def router(processes: Any) -> dict[str, Any]:
    config = RouterConfig(model=MODEL, http_port=0, grpc_port=0, registry_port=0, unready_wait_s=20)
    return processes.start("router", config)[1]


def ready_workers(router: dict[str, Any]) -> list[str]:
    workers = httpx.get(f"http://{router['http']}/ready", trust_env=False).json()["workers"]
    return [worker["worker_id"] for worker in workers if worker["state"] == "ready"]


def test_a_killed_worker_costs_time_but_no_answer(processes: Any, router: dict[str, Any], wait: Wait) -> None:
    """kill -9 of the decode worker that streams; the other one goes on behind the tokens already sent."""
    processes.worker(ENGINE, Role.PREFILL, "p0", router["registry"])
    decoders = {name: processes.worker(ENGINE, Role.DECODE, name, router["registry"]) for name in ("d0", "d1")}
    wait(lambda: len(ready_workers(router)) == 3, "three workers")
    with TandemClient(router["grpc"]) as client:
        tokens: list[int] = []
        killed = False
        for delta in client.generate(token_ids=PROMPT, max_tokens=60, temperature=0):
            tokens += delta.token_ids
            if len(tokens) >= 5 and not killed:
                killed = True
                streaming = _busy(router)
                decoders[streaming].send_signal(signal.SIGKILL)
            if delta.timings is not None:
                assert delta.timings.decode_worker != streaming
        assert tokens == expected(PROMPT, 60)
        metrics = httpx.get(f"http://{router['http']}/metrics", trust_env=False).text
        assert 'tandem:request_retries_total{model_name="dummy:tiny-llama",reason="worker_lost"} 1.0' in metrics


def _busy(router: dict[str, Any]) -> str:
    """The decode worker that runs the one request, by elimination of idle ones over a few heartbeats."""
    import time

    for _ in range(400):
        workers = httpx.get(f"http://{router['http']}/ready", trust_env=False).json()["workers"]
        busy = [w["worker_id"] for w in workers if w["role"] == "decode" and w["running"]]
        if busy:
            return str(busy[0])
        time.sleep(0.01)
    raise AssertionError("no decode worker reports a running sequence")


def test_a_killed_prefill_worker_is_replaced_by_another_life(
    processes: Any, router: dict[str, Any], wait: Wait
) -> None:
    """kill -9 while it prefills: the request waits for the worker's next life and is answered from there."""
    prefill = processes.worker(ENGINE, Role.PREFILL, "p0", router["registry"], paced_prefill_token_s=0.02)
    processes.worker(ENGINE, Role.DECODE, "d0", router["registry"])
    wait(lambda: len(ready_workers(router)) == 2, "two workers")
    answers: list[list[int]] = []
    with TandemClient(router["grpc"]) as client:

        def ask() -> None:
            answers.append(client.generate(token_ids=PROMPT, max_tokens=4, temperature=0).collect().token_ids)

        thread = threading.Thread(target=ask)
        thread.start()
        metrics = f"http://{router['http']}/metrics"
        wait(lambda: "tandem:requests_in_flight{" in httpx.get(metrics, trust_env=False).text, "metrics")
        wait(lambda: _gauge(router, "tandem:requests_in_flight") == 1, "the request to be in flight")
        prefill.send_signal(signal.SIGKILL)
        prefill.wait(10)
        processes.worker(ENGINE, Role.PREFILL, "p0", router["registry"])
        thread.join(30)
    assert answers == [expected(PROMPT, 4)]


def _gauge(router: dict[str, Any], name: str) -> float:
    lines = httpx.get(f"http://{router['http']}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_sigterm_drains_and_leaves_no_port(processes: Any, router: dict[str, Any], wait: Wait) -> None:
    """A worker told to end refuses new work, finishes what it runs, and exits with 0."""
    processes.worker(ENGINE, Role.PREFILL, "p0", router["registry"])
    decode = processes.worker(ENGINE, Role.DECODE, "d0", router["registry"])
    wait(lambda: len(ready_workers(router)) == 2, "two workers")
    with TandemClient(router["grpc"]) as client:
        tokens: list[int] = []
        for delta in client.generate(token_ids=PROMPT, max_tokens=60, temperature=0):
            tokens += delta.token_ids
            if len(tokens) == 5:
                decode.send_signal(signal.SIGTERM)
        assert tokens == expected(PROMPT, 60)
    assert decode.wait(20) == 0


def test_a_member_dies_with_its_parent(tmp_path: Path, wait: Wait) -> None:
    """kill -9 of whoever started it leaves no orphan."""
    config = tmp_path / "worker.json"
    config.write_text(json.dumps(to_dict(WorkerConfig(worker_id="w", role=Role.MIXED, engine=ENGINE))))
    script = (
        "import subprocess, sys, time\n"
        f"c = [sys.executable, '-m', 'tandem.cluster.launch.process', 'worker', '--config', {str(config)!r}]\n"
        "p = subprocess.Popen(c, stdout=subprocess.PIPE, text=True)\n"
        "print(p.stdout.readline().strip(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert parent.stdout is not None
        child = json.loads(parent.stdout.readline())["pid"]
        assert psutil.pid_exists(child)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)
        wait(lambda: not psutil.pid_exists(child), "the orphan to be gone")
    finally:
        parent.kill()
        parent.wait(10)
        if parent.stdout is not None:
            parent.stdout.close()


def test_a_bad_config_is_one_line_and_exit_1(tmp_path: Path) -> None:
    config = tmp_path / "worker.json"
    values = to_dict(WorkerConfig(worker_id="w", role=Role.MIXED, engine=ENGINE))
    values["engine"]["block_size"] = 0
    config.write_text(json.dumps(values))
    command = [sys.executable, "-m", "tandem.cluster.launch.process", "worker", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert ended.returncode == 1
    assert "block_size" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_seeded_and_penalized_answer_resumed_on_another_worker_is_the_same_answer(
    processes: Any, router: dict[str, Any], wait: Wait
) -> None:
    """kill -9 in the middle: what follows depends on seed, choice and index alone. On the CPU device, where penalties
    act.
    """
    engine = EngineConfig(model=MODEL, device="cpu", dtype="float32", kv_cache_bytes=16 * 2**20, threads=1)
    processes.worker(engine, Role.PREFILL, "p0", router["registry"])
    first = processes.worker(engine, Role.DECODE, "d0", router["registry"])
    wait(lambda: len(ready_workers(router)) == 2, "two workers")
    sampling = {"temperature": 0.8, "seed": 5, "presence_penalty": 1.0, "repetition_penalty": 1.3}
    request: dict[str, Any] = {"token_ids": PROMPT, "max_tokens": 380, "ignore_eos": True, **sampling}
    with TandemClient(router["grpc"]) as client:
        text, tokens = "", list[int]()
        for delta in client.generate(**request):
            tokens += delta.token_ids
            text += delta.text
            if len(tokens) >= 2 and first.poll() is None:
                first.kill()
                first.wait(10)
                processes.worker(engine, Role.DECODE, "d1", router["registry"])  # the request waits for it
        whole = client.generate(**request).collect()
        assert (tokens, text) == (whole.token_ids, whole.text)
        assert whole.timings.decode_worker == "d1"
        assert _gauge_labeled(router, "tandem:request_retries_total", "worker_lost") == 1.0
        stop = whole.text[40:46]
        stopped = client.generate(**request, stop=[stop]).collect()
        assert stopped.text == whole.text[: whole.text.index(stop)]


def _gauge_labeled(router: dict[str, Any], name: str, label: str) -> float:
    lines = httpx.get(f"http://{router['http']}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and label in line)


def test_a_worker_whose_engine_fails_ends_and_is_gone_around(
    start_cluster: Callable[..., Any], paced: Callable[..., EngineConfig], wait: Wait
) -> None:
    """Its streams end with the engine, even where the process cannot end by itself; the answer goes on elsewhere."""
    cluster = start_cluster(paced(paced_step_s=0.005))
    cluster.add(Role.PREFILL)
    for _ in range(2):
        cluster.add(Role.DECODE)
    cluster.wait_ready()
    tokens: list[int] = []
    failed = ""
    for delta in cluster.grpc.generate(token_ids=PROMPT, max_tokens=80, temperature=0):
        tokens += delta.token_ids
        if len(tokens) >= 5 and not failed:
            failed = next(name for name in ("decode-0", "decode-1") if cluster.status(name).running)
            device = cluster.workers[failed].runtime.shell.engine._device
            device.collect = _on_fire
        if delta.timings is not None:
            assert delta.timings.decode_worker != failed
    assert tokens == expected(PROMPT, 80)
    wait(lambda: not cluster.workers[failed].healthy(), "the failure to be known")


def _on_fire() -> None:
    raise RuntimeError("the device is on fire")
