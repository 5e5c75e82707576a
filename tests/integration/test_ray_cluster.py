"""One cluster on a Ray of its own, with two router processes: served requests, killed processes, a drain, and nothing
left behind.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from tandem.cluster import cli_restart
from tandem.cluster.auth import OPEN, MemberCredentials
from tandem.cluster.cli_status import fetch, render, scrape
from tandem.cluster.config import SecurityConfig
from tandem.cluster.config_file import build_config
from tandem.cluster.launch import runtime_file
from tandem.cluster.launch.ray_cluster import RayCluster
from tandem.cluster.launch.state import Endpoints, LaunchError, MemberView, Phase
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import RegistryStub, WorkerStub
from tandem.cluster.rpc import open_channel
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
KEY = "open-sesame-and-more"
SETTINGS = {
    "model": MODEL,
    "engine.device": "paced",
    "engine.kv_cache_bytes": "16MiB",
    "router.http_port": 0,
    "router.grpc_port": 0,
    "router.registry_port": 0,
    "router.processes": 2,
    "router.api_key": KEY,
    "drain_timeout_s": 60,
}
DEADLINE_S = 120.0
needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's tables of sockets")


@dataclass
class Running:
    """The cluster under test and what it said."""

    cluster: RayCluster
    endpoints: Endpoints
    reports: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    reports: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        cluster = RayCluster(build_config(None, SETTINGS), report=reports.append)
        try:
            yield Running(cluster, cluster.start(), reports)
        finally:
            cluster.stop(at_once=True)
        assert runtime_file.running() == (), "its file went with it"


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        threading.Event().wait(0.05)


def member(cluster: RayCluster, name: str) -> MemberView:
    return next(view for view in cluster.members() if view.name == name)


def complete(endpoints: Endpoints, prompt: str, max_tokens: int = 8) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{endpoints.http}/v1/completions", json.dumps(body).encode(), headers)
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
    assert roles == {"router-0": "router", "router-1": "router", "prefill-0": "prefill", "decode-0": "decode"}


def listening() -> dict[int, str]:
    """Ports on which this process and those below it accept connections, each with its address as /proc/net has it."""
    addresses: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                addresses[f"socket:[{fields[9]}]"] = fields[1]
    found = {}
    for pid in (os.getpid(), *descendants()):
        try:
            handles = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        for handle in handles:
            with contextlib.suppress(OSError):
                if address := addresses.get(os.readlink(handle)):
                    host, _, port = address.rpartition(":")
                    found[int(port, 16)] = host
    return found


def stranger_hears(port: int, method: str) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(method)(b"", timeout=20)
        return error.value.code()  # type: ignore[attr-defined]


@needs_proc
def test_nothing_listens_beyond_loopback(running: Running) -> None:
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    ports = listening()
    ours = {int(address.rpartition(":")[2]) for address in (running.endpoints.http, *running.endpoints.registries)}
    assert ours < set(ports), "the router's own ports are among those seen"
    assert {port: host for port, host in ports.items() if host not in loopback} == {}


@needs_proc
def test_a_stranger_without_rays_token_is_refused_at_rays_ports(running: Running) -> None:
    """On each port, the call that belongs to it: the control store, the node's daemon, and the processes that Ray sends
    its tasks to, where it unpickles what it is sent.
    """
    refused: dict[str, int] = {}
    for port in listening():
        for method in (
            "/ray.rpc.InternalKVGcsService/InternalKVKeys",
            "/ray.rpc.NodeManagerService/GetNodeStats",
            "/ray.rpc.CoreWorkerService/PushTask",
        ):
            if stranger_hears(port, method) is grpc.StatusCode.UNAUTHENTICATED:
                refused[method] = refused.get(method, 0) + 1
    members_and_driver = 5
    assert refused["/ray.rpc.InternalKVGcsService/InternalKVKeys"] >= 1
    assert refused["/ray.rpc.NodeManagerService/GetNodeStats"] >= 1
    assert refused["/ray.rpc.CoreWorkerService/PushTask"] >= members_and_driver


def test_the_members_share_a_secret_that_the_operator_finds(running: Running) -> None:
    known = runtime_file.find(f"http://{running.endpoints.http}")
    assert known is not None
    assert known.security.secret is not None
    assert known.api_key is not None

    workers = [member(running.cluster, name).state.addresses["grpc"] for name in ("prefill-0", "decode-0")]
    stranger = pb.WorkerStatus(worker_id="stranger", epoch=1, address="127.0.0.1:1", role="prefill")

    async def knock(credentials: MemberCredentials) -> list[grpc.StatusCode]:
        codes = []
        for address in (known.registry, *workers):
            async with open_channel(address, credentials) as channel:
                try:
                    if address == known.registry:
                        await RegistryStub(channel).Heartbeat(stranger, timeout=20)
                    else:
                        await WorkerStub(channel).Status(pb.StatusRequest(), timeout=20)
                    codes.append(grpc.StatusCode.OK)
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
        return codes

    right = MemberCredentials.load(known.security)
    other = MemberCredentials.load(SecurityConfig(secret="another cluster's secret"))
    assert asyncio.run(knock(OPEN)) == [grpc.StatusCode.UNAUTHENTICATED] * 3
    assert asyncio.run(knock(other)) == [grpc.StatusCode.UNAUTHENTICATED] * 3
    ok, refused = grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION  # protocol_version 0 is nobody's
    assert asyncio.run(knock(right)) == [refused, ok, ok]


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "router-1"])
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
    if name == "router-1":
        assert new.state.addresses == old.state.addresses  # clients and workers find it where it was
    else:
        assert new.state.epoch != old.state.epoch
    wait_for("requests are served again", lambda: served(running.endpoints))
    assert complete(running.endpoints, "the same question") == before
    assert any(line.startswith(f"{name} is back after") or "was restarted" in line for line in running.reports)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_that_is_asked_to_restart_fails_no_request(running: Running, name: str) -> None:
    """The actor's process ends by itself, and Ray starts the next one; what comes meanwhile waits."""
    before, old = complete(running.endpoints, "the same question"), member(running.cluster, name)
    answers: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answers.append(complete(running.endpoints, "the same question"))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    wait_for("the load runs", lambda: len(answers) > 3)
    said: list[str] = []
    url = f"http://{running.endpoints.http}"
    try:
        assert cli_restart.restart(url, [name], every=False, timeout_s=30, say=said.append) == 0
        count = len(answers)
        wait_for("the load goes on", lambda: len(answers) > count + 3)
    finally:
        ended.set()
        for client in clients:
            client.join(60)
    assert set(answers) == {before}
    wait_for("the manager knows", lambda: member(running.cluster, name).restarts == old.restarts + 1)
    new = member(running.cluster, name)
    assert (new.state.pid != old.state.pid, new.state.epoch != old.state.epoch) == (True, True)
    asked = f"{name} was asked to restart: it finishes what it runs, and Ray starts it anew"
    wait_for("it is reported", lambda: running.reports[-1].startswith(f"{name} is back after"))
    assert running.reports[-2] == asked
    print(said, running.reports[-1])


def test_the_operators_commands_know_both_router_processes(running: Running) -> None:
    url = f"http://{running.endpoints.http}"
    known = runtime_file.find(url)
    assert known is not None
    assert known.registries == running.endpoints.registries
    answer = fetch(url)
    pids = [member(running.cluster, name).state.pid for name in ("router-0", "router-1")]
    assert [account["pid"] for account in answer["routers"]] == pids
    assert [account["registry"] for account in answer["routers"]] == list(known.registries)
    shown = render(url, answer, scrape(url))
    assert all(f"router {index} ({known.registries[index]}): ready" in shown for index in range(2))


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
    ports = [address for view in running.cluster.members() for address in view.state.addresses.values()]
    ours = descendants()
    assert {view.state.pid for view in running.cluster.members()} <= ours.keys()
    folders = set(Path("/tmp").glob(f"tandem-{os.getpid()}-*"))  # other clusters may run on this machine
    assert any(_ours(folder) for folder in folders)
    shared = shared_memory(ours)
    assert any("plasma" in path for path in shared)

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
    assert [path for path in shared if Path(path).exists()] == []
    assert running.cluster.members() == ()
    running.cluster.stop()  # idempotent


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Files in /dev/shm that these processes have open, or had before somebody removed them."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found |= {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    return {path.removesuffix(" (deleted)") for path in found if path.startswith("/dev/shm/")}


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
