"""A router and workers as real processes, with the clients that users have."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from asked import MODEL
from members import START_S, WAIT_S, Member, start_member
from tandem.cluster.config import EngineConfig, RouterConfig, to_dict
from tandem.cluster.types import Role
from tandem.router.client import Answer, TandemClient

ENGINE = EngineConfig(
    model=MODEL,
    device="paced",
    kv_cache_bytes=2 * 2**20,
    paced_step_s=0.004,
    paced_prefill_token_s=0.0002,
    paced_decode_row_s=0.0,
)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Polls, bounded."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}"
        time.sleep(0.01)


class Cluster:
    """`add` workers, `wait_ready`, ask; `close` ends everything."""

    def __init__(self, runner: asyncio.Runner, folder: Path, **router: Any) -> None:
        self._runner, self._folder = runner, folder
        self.workers: dict[str, Member] = {}
        config = RouterConfig(
            model=MODEL, http_port=0, grpc_port=0, registry_port=0, **{"unready_wait_s": 20.0, **router}
        )
        self._router, self._addresses = runner.run(self._start_router(config))
        self.url = f"http://{self._addresses['http']}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.grpc = TandemClient(self._addresses["grpc"])

    async def _start_router(self, config: RouterConfig) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
        path = self._folder / f"router-{os.urandom(4).hex()}.json"
        path.write_text(json.dumps(to_dict(config)))
        command = [sys.executable, "-m", "tandem.cluster.launch.process", "router", "--config", str(path)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=self._folder)
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        assert line, "the router ended before it served"
        return process, json.loads(line)

    def add(self, role: Role, name: str, *, worker: dict[str, Any] | None = None, **engine: Any) -> Member:
        """Starts a worker; keyword arguments replace fields of its engine's config, `worker` those of its own."""
        if name in self.workers:
            self._runner.run(self.workers[name].close())
        config = replace(ENGINE, **engine)
        fields = {"routers": (self._addresses["registry"],), **(worker or {})}
        self.workers[name] = self._runner.run(start_member(self._folder, name, role, config, **fields))
        return self.workers[name]

    def run(self, work: Any) -> Any:
        """Runs something of a `Member`."""
        return self._runner.run(work)

    def known(self) -> dict[str, str]:
        """The workers' states, as the router sees them."""
        return {w["worker_id"]: w["state"] for w in self.http.get("/ready").json()["workers"]}

    def wait_ready(self) -> None:
        """Returns when every worker is routable."""
        ready = dict.fromkeys(self.workers, "ready")
        wait_until(lambda: self.known().items() >= ready.items(), f"{list(ready)} to be ready")

    def wait_clean(self) -> None:
        """Returns when no worker that lives owns anything of anybody."""
        for member in self.workers.values():
            if member.alive:
                self.run(member.wait_clean())

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples that carry all of `labels`."""
        lines = self.http.get("/metrics").text.splitlines()
        hits = [line for line in lines if line.startswith(f"tandem:{name}{{") and all(x in line for x in labels)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in hits)

    def ask(self, prompt: list[int], max_tokens: int, **arguments: Any) -> Answer:
        """One answer, greedy unless told otherwise."""
        values: dict[str, Any] = {"temperature": 0, "timeout_s": 60.0, **arguments}
        return self.grpc.generate(token_ids=prompt, max_tokens=max_tokens, **values).collect()

    def close(self) -> None:
        self.http.close()
        self.grpc.close()
        for member in self.workers.values():
            self.run(member.close())
        self.run(self._end_router())

    async def _end_router(self) -> None:
        self._router.kill()
        await self._router.wait()


def prompts(count: int, tokens: int) -> list[list[int]]:
    """Different from the first token on."""
    draw = random.Random(tokens)
    return [[3 + i, *(draw.randrange(3, 500) for _ in range(tokens - 1))] for i in range(count)]
