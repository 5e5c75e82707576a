"""The `tandem` command as a user meets it: `serve` from a file until Ctrl-C, `status` beside it, and `demo`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
TIMEOUT_S = 120


def tandem(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tandem.cluster.cli", *arguments]


@dataclass(frozen=True)
class Served:
    """A `tandem serve` that is ready, in a process group of its own."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    events: Path

    def rest(self) -> str:
        """What it says from now until it ends."""
        assert self.process.stdout is not None
        return self.process.stdout.read()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    config, events = tmp_path / "cluster.yaml", tmp_path / "waterfalls.jsonl"
    config.write_text(
        f"model: {MODEL}\n"
        "engine: {device: paced, kv_cache_bytes: 1MiB, paced_step_s: 0.01}\n"
        f"router: {{http_port: 0, grpc_port: 0, registry_port: 0, events_path: {events}}}\n"
    )
    process = subprocess.Popen(
        tandem("serve", "--config", str(config)), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if "Ctrl-C drains" in line:
                break
        text = "".join(said)
        http, grpc = re.search(r"HTTP +http://(\S+)", text), re.search(r"gRPC +(\S+)", text)
        assert http is not None, text
        assert grpc is not None, text
        yield Served(process, http[1], grpc[1], events)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_serve_from_a_file_answers_and_ctrl_c_drains(served: Served) -> None:
    status = subprocess.run(
        tandem("status", "--url", f"http://{served.http}"), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert status.returncode == 0, status.stderr
    assert "prefill-0" in status.stdout
    with TandemClient(served.grpc, timeout_s=TIMEOUT_S) as client:
        deltas = iter(client.generate("one two three", max_tokens=100, ignore_eos=True))
        tokens = len(next(deltas).token_ids)
        os.kill(served.process.pid, signal.SIGINT)
        tokens += sum(len(delta.token_ids) for delta in deltas)
    assert tokens == 100, "what runs is finished"
    rest = served.rest()
    assert served.process.wait(TIMEOUT_S) == 0, rest
    assert "draining" in rest
    assert rest.rstrip().endswith("stopped")
    lines = [json.loads(line) for line in served.events.read_text().splitlines()]
    [choice] = [line for line in lines if line["event"] == "choice"]
    [end] = [line for line in lines if line["event"] == "request"]
    assert (end["outcome"], end["request_id"]) == ("answered", choice["request_id"])
    assert choice["timings"]["path"] == "split"


def test_a_signal_to_the_whole_process_group_drains_too(served: Served) -> None:
    """`timeout` and systemd signal the group: what the command has started must not die before it."""
    with TandemClient(served.grpc, timeout_s=TIMEOUT_S) as client:
        deltas = iter(client.generate("one two three", max_tokens=100, ignore_eos=True))
        tokens = len(next(deltas).token_ids)
        os.killpg(served.process.pid, signal.SIGTERM)
        tokens += sum(len(delta.token_ids) for delta in deltas)
    assert tokens == 100, "what runs is finished"
    rest = served.rest()
    assert served.process.wait(TIMEOUT_S) == 0, rest
    assert rest.rstrip().endswith("stopped")


def test_ctrl_c_twice_ends_a_stream_with_an_error(served: Served) -> None:
    body = {"model": MODEL, "prompt": "one two three", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"http://{served.http}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        assert response.status_code == 200, response.read()
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        assert "choices" in json.loads(next(events))
        os.kill(served.process.pid, signal.SIGINT)
        assert "choices" in json.loads(next(events))
        os.kill(served.process.pid, signal.SIGINT)
        last = list(events)[-1]
    assert "shutting down" in json.loads(last)["error"]["message"]
    rest = served.rest()
    assert served.process.wait(TIMEOUT_S) == 0, rest


def test_demo_runs_from_start_to_end() -> None:
    arguments = ("--model", MODEL, "--device", "paced", "--num-prompts", "2", "--request-rate", "20")
    done = subprocess.run(tandem("demo", *arguments), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "computes nothing" in done.stdout.splitlines()[0]
    for words in ("prefilled by prefill-0, decoded by decode-0", "KV transfer", "TTFT", "attainment", "goodput"):
        assert words in done.stdout
    assert "2 completed, 0 failed" in done.stdout
    assert re.search(r"stopped; \d+ s in all", done.stdout)
