"""Workers are drained and restarted, one after another, under load: no request fails, every answer is right.

The processes here are watched over by the test, which starts the next one as Ray would.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tandem.cluster import cli_restart
from tandem.cluster.cli_status import fetch
from tandem.cluster.config import EngineConfig, RouterConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
ENGINE = EngineConfig(
    model=MODEL, device="paced", kv_cache_bytes=16 * 2**20, paced_step_s=0.005, paced_prefill_token_s=0.00002
)
TOKENS = 30
CLIENTS = 4


def expected(prompt: list[int]) -> list[int]:
    config = resolve_model(MODEL).config
    return list(expected_tokens(prompt, TOKENS, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


class Watched:
    """Workers as processes; one that ends with 0 is started again, as its supervisor would."""

    def __init__(self, processes: Any, registry: str) -> None:
        self._processes = processes
        self._registry = registry
        self._roles: dict[str, Role] = {}
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._ended = threading.Event()
        self.codes: list[int] = []
        self._thread = threading.Thread(target=self._watch)

    def start(self, **counts: int) -> None:
        for role, count in counts.items():
            for index in range(count):
                self._roles[f"{role}-{index}"] = Role(role)
        for name in self._roles:
            self._spawn(name)
        self._thread.start()

    def _spawn(self, name: str) -> None:
        self._running[name] = self._processes.worker(ENGINE, self._roles[name], name, self._registry)

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            for name, process in list(self._running.items()):
                if process.poll() is not None:
                    self.codes.append(process.returncode)
                    self._spawn(name)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class Load:
    """Clients in a closed loop, each with prompts of its own; counts what they get."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ended = threading.Event()
        self.failures: list[str] = []
        self.answers = 0
        self._threads = [threading.Thread(target=self._ask, args=(index,)) for index in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, index: int) -> None:
        number = 0
        with TandemClient(self._address, timeout_s=60) as client:
            while not self._ended.is_set():
                number += 1
                prompt = [1 + (index * 7919 + number * 31 + i * i) % 200 for i in range(60 + 20 * index)]
                try:
                    tokens = client.generate(token_ids=prompt, max_tokens=TOKENS, temperature=0).collect().token_ids
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    continue
                self.answers += 1
                if tokens != expected(prompt):
                    self.failures.append(f"wrong answer to {index}/{number}")


@pytest.fixture
def router(processes: Any) -> dict[str, Any]:
    config = RouterConfig(model=MODEL, http_port=0, grpc_port=0, registry_port=0, unready_wait_s=60)
    return processes.start("router", config)[1]


@pytest.fixture
def watched(processes: Any, router: dict[str, Any]) -> Iterator[Watched]:
    started = Watched(processes, router["registry"])
    yield started
    started.close()


def epochs(url: str) -> dict[str, str]:
    return {worker["worker_id"]: worker["epoch"] for worker in fetch(url)["workers"]}


@pytest.mark.parametrize("pools", [{"prefill": 1, "decode": 1}, {"prefill": 2, "decode": 2}], ids=["1P1D", "2P2D"])
def test_every_worker_in_turn_without_a_failed_request(
    router: dict[str, Any], watched: Watched, wait: Callable[..., None], pools: dict[str, int]
) -> None:
    """With one worker of a role, requests wait for its next life."""
    url = f"http://{router['http']}"
    watched.start(**pools)
    total = sum(pools.values())
    wait(lambda: [worker["state"] for worker in fetch(url)["workers"]] == ["ready"] * total, "every worker")
    before, said = epochs(url), list[str]()
    with Load(router["grpc"]) as load:
        wait(lambda: load.answers >= CLIENTS, "the load to run")
        assert cli_restart.restart(url, (), every=True, timeout_s=30, say=said.append) == 0
        answered = load.answers
        wait(lambda: load.answers >= answered + CLIENTS, "the load to go on")
    assert load.failures == []
    assert watched.codes == [0] * total
    after = epochs(url)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert [line.split(" is back")[0] for line in said if "is back" in line] == list(before)
    assert not any(_retries(url).values()), "drained, not lost: no attempt is made twice"


def _retries(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith("tandem:request_retries_total{")]
    return {name: float(value) for name, value in found}


def test_a_request_longer_than_the_time_to_drain_goes_on_elsewhere(
    router: dict[str, Any], watched: Watched, wait: Callable[..., None]
) -> None:
    url = f"http://{router['http']}"
    watched.start(prefill=1, decode=2)
    wait(lambda: [worker["state"] for worker in fetch(url)["workers"]] == ["ready"] * 3, "every worker")
    prompt = list(range(1, 100))
    config = resolve_model(MODEL).config
    with TandemClient(router["grpc"], timeout_s=60) as client:
        tokens: list[int] = []
        for delta in client.generate(token_ids=prompt, max_tokens=380, temperature=0):
            tokens += delta.token_ids
            if len(tokens) == 5:
                wait(lambda: _decoding(url), "a heartbeat that says who decodes")
                left = _decoding(url)[0]
                assert cli_restart.restart(url, [left], every=False, timeout_s=0, say=print) == 0
            if delta.timings is not None:
                assert delta.timings.decode_worker not in ("", left)
    wanted = expected_tokens(prompt, 380, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    assert tokens == list(wanted)


def _decoding(url: str) -> list[str]:
    workers = fetch(url)["workers"]
    return [worker["worker_id"] for worker in workers if worker["role"] == "decode" and worker["running"]]


def test_who_cannot_be_restarted(router: dict[str, Any], watched: Watched, wait: Callable[..., None]) -> None:
    url = f"http://{router['http']}"
    watched.start(mixed=1)
    wait(lambda: fetch(url)["ready"], "a worker")

    def restart(*names: str, every: bool = False, timeout_s: float = 1.0) -> None:
        cli_restart.restart(url, names, every=every, timeout_s=timeout_s, say=print)

    with pytest.raises(ValueError, match=r"worker: 'decode-7' is not allowed; allowed: mixed-0"):
        restart("decode-7")
    with pytest.raises(ValueError, match=r"worker: name the workers to restart, or --all"):
        restart()
    with pytest.raises(ValueError, match=r"timeout: -1 is not allowed"):
        restart("mixed-0", timeout_s=-1.0)
    assert watched.codes == []
