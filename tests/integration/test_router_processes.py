"""Two router processes behind one HTTP and one gRPC port: both serve, either answers for both, and the death of one is
felt by nobody but its own clients.
"""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.ports import pin_ports
from tandem.cluster.types import SLO, Role
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
PROMPT = list(range(1, 60))
ENGINE = EngineConfig(model=MODEL, device="paced", kv_cache_bytes=16 * 2**20, paced_step_s=0.005)
TRIES = 40
"""Connections after which both processes were met: the kernel picks by a hash of each connection's ports."""
Wait = Callable[..., None]


def expected(n: int) -> list[int]:
    config = resolve_model(MODEL).config
    return list(expected_tokens(PROMPT, n, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


class Routers:
    """Two router processes and a prefill and a decode worker."""

    def __init__(self, processes: Any) -> None:
        self._start = processes.start
        promise = SLO(ttft_s=60.0, tpot_s=10.0)
        self.config = pin_ports(
            RouterConfig(model=MODEL, processes=2, http_port=0, grpc_port=0, registry_port=0, slo=promise)
        )
        self.routers = [self.start(index) for index in range(2)]
        registries = tuple(f"127.0.0.1:{port}" for port in self.config.registry_ports)
        for role in (Role.PREFILL, Role.DECODE):
            processes.start("worker", WorkerConfig(worker_id=f"{role}-0", role=role, engine=ENGINE, routers=registries))

    def start(self, index: int) -> subprocess.Popen[str]:
        process, addresses = self._start("router", self.config.each_process()[index])
        assert addresses["http"] == f"127.0.0.1:{self.config.http_port}"
        assert addresses["grpc"] == f"127.0.0.1:{self.config.grpc_port}"
        assert addresses["registry"] == f"127.0.0.1:{self.config.registry_ports[index]}"
        return process  # type: ignore[no-any-return]

    def get(self, path: str) -> httpx.Response:
        """Over a connection of its own."""
        return httpx.get(f"http://127.0.0.1:{self.config.http_port}{path}", trust_env=False, timeout=20)

    def both_ready(self) -> bool:
        try:
            return [account["ready"] for account in self.get("/ready").json()["routers"]] == [True, True]
        except httpx.HTTPError:  # it reached one that has just died
            return False

    def connect(self, pid: int) -> http.client.HTTPConnection:
        """A kept connection to that process."""
        for _ in range(TRIES):
            connection = http.client.HTTPConnection("127.0.0.1", self.config.http_port, timeout=30)
            connection.request("GET", "/ready")
            if json.load(connection.getresponse())["router"]["pid"] == pid:
                return connection
            connection.close()
        raise AssertionError(f"no connection of {TRIES} reached process {pid}")


@pytest.fixture
def routers(processes: Any, wait: Wait) -> Routers:
    started = Routers(processes)
    wait(started.both_ready, "both router processes to be ready")
    return started


def stream(connection: http.client.HTTPConnection, n: int) -> http.client.HTTPResponse:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": n, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def samples(text: str, name: str) -> dict[str, float]:
    """Of a metric without a label of its own: its value by router process."""
    lines = [line for line in text.splitlines() if line.startswith(f'{name}{{router="')]
    return {line.partition('router="')[2].partition('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_two_routers_share_the_ports_and_one_dies(routers: Routers, wait: Wait) -> None:
    pids = [router.pid for router in routers.routers]
    kept = [routers.connect(pid) for pid in pids]  # the kernel spreads connections: both are reached

    # Either answers for both, with the same series whichever is asked.
    for connection in kept:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        assert samples(text, "tandem:router_up") == {"0": 1.0, "1": 1.0}
        assert set(samples(text, "tandem:requests_in_flight")) == {"0", "1"}
        assert text.count("# TYPE tandem:requests_in_flight gauge") == 1
        workers = [line for line in text.splitlines() if line.startswith("tandem:worker_info{")]
        assert len(workers) == 2, "a worker is there once, whoever heard it"

    # Both generate, over HTTP and over gRPC, for several connections each.
    for _ in range(6):
        with TandemClient(f"127.0.0.1:{routers.config.grpc_port}") as client:
            answer = client.generate(token_ids=PROMPT, max_tokens=5, temperature=0).collect()
            assert answer.token_ids == expected(5)

    # One is killed while both stream: its client's connection breaks, the other's stream goes on to its end.
    dying, living = (stream(connection, 300) for connection in kept)
    assert (dying.status, living.status) == (200, 200)
    assert dying.read(40)
    assert living.read(40)
    routers.routers[0].send_signal(signal.SIGKILL)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        dying.read()
    rest = living.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    for connection in kept:
        connection.close()

    # What the dead one had is freed, and who asks the other one is told what is missing.
    routers.routers[0].wait(10)
    answer = routers.get("/ready").json()
    assert answer["router"]["pid"] == pids[1]
    assert [account["ready"] for account in answer["routers"]] == [False, True]
    assert answer["ready"]
    assert samples(routers.get("/metrics").text, "tandem:router_up") == {"0": 0.0, "1": 1.0}
    wait(
        lambda: all(worker["streams"] == worker["leases"] == 0 for worker in workers_of(routers)), "workers to be idle"
    )
    for worker in workers_of(routers):
        assert worker["free_blocks"] + worker["cached_blocks"] == worker["num_blocks"]
        assert worker["credited_blocks"] == 0

    # Its next life takes its place: same ports, and its workers find it.
    routers.routers[0] = routers.start(0)
    wait(routers.both_ready, "the restarted router process")
    routers.connect(routers.routers[0].pid).close()
    with TandemClient(f"127.0.0.1:{routers.config.grpc_port}") as client:
        assert client.generate(token_ids=PROMPT, max_tokens=5, temperature=0).collect().token_ids == expected(5)


def workers_of(routers: Routers) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = routers.get("/ready").json()["workers"]
    return workers
