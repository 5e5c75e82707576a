"""A whole cluster as plain processes on this machine, for claims: one router and workers of any roles, on free ports of
loopback, that end with the `with` block.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config import EngineConfig, RouterConfig, WorkerConfig, to_dict
from ..types import SLO, Role
from .processes import addresses_of, end
from .server import ServerUnusable, ask

START_TIMEOUT_S = 300.0
NEVER_REFUSED_S = 86_400.0
"""The router's own promises, so loose that admission refuses nobody: a refusal would not be compared with anything."""
MAX_WAITING = 2**16
HEARD_AGAIN_S = 5.0
"""How long workers that were ready may be silent, on a machine that is too busy for a moment."""
HEARTBEAT_S = 0.6
"""After which the router has heard what the workers counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way to use the same number of workers."""

    label: str
    engine: EngineConfig
    prefill: int = 0
    decode: int = 0
    mixed: int = 0
    prefill_engine: EngineConfig | None = None
    """None: `engine`."""
    prefill_gpus: int = 1
    """That a prefill worker stands for."""
    worker_gpus: int = 1
    """That any other worker stands for."""

    @property
    def workers(self) -> int:
        """Workers in all."""
        return self.prefill + self.decode + self.mixed

    @property
    def gpus(self) -> int:
        """Devices in all."""
        return self.prefill * self.prefill_gpus + (self.decode + self.mixed) * self.worker_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCount:
    """Steps that the workers have run, and those of them that the machine made late."""

    steps: int
    late: int

    def since(self, earlier: StepCount) -> StepCount:
        """Those between two looks."""
        return StepCount(steps=self.steps - earlier.steps, late=self.late - earlier.late)

    @property
    def late_share(self) -> float:
        """Of all steps."""
        return self.late / self.steps if self.steps else 0.0


class RunningSystem:
    """A context manager: inside, the cluster serves at `url`. RuntimeError if a process does not come up."""

    def __init__(self, system: System, router: RouterConfig | None = None) -> None:
        """`router`: its promises and bounds; None: it refuses nobody. Model and ports are filled in."""
        self._system = system
        self._router = router or RouterConfig(
            slo=SLO(ttft_s=NEVER_REFUSED_S, tpot_s=NEVER_REFUSED_S), max_waiting=MAX_WAITING, request_timeout_s=3600.0
        )
        self._stack = ExitStack()
        self.processes: dict[str, int] = {}
        """Their ids, by name."""
        self.url = ""

    def __enter__(self) -> RunningSystem:
        try:
            self._start_all()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def steps(self) -> StepCount:
        """Of all workers since they started, by their last heartbeats. Blocks for a moment where these are late; raises
        ServerUnusable where they stay away.
        """
        workers = self._workers(time.monotonic() + HEARD_AGAIN_S)
        return StepCount(
            steps=sum(int(worker["steps_total"]) for worker in workers),
            late=sum(int(worker["late_steps_total"]) for worker in workers),
        )

    def _workers(self, until_s: float) -> list[dict[str, Any]]:
        while True:
            try:
                workers: list[dict[str, Any]] = ask(self.url, "/ready")["workers"]
                return workers
            except ServerUnusable:  # it answers 503 while heartbeats are late
                if time.monotonic() > until_s:
                    raise
            time.sleep(0.1)

    def _start_all(self) -> None:
        system = self._system
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-claims-")))
        router = replace(self._router, model=system.engine.model, http_port=0, grpc_port=0, registry_port=0)
        addresses = self._start(folder, "router", "router", router)
        self.url = f"http://{addresses['http']}"
        pools = ((Role.PREFILL, system.prefill), (Role.DECODE, system.decode), (Role.MIXED, system.mixed))
        first = WorkerConfig(worker_id="first", role=Role.MIXED, routers=(addresses["registry"],))
        for role, count in pools:
            own = system.prefill_engine if role is Role.PREFILL else None
            for index in range(count):
                worker = replace(first, worker_id=f"{role.value}-{index}", role=role, engine=own or system.engine)
                self._start(folder, "worker", worker.worker_id, worker)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{system.label}: not ready within {START_TIMEOUT_S:g} s")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            workers = ask(self.url, "/ready")["workers"]
        except ServerUnusable:
            return False  # it answers 503 until a request could be served
        return [worker["state"] for worker in workers].count("ready") == self._system.workers

    def _start(self, folder: Path, kind: str, name: str, config: RouterConfig | WorkerConfig) -> dict[str, Any]:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(to_dict(config)), encoding="utf-8")
        command = [sys.executable, "-m", "tandem.cluster.launch.process", kind, "--config", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, cwd=folder)
        self._stack.callback(end, process)
        self.processes[name] = process.pid
        return addresses_of(process, f"{self._system.label}: a {kind}", START_TIMEOUT_S)
