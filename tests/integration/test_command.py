"""The `tandem` command as a user meets it: `serve` from a file until Ctrl-C, `status` beside it, and `demo`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
TIMEOUT_S = 120


def tandem(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tandem.cluster.cli", *arguments]


def test_serve_from_a_file_answers_and_ctrl_c_drains(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(
        f"model: {MODEL}\n"
        "engine: {device: paced, kv_cache_bytes: 1MiB, paced_step_s: 0.01}\n"
        f"router: {{http_port: 0, grpc_port: 0, registry_port: 0, events_path: {tmp_path / 'waterfalls.jsonl'}}}\n"
    )
    served = subprocess.Popen(
        tandem("serve", "--config", str(config)), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    watchdog = threading.Timer(TIMEOUT_S, served.kill)
    watchdog.start()
    try:
        assert served.stdout is not None
        said: list[str] = []
        for line in served.stdout:
            said.append(line)
            if "Ctrl-C drains" in line:
                break
        text = "".join(said)
        http, grpc = re.search(r"HTTP +(\S+)", text), re.search(r"gRPC +(\S+)", text)
        assert http is not None, text
        assert grpc is not None, text
        status = subprocess.run(tandem("status", "--url", http[1]), capture_output=True, text=True, timeout=TIMEOUT_S)
        assert status.returncode == 0, status.stderr
        assert "prefill-0" in status.stdout
        with TandemClient(grpc[1], timeout_s=TIMEOUT_S) as client:
            deltas = iter(client.generate("one two three", max_tokens=100, ignore_eos=True))
            tokens = len(next(deltas).token_ids)
            os.kill(served.pid, signal.SIGINT)
            tokens += sum(len(delta.token_ids) for delta in deltas)
        assert tokens == 100, "what runs is finished"
        rest = served.stdout.read()
        assert served.wait(TIMEOUT_S) == 0, rest
        assert "draining" in rest
        assert rest.rstrip().endswith("stopped")
        [line] = (tmp_path / "waterfalls.jsonl").read_text().splitlines()
        assert '"path":"split"' in line
    finally:
        watchdog.cancel()
        served.kill()
        served.wait()
        if served.stdout is not None:
            served.stdout.close()


def test_demo_runs_from_start_to_end() -> None:
    arguments = ("--model", MODEL, "--device", "paced", "--num-prompts", "2", "--request-rate", "20")
    done = subprocess.run(tandem("demo", *arguments), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "computes nothing" in done.stdout.splitlines()[0]
    for words in ("prefilled by prefill-0, decoded by decode-0", "KV transfer", "TTFT", "attainment", "goodput"):
        assert words in done.stdout
    assert "2 completed, 0 failed" in done.stdout
    assert re.search(r"stopped; \d+ s in all", done.stdout)
