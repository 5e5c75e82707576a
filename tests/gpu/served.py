"""A router and workers as processes of this machine, for tests that share a GPU between them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig, to_dict
from tandem.cluster.types import Role
from tandem.router.client import TandemClient

READY_S = 60.0


@dataclass
class Served:
    """`close` kills whatever still runs."""

    folder: Path
    engine: EngineConfig
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = RouterConfig(
            model=self.engine.model, http_port=0, grpc_port=0, registry_port=0, unready_wait_s=READY_S
        )
        self.where = self._start("router", config)[1]

    def worker(self, role: str, name: str, transport: str) -> subprocess.Popen[str]:
        """Starts one and returns when it serves."""
        config = WorkerConfig(
            worker_id=name,
            role=Role(role),
            engine=self.engine,
            transport=transport,
            routers=(self.where["registry"],),
        )
        return self._start("worker", config)[0]

    def end(self, process: subprocess.Popen[str]) -> None:
        """Kill -9."""
        process.kill()
        process.wait(20)

    def ask(self, prompt: list[int], tokens: int) -> Any:
        """A greedy answer, once somebody can give it."""
        until_s = time.monotonic() + READY_S
        while True:
            try:
                with TandemClient(self.where["grpc"]) as client:
                    return client.generate(
                        token_ids=prompt, max_tokens=tokens, temperature=0, ignore_eos=True
                    ).collect()
            except Exception:  # until the workers that were just started, or lost, are known
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.5)

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.wait(20)
            if process.stdout is not None:
                process.stdout.close()

    def _start(self, kind: str, config: RouterConfig | WorkerConfig) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        path = self.folder / f"{kind}-{len(self.running)}.json"
        path.write_text(json.dumps(to_dict(config)))
        command = [sys.executable, "-m", "tandem.cluster.launch.process", kind, "--config", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the {kind} ended with {process.wait(20)} before it served"
        return process, json.loads(line)


def answer_alone(folder: Path, engine: EngineConfig, prompt: list[int], tokens: int) -> list[int]:
    """Token ids of one worker that does both. `folder`: made here."""
    folder.mkdir()
    alone = Served(folder, engine)
    try:
        alone.worker("mixed", "m0", "auto")
        return list(alone.ask(prompt, tokens).token_ids)
    finally:
        alone.close()
