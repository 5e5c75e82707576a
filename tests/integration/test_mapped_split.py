"""Real processes of one host: KV through mapped memory, chosen by itself or demanded, and over gRPC where told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
PROMPT = list(range(40, 40 + 100))


class Pair:
    """A router, a prefill and a decode worker, each a process."""

    def __init__(self, processes: Any, engine: EngineConfig, prefill: str, decode: str) -> None:
        self._processes = processes
        config = RouterConfig(model=MODEL, http_port=0, grpc_port=0, registry_port=0, unready_wait_s=20)
        self.where = processes.start("router", config)[1]
        base = WorkerConfig(worker_id="w", role=Role.MIXED, engine=engine, routers=(self.where["registry"],))
        self.prefill = replace(base, worker_id="p0", role=Role.PREFILL, transport=prefill)
        self.holder = processes.start("worker", self.prefill)[0]
        self.reader = processes.start("worker", replace(base, worker_id="d0", role=Role.DECODE, transport=decode))[0]

    def restart_holder(self) -> None:
        self.holder.send_signal(signal.SIGKILL)
        self.holder.wait(10)
        self.holder = self._processes.start("worker", self.prefill)[0]

    def ask(self, first_token: int = PROMPT[0], n: int = 8) -> Any:
        with TandemClient(self.where["grpc"]) as client:
            prompt = [first_token, *PROMPT[1:]]
            answer = client.generate(token_ids=prompt, max_tokens=n, temperature=0).collect()
        config = resolve_model(MODEL).config
        expected = expected_tokens(prompt, n, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        assert answer.token_ids == list(expected)
        assert answer.timings.path == "split"
        return answer

    def metrics(self) -> str:
        return httpx.get(f"http://{self.where['http']}/metrics", trust_env=False).text


@pytest.mark.parametrize(
    ("prefill", "decode", "came"),
    [("auto", "auto", "mapped"), ("auto", "mapped", "mapped"), ("auto", "grpc", "grpc"), ("grpc", "auto", "grpc")],
)
def test_how_the_kv_came_is_said_and_the_answer_is_right(
    processes: Any, wait: Callable[..., None], paced: Callable[..., EngineConfig], prefill: str, decode: str, came: str
) -> None:
    pair = Pair(processes, paced(), prefill, decode)
    answer = pair.ask()
    assert answer.timings.transport == came
    assert answer.timings.transferred_bytes > 0
    counted = f'tandem:kv_pulls_total{{role="decode",transport="{came}",worker="d0"}} 1.0'
    wait(lambda: counted in pair.metrics(), counted)


def test_demanded_memory_that_cannot_be_had_is_a_clear_refusal(
    processes: Any, wait: Callable[..., None], paced: Callable[..., EngineConfig]
) -> None:
    pair = Pair(processes, paced(), "grpc", "mapped")
    with pytest.raises(Exception, match="transport 'mapped' is demanded") as failed:
        pair.ask()
    assert "p0" in str(failed.value)
    counted = 'tandem:worker_handoff_failures_total{reason="transport_mismatch",role="decode",worker="d0"} 1.0'
    wait(lambda: counted in pair.metrics(), counted)


def test_the_memory_of_dead_holders_is_not_kept(
    processes: Any, wait: Callable[..., None], paced: Callable[..., EngineConfig]
) -> None:
    pair = Pair(processes, paced(), "auto", "auto")

    def mappings() -> list[str]:
        with open(f"/proc/{pair.reader.pid}/maps") as lines:
            return [line for line in lines if "memfd:tandem-kv" in line]

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pair.reader.pid}/fd"))

    assert pair.ask().timings.transport == "mapped"
    assert len(mappings()) == 2, "its own and the holder's"
    before = descriptors()
    for life in range(3):
        pair.restart_holder()
        wait(lambda: len(mappings()) == 1, "the dead holder's memory to be dropped")
        assert pair.ask(first_token=500 + life).timings.transport == "mapped"
        assert len(mappings()) == 2
    wait(lambda: descriptors() <= before, lambda: f"{descriptors()} descriptors to be {before} again")
