"""However `tandem serve` ends, nothing is left: no process, port, shared memory, folder or file with its secret. What
can be finished is finished, with the right tokens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
TIMEOUT_S = 150
TOKENS = 300
STREAMS = 3
Wait = Callable[..., None]
pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")


def expected(prompt: list[int]) -> list[int]:
    config = resolve_model(MODEL).config
    return list(expected_tokens(prompt, TOKENS, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


@dataclass
class Traces:
    """What a running cluster has on the machine."""

    processes: dict[int, psutil.Process] = field(default_factory=dict)
    sockets: dict[str, int] = field(default_factory=dict)
    """That listen, by inode, which no later socket of somebody else on the same port has; with their ports."""
    shared: set[str] = field(default_factory=set)


class Serve:
    """One `tandem serve` in a session of its own, with a runtime folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.runtime = folder / "run"
        self.runtime.mkdir(mode=0o700)
        config = folder / "cluster.yaml"
        config.write_text(
            f"model: {MODEL}\n"
            "engine: {device: paced, kv_cache_bytes: 4MiB, paced_step_s: 0.01}\n"
            "router: {http_port: 0, grpc_port: 0, registry_port: 0}\n"
            "drain_timeout_s: 60\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cluster.cli", "serve", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.runtime)},
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.traces = Traces()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)

    @property
    def text(self) -> str:
        return "".join(self.said)

    def address(self, kind: str) -> str:
        found = re.search(rf"{kind} +(?:http://)?(\S+)", self.text)
        assert found is not None, self.text
        return found[1]

    def look(self) -> None:
        """Remembers every process below, the ports they listen on and the shared memory they have open."""
        parts = psutil.Process(self.process.pid).children(recursive=True)
        parts += [psutil.Process(pid) for pid in inside_of(self.folders())]
        for process in parts:
            self.traces.processes[process.pid] = process
            try:
                files = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
            except OSError:
                continue
            self.traces.sockets |= {name: port for name, port in listening().items() if name in files}
            self.traces.shared |= {path for path in files if path.startswith("/dev/shm/")}

    def folders(self) -> list[Path]:
        return list(Path("/tmp").glob(f"tandem-{self.process.pid}-*"))

    def left(self) -> dict[str, Any]:
        """What is still there of all that `look` saw, and what should be gone whatever it saw."""
        now = listening()
        alive = [p for p in self.traces.processes.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        found = {
            "processes": [(process.pid, process.name()) for process in alive],
            "strays": inside_of(self.folders()),
            "ports": sorted(now[name] for name in self.traces.sockets.keys() & now.keys()),
            "shared memory": [path for path in self.traces.shared if Path(path.removesuffix(" (deleted)")).exists()],
            "folders": self.folders(),
        }
        return {name: what for name, what in found.items() if what}

    def signal(self, number: int, *, group: bool) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.look()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for process in self.traces.processes.values():
            if process.is_running():
                process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


def inside_of(folders: list[Path]) -> list[int]:
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if any(link.readlink().is_relative_to(folder) for folder in folders):
                found.append(int(link.parent.name))
        except OSError:
            continue
    return found


def listening() -> dict[str, int]:
    """Every socket of this machine that accepts TCP connections, as links in /proc name it, with its port."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found[f"socket:[{fields[9]}]"] = int(fields[1].rpartition(":")[2], 16)
    return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started = Serve(tmp_path)
    yield started
    started.close()


class Streams:
    """Requests that run; each ends with its tokens or with an error."""

    def __init__(self, address: str) -> None:
        self.running = 0
        self.tokens: dict[int, list[int]] = {}
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=(address, index)) for index in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def prompt(self, index: int) -> list[int]:
        return list(range(1 + index, 100 + 7 * index))

    def _ask(self, address: str, index: int) -> None:
        tokens: list[int] = []
        try:
            with TandemClient(address, timeout_s=TIMEOUT_S) as client:
                for delta in client.generate(token_ids=self.prompt(index), max_tokens=TOKENS, temperature=0):
                    self.running += not tokens
                    tokens += delta.token_ids
            self.tokens[index] = tokens
        except Exception as error:
            self.errors.append(error)

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def end(self) -> None:
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    def check_all_right(self) -> None:
        assert self.errors == []
        assert self.tokens == {index: expected(self.prompt(index)) for index in range(STREAMS)}


def until_ready(serve: Serve, wait: Wait) -> None:
    def ready() -> bool:
        assert serve.process.poll() is None, serve.text
        return "Ctrl-C drains" in serve.text

    wait(ready, "the cluster to be ready", TIMEOUT_S)


def under_load(serve: Serve, wait: Wait) -> Streams:
    until_ready(serve, wait)
    streams = Streams(serve.address("gRPC"))
    wait(lambda: streams.running == STREAMS, "the streams to run")
    serve.look()
    return streams


def check_gone(serve: Serve, wait: Wait) -> None:
    wait(lambda: not serve.left(), lambda: f"nothing to be left of {serve.left()}\n{serve.text}")


ENDINGS = {  # the signal, whether to the whole group, how often; and when
    "Ctrl-C": (signal.SIGINT, True, 1, ("start", "load")),
    "Ctrl-C twice": (signal.SIGINT, True, 2, ("load",)),
    "SIGTERM": (signal.SIGTERM, False, 1, ("idle",)),
    "SIGTERM to the group": (signal.SIGTERM, True, 1, ("start", "load")),
    "closed terminal": (signal.SIGHUP, True, 1, ("load",)),
    "kill -9": (signal.SIGKILL, False, 1, ("start", "idle", "load")),
}
CASES = [
    pytest.param(moment, number, group, times, id=f"{name}, {moment}")
    for name, (number, group, times, moments) in ENDINGS.items()
    for moment in moments
]


@pytest.mark.parametrize(("moment", "number", "group", "times"), CASES)
def test_nothing_is_left(serve: Serve, wait: Wait, moment: str, number: int, group: bool, times: int) -> None:
    streams = None
    if moment == "start":
        wait(lambda: "ray: ready" in serve.text or serve.process.poll() is not None, "Ray", TIMEOUT_S)
        serve.look()
    elif moment == "idle":
        until_ready(serve, wait)
        serve.look()
    else:
        streams = under_load(serve, wait)
    serve.signal(number, group=group)
    for _ in range(times - 1):
        wait(lambda: "draining" in serve.text, "the first to be heard")
        serve.signal(number, group=group)
    code = serve.process.wait(TIMEOUT_S)
    check_gone(serve, wait)
    killed = number == signal.SIGKILL
    assert code == (-signal.SIGKILL if killed else 130 if moment == "start" else 0), serve.text
    if streams is not None:
        streams.end()
        if killed or times == 2:
            assert len(streams.errors) == STREAMS
        else:
            streams.check_all_right()
    files = list(serve.runtime.rglob("*.json"))
    assert files == [] or killed
    if files:  # its owner is gone: nobody takes it for a running cluster, and the next start removes it
        _swept(serve.runtime)
        assert list(serve.runtime.rglob("*.json")) == []


def _swept(runtime: Path) -> None:
    code = "from tandem.cluster.launch import runtime_file as r; assert r.running() == (); r.sweep()"
    env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


@pytest.mark.parametrize("daemon", ["gcs_server", "raylet"])
def test_when_ray_dies_running_requests_finish_and_then_the_command_ends(serve: Serve, wait: Wait, daemon: str) -> None:
    """The data plane does not need Ray: only what is new is refused."""
    streams = under_load(serve, wait)
    [victim] = [process for process in serve.traces.processes.values() if process.name() == daemon]
    victim.kill()
    wait(lambda: f"the local Ray died ({daemon})" in serve.text, "the line that says so")
    http = f"http://{serve.address('HTTP')}"
    body = {"model": MODEL, "prompt": "late", "max_tokens": 4}

    def refused() -> bool:
        try:
            return httpx.post(f"{http}/v1/completions", json=body, trust_env=False).status_code == 503
        except httpx.TransportError:
            return streams.ended  # on a slow machine all is over before anybody could ask

    wait(refused, "a refusal")
    streams.end()
    streams.check_all_right()
    began_s = time.monotonic()
    assert serve.process.wait(TIMEOUT_S) == 1, serve.text
    print(f"ended {time.monotonic() - began_s:.1f} s after the last stream")
    assert "ended, because the local Ray died; nothing is left running" in serve.text
    assert "not everything finished" not in serve.text
    check_gone(serve, wait)
    assert list(serve.runtime.rglob("*.json")) == []
