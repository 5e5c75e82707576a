"""Two nodes of a Ray cluster on one machine: each in a network namespace of its own, joined by a pair of virtual
interfaces. Needs root, and `ip` of iproute2.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NEAR, FAR = "10.213.77.1", "10.213.77.2"
GCS_PORT = 6399
START_S = 90.0
_RAY = [sys.executable, "-P", "-m", "ray.scripts.scripts"]


def why_not() -> str:
    """Why there can be none here; empty where there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2's ip"
    name = f"tandem-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


class TwoNodes:
    """`start`, then `run` programs on one of them; `close` ends all that runs on either."""

    def __init__(self) -> None:
        self.near, self.far = f"tandem-near-{os.getpid()}", f"tandem-far-{os.getpid()}"
        self._folder = Path(tempfile.mkdtemp(prefix="tm-", dir="/tmp"))  # a Unix socket's path holds 107 bytes
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = os.environ | {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # a local Ray that this process had may have set it to 0
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_enable_worker_prestart": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XDG_RUNTIME_DIR": str(self._folder),
        }

    @property
    def address(self) -> str:
        """Of the Ray cluster."""
        return f"{NEAR}:{GCS_PORT}"

    def start(self) -> None:
        """Returns when both nodes are up."""
        for name in (self.near, self.far):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", "tmn", "netns", self.near, "type", "veth", "peer", "name", "tmf", "netns", self.far)
        for name, interface, address in ((self.near, "tmn", NEAR), (self.far, "tmf", FAR)):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
        common = ("--num-cpus=4", "--object-store-memory=80000000", "--disable-usage-stats", "--block")
        folder = f"--temp-dir={self._folder}"
        head = ("--head", f"--port={GCS_PORT}", "--include-dashboard=false", folder)
        self._ray(self.near, f"--node-ip-address={NEAR}", *head, *common)
        self._wait("the head can be reached", self._listens)
        self._ray(self.far, f"--node-ip-address={FAR}", f"--address={self.address}", *common)
        self._wait("both nodes run", self._run)

    def run(self, name: str, command: list[str]) -> subprocess.Popen[str]:
        """A program in a node's namespace, its input and output in pipes."""
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
            cwd=self._folder,
        )

    def pids(self, name: str) -> list[int]:
        """Processes of a node."""
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, name: str) -> None:
        """Every process of a node at once."""
        for pid in self.pids(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def unplug(self) -> None:
        """The wire between them: nobody's end is told to the other."""
        _ip("-n", self.far, "link", "set", "tmf", "down")

    def close(self) -> None:
        """Idempotent."""
        deadline_s = time.monotonic() + 10
        for name in (self.near, self.far):
            while self.pids(name) and time.monotonic() < deadline_s:
                self.kill(name)
                time.sleep(0.05)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        for daemon in self._daemons:
            daemon.wait(10)
        self._daemons.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ray(self, name: str, *arguments: str) -> None:
        log = (self._folder / f"{name}.log").open("ab")
        with log:
            self._daemons.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *_RAY, "start", *arguments],
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                    cwd=self._folder,
                )
            )

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + START_S
        while not condition():
            logs = "\n".join(path.read_text()[-2000:] for path in self._folder.glob("*.log"))
            assert time.monotonic() < deadline_s, f"never: {what}\n{logs}"
            time.sleep(0.1)

    def _run(self) -> bool:
        """Whether each node says so: it has told the head of itself then."""
        logs = [self._folder / f"{name}.log" for name in (self.near, self.far)]
        return all("Ray runtime started" in log.read_text() for log in logs)

    def _listens(self) -> bool:
        """Whether the head can be reached."""
        program = f"import socket; socket.create_connection(({NEAR!r}, {GCS_PORT}), 1)"
        command = ["ip", "netns", "exec", self.near, sys.executable, "-I", "-S", "-c", program]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
