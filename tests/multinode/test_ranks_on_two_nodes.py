"""A worker whose pipeline stages stand on two nodes: it serves what one rank would, and is gone when a node is."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from drive import OUTPUT, PROMPT
from one_rank import greedy_of_one_rank
from two_nodes import FAR, NEAR, TwoNodes, why_not

WHY_NOT = why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(240)]
MODEL = "dummy:tiny-llama"
WAIT_S = 90.0
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "engine": {"dtype": "float32", "kernels": "torch", "kv_cache_bytes": 8 * 2**20},
    "prefill": {"workers": 1, "engine": {"pipeline_stages": 2}},
    "decode": 1,
    "nodes": {"router": [NEAR], "prefill-0": [NEAR, FAR], "decode-0": [NEAR]},
    "router": {"host": NEAR, "http_port": 0, "grpc_port": 0, "registry_port": 0, "api_key": "open-sesame-and-more"},
    "worker": {"host": "0.0.0.0"},
    "start_timeout_s": 60,
}
CONFIG["router"]["slo"] = {"ttft_s": 60, "tpot_s": 10}


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    two = TwoNodes()
    try:
        two.start()
        yield two
    finally:
        two.close()


class Driver:
    """`drive.py` on the near node, and what it has said."""

    def __init__(self, nodes: TwoNodes, config: Path) -> None:
        command = [sys.executable, "-P", str(Path(__file__).parent / "drive.py"), str(config)]
        self.process = nodes.run(nodes.near, command)
        self.events: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process as process:  # closes its stdin, by which it stops
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            self._reader.join(20)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.append(json.loads(line))
            else:
                self.noise.append(line)

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self, wanted: Callable[[dict[str, Any]], bool], seen: int = 0) -> dict[str, Any]:
        """The first such event behind the first `seen`."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            for event in self.events[seen:]:
                if wanted(event):
                    return event
            failed = self.process.poll() is not None or any(event["what"] == "failed" for event in self.events)
            if failed or time.monotonic() > deadline_s:
                pytest.fail(json.dumps(self.events, indent=1) + "".join(self.noise)[-4000:])
            time.sleep(0.05)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What one rank answers."""
    return greedy_of_one_rank(MODEL, PROMPT, OUTPUT)


def configured(nodes: TwoNodes, path: Path, **worker: str) -> Path:
    config = CONFIG | {"address": nodes.address, "worker": CONFIG["worker"] | worker}
    path.write_text(yaml.safe_dump(config))
    return path


def serve(nodes: TwoNodes, driver: Driver, expected: list[int], transport: str) -> int:
    """Starts and asks twice, the second time from the prefix caches; the KV comes by `transport`. Returns the far
    rank's process.
    """
    started = driver.wait(lambda event: event["what"] == "started")
    (rank,) = started["members"]["prefill-0"]["rank_pids"]
    assert rank in nodes.pids(nodes.far)
    assert started["members"]["prefill-0"]["pid"] in nodes.pids(nodes.near)
    for _ in range(2):
        seen = len(driver.events)
        driver.say("ask")
        answer = driver.wait(lambda event: event["what"] == "answer", seen)
        assert answer == {"what": "answer", "tokens": expected, "path": "split", "transport": transport}
    return int(rank)


def test_kv_of_both_stages_goes_from_rank_to_rank(nodes: TwoNodes, expected: list[int], tmp_path: Path) -> None:
    with Driver(nodes, configured(nodes, tmp_path / "gloo.yaml", transport="gloo")) as driver:
        serve(nodes, driver, expected, "gloo")
        driver.say("stop")
        driver.wait(lambda event: event["what"] == "stopped")


def test_kv_of_both_stages_goes_through_the_leader_and_a_lost_node_is_said(
    nodes: TwoNodes, expected: list[int], tmp_path: Path
) -> None:
    """The last one: the far node is gone then."""
    with Driver(nodes, configured(nodes, tmp_path / "grpc.yaml", transport="grpc")) as driver:
        rank = serve(nodes, driver, expected, "grpc")
        seen, killed_s = len(driver.events), time.monotonic()
        nodes.kill(nodes.far)
        lost = driver.wait(lambda event: event["what"] == "report", seen)
        print(f"said after {time.monotonic() - killed_s:.1f} s: {lost['line']}")
        assert lost["line"].startswith(f"prefill-0 died (rank 1 (pid {rank} on {FAR}): ")
        driver.say("stop")
        driver.wait(lambda event: event["what"] == "stopped")
