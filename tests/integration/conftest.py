"""A whole cluster inside the test's process, with real sockets, real queues and the device that a test asks for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from owned import owned
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig, to_dict
from tandem.cluster.launch.members import RouterMember, WorkerMember
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import SLO, Role
from tandem.cluster.workload.prompts import PROMPTS
from tandem.router.client import TandemClient

sys.path.insert(0, str(Path(__file__).parent))  # for `mapped_ends`

WAIT_S = 30.0


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str], timeout_s: float = WAIT_S) -> None:
    """Polls until `condition()`; fails, saying what was waited for."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"waited {timeout_s:g} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.005)


class LocalCluster:
    """One router and its workers; `close` ends all of them."""

    def __init__(self, engine: EngineConfig, *, router: RouterConfig, worker: WorkerConfig) -> None:
        self.engine = engine
        self._worker = worker
        self.router = RouterMember(replace(router, model=engine.model, http_port=0, grpc_port=0, registry_port=0))
        self.router.start(60)
        self.registries = [self.router.registry_address]
        """Of the routers that workers added from now on serve: a test may have more of them."""
        self.workers: dict[str, WorkerMember] = {}
        self.http = httpx.Client(base_url=f"http://{self.router.http_address}", timeout=60, trust_env=False)
        self.grpc = TandemClient(self.router.grpc_address)

    def add(self, role: Role, name: str | None = None, **engine: object) -> WorkerMember:
        """Starts one more worker; keyword arguments replace fields of its engine's config."""
        worker_id = name or f"{role}-{sum(1 for w in self.workers if w.startswith(role))}"
        config = replace(
            self._worker,
            worker_id=worker_id,
            role=role,
            engine=replace(self.engine, **engine),
            routers=tuple(self.registries),
        )
        member = WorkerMember(config)
        self.workers[worker_id] = member
        member.start(120)
        return member

    def status(self, worker_id: str) -> pb.WorkerStatus:
        """What the worker says of itself now, not at its last heartbeat."""
        shell = self.workers[worker_id].runtime.shell
        assert shell is not None
        return shell.status()

    def wait_ready(self) -> None:
        """Returns when a request could be served and every worker is known."""

        def ready() -> bool:
            answer = self.http.get("/ready")
            states = [worker["state"] for worker in answer.json()["workers"]]
            return answer.status_code == 200 and states.count("ready") == len(self.workers)

        wait_until(ready, "the cluster to be ready")

    def wait_clean(self) -> None:
        """Returns when nothing of any request is left on any worker; fails, naming what is, if that does not come."""
        for worker_id in self.workers:
            wait_until(
                lambda worker_id=worker_id: not self.leftovers(worker_id),
                lambda worker_id=worker_id: f"{worker_id} to be clean; left: {self.leftovers(worker_id)}",
            )
            self.check_integrity(worker_id)

    def leftovers(self, worker_id: str) -> dict[str, int]:
        """Blocks, leases, credits, pulls, sequences and streams that somebody still owns."""
        return owned(self.status(worker_id))

    def check_integrity(self, worker_id: str) -> None:
        """Proves the ledger on the engine's own thread."""
        shell = self.workers[worker_id].runtime.shell
        assert shell is not None
        shell.engine.submit(lambda scheduler: scheduler.check_integrity()).result(30)

    def close(self) -> None:
        """Ends everything; idempotent."""
        self.http.close()
        self.grpc.close()
        for worker in self.workers.values():
            worker.stop()
        self.router.stop()


class Processes:
    """Starts members and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.running: list[subprocess.Popen[str]] = []

    def start(self, kind: str, config: RouterConfig | WorkerConfig) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """Starts a member and returns it with the addresses it printed when it served."""
        path = self._folder / f"{kind}-{len(self.running)}.json"
        path.write_text(json.dumps(to_dict(config)))
        command = [sys.executable, "-m", "tandem.cluster.launch.process", kind, "--config", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=self._folder)
        self.running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the {kind} ended with {process.wait(10)} before it served"
        return process, json.loads(line)

    def worker(
        self, engine: EngineConfig, role: Role, name: str, registry: str, **fields: Any
    ) -> subprocess.Popen[str]:
        """Starts a worker; keyword arguments replace fields of its engine's config."""
        config = WorkerConfig(worker_id=name, role=role, engine=replace(engine, **fields), routers=(registry,))
        return self.start("worker", config)[0]

    def close(self) -> None:
        """Kills what still runs."""
        for process in self.running:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(tmp_path)
    yield started
    started.close()


@pytest.fixture
def start_cluster() -> Iterator[Callable[..., LocalCluster]]:
    """Starts clusters that end with the test: `start_cluster(engine, router=…, worker=…)`."""
    clusters: list[LocalCluster] = []

    def start(
        engine: EngineConfig, *, router: RouterConfig | None = None, worker: WorkerConfig | None = None
    ) -> LocalCluster:
        cluster = LocalCluster(
            engine,
            router=router or RouterConfig(slo=SLO(ttft_s=60.0, tpot_s=10.0)),  # a busy machine breaks none
            worker=worker or WorkerConfig(worker_id="template", role=Role.MIXED),
        )
        clusters.append(cluster)
        return cluster

    yield start
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def start_split(start_cluster: Callable[..., LocalCluster]) -> Callable[..., LocalCluster]:
    """Starts a cluster of one prefill and one decode worker and waits until it is ready."""

    def start(engine: EngineConfig, **configs: object) -> LocalCluster:
        cluster = start_cluster(engine, **configs)
        cluster.add(Role.PREFILL)
        cluster.add(Role.DECODE)
        cluster.wait_ready()
        return cluster

    return start


@pytest.fixture
def paced() -> Callable[..., EngineConfig]:
    """An engine that computes nothing: `paced(paced_prefill_token_s=0.01)`."""

    def make(**fields: object) -> EngineConfig:
        defaults: dict[str, object] = {
            "model": "dummy:tiny-llama",
            "device": "paced",
            "kv_cache_bytes": 16 * 2**20,
            "paced_step_s": 0.001,
            "paced_prefill_token_s": 0.00001,
            "paced_decode_row_s": 0.0,
        }
        return EngineConfig(**(defaults | fields))  # type: ignore[arg-type]

    return make


@pytest.fixture
def real_prompts() -> list[str]:
    """Twenty real prompts: prose, code, numbers, short and long."""
    assert len(PROMPTS) >= 20
    return list(PROMPTS[:20])


@pytest.fixture
def wait() -> Callable[..., None]:
    """`wait(condition, "what for")`: polls, bounded."""
    return wait_until


@pytest.fixture(scope="module")
def module_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Like `processes`, for the tests of a whole module."""
    started = Processes(tmp_path_factory.mktemp("members"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def module_wait() -> Callable[..., None]:
    """Like `wait`, for fixtures of a module."""
    return wait_until


def without_vocabulary(files: ModelFiles, path: Path) -> None:
    """The model's architecture and tensors, as stored, in a file of their own: transformers would parse the vocabulary
    twice, for half a minute, to load weights.
    """
    import gguf as ggml
    import numpy as np
    from tandem.cluster.models.gguf import open_gguf

    assert files.path is not None
    file, prefix = open_gguf(files.path), "llama."
    writer = ggml.GGUFWriter(path, "llama")
    for key, value in file.metadata.items():
        if key.startswith(prefix):
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, tensor in file.tensors.items():
        stored = np.asarray(file.raw(name)).reshape(*tensor.shape[:-1], -1)
        if tensor.type == ggml.GGMLQuantizationType.F32:
            writer.add_tensor(name, stored.view(np.float32))
        else:
            writer.add_tensor(name, stored, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def oracle(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2 in transformers, fp32: what its weights say, read by other people's code."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("gguf")
    without_vocabulary(smollm2, folder / "model.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def module_split() -> Iterator[LocalCluster]:
    """One prefill and one decode worker on the paced device, for the tests of a whole module; its model is `tiny`."""
    engine = EngineConfig(
        model="dummy:tiny-llama",
        device="paced",
        kv_cache_bytes=16 * 2**20,
        paced_step_s=0.001,
        paced_prefill_token_s=0.00001,
        paced_decode_row_s=0.0,
    )
    router = RouterConfig(served_model_name="tiny", max_body_bytes=2**16, max_choices=4)
    cluster = LocalCluster(engine, router=router, worker=WorkerConfig(worker_id="template", role=Role.MIXED))
    try:
        cluster.add(Role.PREFILL)
        cluster.add(Role.DECODE)
        cluster.wait_ready()
        yield cluster
    finally:
        cluster.close()
