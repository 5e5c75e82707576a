"""One cluster on a Ray of its own: served requests, killed processes, a drain, and nothing left behind."""

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tandem.cluster.config_file import build_config
from tandem.cluster.launch.ray_cluster import RayCluster
from tandem.cluster.launch.state import Endpoints, LaunchError, MemberView, Phase
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
KEY = "open sesame"
SETTINGS = {
    "model": MODEL,
    "engine.device": "paced",
    "engine.kv_cache_bytes": "16MiB",
    "router.http_port": 0,
    "router.grpc_port": 0,
    "router.registry_port": 0,
    "router.api_key": KEY,
    "drain_timeout_s": 60,
}
DEADLINE_S = 120.0


@dataclass
class Running:
    """The cluster under test and what it said."""

    cluster: RayCluster
    endpoints: Endpoints
    reports: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    reports: list[str] = []
    cluster = RayCluster(build_config(None, SETTINGS), report=reports.append)
    try:
        yield Running(cluster, cluster.start(), reports)
    finally:
        cluster.stop(at_once=True)


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        threading.Event().wait(0.05)


def member(cluster: RayCluster, name: str) -> MemberView:
    return next(view for view in cluster.members() if view.name == name)


def complete(endpoints: Endpoints, prompt: str, max_tokens: int = 8) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://{endpoints.http}/v1/completions", json.dumps(body).encode(), {"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def served(endpoints: Endpoints) -> bool:
    try:
        return bool(complete(endpoints, "are you back?"))
    except OSError:
        return False


def descendants() -> dict[int, str]:
    """Processes below this one by pid, each with its start time, which makes a pid unmistakable."""
    parents: dict[int, tuple[int, str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = (int(fields[1]), fields[19])
    below = {os.getpid()}
    while found := {pid for pid, (parent, _) in parents.items() if parent in below} - below:
        below |= found
    return {pid: parents[pid][1] for pid in below - {os.getpid()}}


def test_a_request_is_split_over_the_two_workers(running: Running) -> None:
    with TandemClient(running.endpoints.grpc, api_key=KEY, timeout_s=60) as client:
        answer = client.generate("one two three", max_tokens=5, temperature=0.0, ignore_eos=True).collect()
    assert len(answer.token_ids) == 5
    assert answer.timings is not None
    assert answer.timings.path == "split"
    assert (answer.timings.prefill_worker, answer.timings.decode_worker) == ("prefill-0", "decode-0")
    roles = {view.name: view.role for view in running.cluster.members()}
    assert roles == {"router": "router", "prefill-0": "prefill", "decode-0": "decode"}


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "router"])
def test_a_killed_process_comes_back(running: Running, name: str) -> None:
    before = complete(running.endpoints, "the same question")
    old = member(running.cluster, name)
    os.kill(old.state.pid, signal.SIGKILL)

    def back() -> bool:
        view = member(running.cluster, name)
        return view.restarts == old.restarts + 1 and view.state.phase is Phase.READY

    wait_for(f"{name} is back", back)
    new = member(running.cluster, name)
    assert new.state.pid != old.state.pid
    if name == "router":
        assert new.state.addresses == old.state.addresses  # clients and workers find it where it was
    else:
        assert new.state.epoch != old.state.epoch
    wait_for("requests are served again", lambda: served(running.endpoints))
    assert complete(running.endpoints, "the same question") == before
    assert any(line.startswith(f"{name} is back after") or "was restarted" in line for line in running.reports)


def test_the_key_reaches_the_router(running: Running) -> None:
    with (
        pytest.raises(urllib.error.HTTPError) as caught,
        urllib.request.urlopen(f"http://{running.endpoints.http}/v1/models", timeout=60),
    ):
        pass
    with caught.value:
        assert caught.value.code == 401


def test_a_second_cluster_cannot_take_the_same_port(running: Running) -> None:
    port = int(running.endpoints.http.rpartition(":")[2])
    with pytest.raises(LaunchError, match=rf"router\.http_port: 127\.0\.0\.1:{port} cannot be used"):
        RayCluster(build_config(None, {**SETTINGS, "router.http_port": port})).start()


def test_drain_finishes_what_runs_and_stop_leaves_nothing(running: Running) -> None:
    answers: list[int] = []
    began = threading.Event()

    def long_request() -> None:
        with TandemClient(running.endpoints.grpc, api_key=KEY, timeout_s=60) as client:
            tokens = 0
            for delta in client.generate("a long answer", max_tokens=300, ignore_eos=True):
                tokens += len(delta.token_ids)
                began.set()
            answers.append(tokens)

    request = threading.Thread(target=long_request)
    request.start()
    assert began.wait(60)
    ports = [running.endpoints.http, running.endpoints.grpc, running.endpoints.registry]
    ports += [address for view in running.cluster.members()[1:] for address in view.state.addresses.values()]
    ours = descendants()
    assert {view.state.pid for view in running.cluster.members()} <= ours.keys()
    folders = set(Path("/tmp").glob(f"tandem-{os.getpid()}-*"))  # other clusters may run on this machine
    assert any(_ours(folder) for folder in folders)

    drained = running.cluster.drain()
    request.join(60)
    assert drained
    assert answers == [300]

    running.cluster.stop()
    wait_for("every process has ended", lambda: not (ours.items() & descendants_or_orphans(ours).items()))
    for address in ports:
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0, address
    assert not any(folder.exists() and _ours(folder) for folder in folders)
    assert not list(Path("/dev/shm").glob("plasma*"))
    assert running.cluster.members() == ()
    running.cluster.stop()  # idempotent


def descendants_or_orphans(pids: dict[int, str]) -> dict[int, str]:
    """Those of `pids` that are alive, whoever their parent is now."""
    alive: dict[int, str] = {}
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            alive[pid] = fields[19]
    return alive


def _ours(folder: Path) -> bool:
    return any(folder.glob("session_*"))
