"""A cluster of real processes that loses workers all the time: who runs, who was killed, what each of them holds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig, to_dict
from tandem.cluster.types import Role

START_TIMEOUT_S = 120.0
OWNED = ("leases", "credited_blocks", "pulls", "running", "waiting", "held")
"""What of a worker's report must be zero when no request is there."""
OWN_SHARE, OWN_MIB, FDS = 1.1, 16.0, 24
"""What may be more at the end than in the beginning."""
AGES_S = ((5.0, 15.0), (15.0, 30.0), (30.0, 60.0), (60.0, math.inf))


@dataclass(slots=True)
class Member:
    """One process and what was seen of it."""

    name: str
    kind: str
    config: RouterConfig | WorkerConfig
    process: asyncio.subprocess.Process | None = None
    addresses: dict[str, Any] = field(default_factory=dict)
    served_s: float = math.inf
    """When this life began to serve, in seconds of `time.time`."""
    kills: int = 0
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds since it began to serve, resident bytes but for shared memory, open descriptors). KV memory is shared:
    of a bounded size, and resident when it has been written to."""


class SoakCluster:
    """One router and `pairs` prefill and decode workers; `kill` ends one, which is started again."""

    def __init__(self, folder: Path, engine: EngineConfig, *, pairs: int, router: RouterConfig) -> None:
        self._folder = folder
        self._engine = engine
        self._pairs = pairs
        self.router = Member("router", "router", router)
        self.workers: dict[str, Member] = {}

    async def start(self) -> None:
        """Returns when every worker is ready."""
        await self._start(self.router)
        for index in range(self._pairs):
            for role in (Role.PREFILL, Role.DECODE):
                config = WorkerConfig(
                    worker_id=f"{role.value}-{index}",
                    role=role,
                    engine=self._engine,
                    routers=(self.router.addresses["registry"],),
                    security=self.router.config.security,
                )
                self.workers[config.worker_id] = Member(config.worker_id, "worker", config)
        await asyncio.gather(*(self._start(member) for member in self.workers.values()))
        await self.wait_ready()

    async def _start(self, member: Member) -> None:
        member.served_s = math.inf
        path = self._folder / f"{member.name}.json"
        path.write_text(json.dumps(to_dict(member.config)))
        command = ["-m", "tandem.cluster.launch.process", member.kind, "--config", str(path)]
        member.process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, cwd=self._folder
        )
        assert member.process.stdout is not None
        line = await asyncio.wait_for(member.process.stdout.readline(), START_TIMEOUT_S)
        if not line:
            raise RuntimeError(f"{member.name} ended with {await member.process.wait()} before it served")
        member.addresses = json.loads(line)
        member.served_s = time.time()

    async def kill(self, name: str) -> None:
        """kill -9, and the next life of the same worker."""
        member = self.workers[name]
        assert member.process is not None
        member.process.send_signal(signal.SIGKILL)
        await member.process.wait()
        member.kills += 1
        await self._start(member)

    async def restart_missing(self) -> None:
        """Starts the next life of a worker whose restart was interrupted."""
        for member in self.workers.values():
            if member.process is None or member.process.returncode is not None:
                await self._start(member)

    async def kill_now_and_then(self, every_s: float, rng: random.Random) -> None:
        """Until cancelled; never two workers of one role at the same time, so that the other one can go on."""
        while True:
            await asyncio.sleep(every_s * rng.uniform(0.5, 1.5))
            await asyncio.shield(self.kill(rng.choice(sorted(self.workers))))
            await self.wait_ready()

    def ready(self) -> dict[str, Any]:
        """The router's own view of the cluster."""
        answer: dict[str, Any] = httpx.get(f"http://{self.router.addresses['http']}/ready", trust_env=False).json()
        return answer

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the router would send work to every worker."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            workers = (await asyncio.to_thread(self.ready))["workers"]
            states = {worker["worker_id"]: worker["state"] for worker in workers}
            if [states.get(name) for name in self.workers] == ["ready"] * len(self.workers):
                return
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"not ready within {timeout_s:g} s: {states}")
            await asyncio.sleep(0.1)

    def leftovers(self) -> dict[str, dict[str, int]]:
        """What somebody still owns on any worker, by the last heartbeats; empty where nothing leaked."""
        found: dict[str, dict[str, int]] = {}
        for worker in self.ready()["workers"]:
            counts = {name: worker[name] for name in OWNED}
            counts["held_blocks"] = worker["num_blocks"] - worker["free_blocks"] - worker["cached_blocks"]
            if left := {name: count for name, count in counts.items() if count}:
                found[worker["worker_id"]] = left
        return found

    async def wait_clean(self, timeout_s: float = 45.0) -> dict[str, dict[str, int]]:
        """What is left after leases, credits and waits have had their time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            left = await asyncio.to_thread(self.leftovers)
            if not left or time.monotonic() > deadline_s:
                return left
            await asyncio.sleep(0.5)

    async def sample_forever(self, every_s: float) -> None:
        """Notes memory and descriptors of every process."""
        while True:
            for member in (self.router, *self.workers.values()):
                with contextlib.suppress(psutil.Error, AttributeError):
                    process = psutil.Process(member.process.pid)  # type: ignore[union-attr]
                    age_s = time.time() - member.served_s
                    memory = process.memory_info()
                    member.samples.append((age_s, memory.rss - memory.shared, process.num_fds()))
            await asyncio.sleep(every_s)

    async def close(self) -> None:
        """Ends every process: asked first, killed after 15 s."""
        for member in (*self.workers.values(), self.router):
            if member.process is None or member.process.returncode is not None:
                continue
            member.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(member.process.wait(), 15)
            except TimeoutError:
                os.kill(member.process.pid, signal.SIGKILL)
                await member.process.wait()


def growth(samples: list[tuple[float, int, int]]) -> dict[str, float]:
    """Median of the first and of the last quarter of a process's samples: MiB of its own and descriptors."""
    quarter = max(1, len(samples) // 4)
    first, last = samples[:quarter], samples[-quarter:]
    mib = 2**20
    return {
        "own_mib_first": round(statistics.median(s[1] for s in first) / mib, 1),
        "own_mib_last": round(statistics.median(s[1] for s in last) / mib, 1),
        "fds_first": statistics.median(s[2] for s in first),
        "fds_last": statistics.median(s[2] for s in last),
    }


def by_age(members: Iterable[Member]) -> dict[str, dict[str, float]]:
    """Medians over all lives of the workers by how long they have served: what leaks grows from row to row."""
    samples = [sample for member in members for sample in member.samples]
    rows = {}
    for low_s, high_s in AGES_S:
        row = [sample for sample in samples if low_s <= sample[0] < high_s]
        if row:
            own_mib, fds = statistics.median(s[1] for s in row) / 2**20, statistics.median(s[2] for s in row)
            rows[f"{low_s:g} s and older"] = {"own_mib": round(own_mib, 1), "fds": fds, "samples": len(row)}
    return rows


def grows(router: dict[str, float], ages: dict[str, dict[str, float]]) -> list[str]:
    """What is not flat, in words: the router from its first quarter to its last, workers from their youngest lives to
    their oldest, beyond what caches and connections that come and go explain. A leak of a KiB a request would show.
    """
    rows = list(ages.values())
    pairs = [("router", {"own_mib": router["own_mib_first"], "fds": router["fds_first"]}, router)]
    if len(rows) > 1:
        pairs.append(("workers", rows[0], {"own_mib_last": rows[-1]["own_mib"], "fds_last": rows[-1]["fds"]}))
    found = []
    for name, first, last in pairs:
        if last["own_mib_last"] > OWN_SHARE * first["own_mib"] + OWN_MIB:
            found.append(f"{name}: memory from {first['own_mib']} to {last['own_mib_last']} MiB")
        if last["fds_last"] > first["fds"] + FDS:
            found.append(f"{name}: descriptors from {first['fds']:g} to {last['fds_last']:g}")
    return found


def with_free_ports(config: RouterConfig) -> RouterConfig:
    """The same router on any free ports."""
    return replace(config, http_port=0, grpc_port=0, registry_port=0)
