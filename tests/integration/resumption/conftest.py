"""A router and workers as real processes that can be killed, stopped and asked how they stand; requests in threads.

The paced device's KV is a hash chain over all tokens, so an answer that is right was resumed from the right place.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
from asked import MODEL, Asked
from owned import owned
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import WorkerStub
from tandem.cluster.types import Role
from tandem.router.client import TandemClient

ENGINE = EngineConfig(
    model=MODEL,
    device="paced",
    kv_cache_bytes=16 * 2**20,
    paced_step_s=0.01,
    paced_prefill_token_s=0.00001,
    paced_decode_row_s=0.0,
)
Wait = Callable[..., None]


class Member:
    """A worker process and a way to ask it how it stands."""

    def __init__(self, cluster: Cluster, role: Role, name: str, engine: dict[str, Any]) -> None:
        self._cluster, self.role, self.name, self._engine = cluster, role, name, engine
        self.start()

    def start(self) -> None:
        """Begins its next life."""
        config = WorkerConfig(
            worker_id=self.name,
            role=self.role,
            engine=replace(ENGINE, **self._engine),
            routers=(self._cluster.router["registry"],),
            lease_s=self._cluster.lease_s,
            credit_factor=4.0,
        )
        self.process, addresses = self._cluster.processes.start("worker", config)
        self.process: subprocess.Popen[str]
        self._channel = grpc.insecure_channel(addresses["address"], options=(("grpc.enable_http_proxy", 0),))

    def status(self) -> pb.WorkerStatus:
        return WorkerStub(self._channel).Status(pb.StatusRequest(), timeout=10)

    def kill(self) -> None:
        self._channel.close()
        self.process.kill()
        self.process.wait(10)

    def leftovers(self) -> dict[str, int]:
        """What somebody still owns here."""
        return owned(self.status())

    def close(self) -> None:
        self._channel.close()


class Cluster:
    """A router and its workers as real processes."""

    def __init__(self, processes: Any, wait: Wait, *, lease_s: float = 30.0, **router: Any) -> None:
        self.processes, self.wait, self.lease_s = processes, wait, lease_s
        config = RouterConfig(
            model=MODEL, http_port=0, grpc_port=0, registry_port=0, **{"unready_wait_s": 20.0, **router}
        )
        self.router = processes.start("router", config)[1]
        self.workers: dict[str, Member] = {}
        self.client = TandemClient(self.router["grpc"])

    def add(self, role: Role, name: str, **engine: Any) -> Member:
        self.workers[name] = Member(self, role, name, engine)
        return self.workers[name]

    def members(self) -> list[dict[str, Any]]:
        """The workers as the router sees them."""
        answer = httpx.get(f"http://{self.router['http']}/ready", trust_env=False)
        return list(answer.json()["workers"])

    def ready(self) -> list[str]:
        return [worker["worker_id"] for worker in self.members() if worker["state"] == "ready"]

    def wait_ready(self, *names: str) -> None:
        wanted = names or tuple(self.workers)
        self.wait(lambda: set(wanted) <= set(self.ready()), f"{wanted} to be ready")

    def metric(self, name: str, label: str = "") -> float:
        lines = httpx.get(f"http://{self.router['http']}/metrics", trust_env=False).text.splitlines()
        hits = [line for line in lines if line.startswith(f"tandem:{name}{{") and label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in hits)

    def wait_clean(self) -> None:
        """Nothing of any request is left on any worker, nor in the router."""
        for member in self.workers.values():
            self.wait(
                lambda member=member: not member.leftovers(),
                lambda member=member: f"{member.name} to be clean; left: {member.leftovers()}",
            )
        assert self.metric("requests_in_flight") == 0

    def close(self) -> None:
        self.client.close()
        for member in self.workers.values():
            member.close()


@pytest.fixture
def start(processes: Any, wait: Wait) -> Iterator[Callable[..., Cluster]]:
    clusters: list[Cluster] = []

    def make(**config: Any) -> Cluster:
        clusters.append(Cluster(processes, wait, **config))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def ask() -> Callable[..., Asked]:
    """`ask(cluster, prompt, max_tokens, **arguments)`; then `check()`, or `join()` and look at `error`."""

    def begin(cluster: Cluster, prompt: list[int], max_tokens: int, **arguments: Any) -> Asked:
        return Asked(cluster.client, prompt, max_tokens, **{"top_logprobs": 1, **arguments})

    return begin
