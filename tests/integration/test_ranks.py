"""Workers of several ranks in a cluster: the KV of one split is handed off to another, and the answers are one rank's.

fp32, greedy, a model of random weights whose answers depend on the whole context. Every rank but a worker's own is a
process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import SLO, Role, SamplingParams
from tandem.kvtransfer.collective.commands import Send

MODEL = "dummy:tiny-llama"
ENGINE = EngineConfig(model=MODEL, dtype="float32", kernels="torch", kv_cache_bytes=4 * 2**20, max_batched_tokens=96)
OUTPUT = 12
PROMPTS = [[(7 * i + 11 * j) % 500 + 3 for j in range(length)] for i, length in enumerate((5, 31, 64, 100, 150, 233))]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What one rank answers."""
    device = CpuDevice(
        resolve_model(MODEL), dtype="float32", kernels="torch", block_size=16, kv_cache_bytes=ENGINE.kv_cache_bytes
    )
    answers = []
    for prompt in PROMPTS:
        tokens, start = list(prompt), 0
        for step in range(OUTPUT):
            sample = SampleSpec(SamplingParams(temperature=0.0), step, prompt, tokens[len(prompt) :])
            device.launch(StepPlan(step, (StepRow("s", start, tokens[start:], list(range(16)), sample),)))
            (row,) = device.collect().rows
            start = len(tokens)
            tokens.append(row.tokens[0].token_id)
        answers.append(tokens[len(prompt) :])
    device.close()
    return answers


def ask(cluster: Any, transport: str) -> list[list[int]]:
    """All prompts at once; each takes the split, and its KV the transport that both demand."""

    def one(prompt: list[int]) -> list[int]:
        answer = cluster.grpc.generate(token_ids=prompt, max_tokens=OUTPUT, temperature=0, ignore_eos=True).collect()
        assert answer.timings.path == "split"
        assert transport == "auto" or answer.timings.transport == transport
        return list(answer.token_ids)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS))


def kill_while_it_sends(cluster: Any, holder: Any, wait: Callable[..., None]) -> list[list[int]]:
    """kill -9 of a rank that has been told to send KV: its worker goes at once, and the next one answers in its
    place.
    """
    ranks = holder.runtime._ranks._ranks
    pid = holder.runtime.shell.engine._device._forward.pids[0]
    say = ranks.say

    def kill(rank: int, command: object) -> None:
        say(rank, command)
        if isinstance(command, Send):
            ranks.say = say  # once: the number may be another process's then
            os.kill(pid, signal.SIGKILL)

    ranks.say = kill
    with ThreadPoolExecutor(1) as beside:
        answers = beside.submit(ask, cluster, "gloo")
        wait(lambda: not holder.healthy(), "the worker to have gone with its rank")
        assert "rank 1" in str(holder.runtime.shell.failure)
        cluster.add(Role.PREFILL)
        return answers.result()


@pytest.mark.parametrize(
    ("prefill", "decode", "transport"),
    [
        ({"tensor_parallel": 2}, {"block_size": 32}, "auto"),
        ({"tensor_parallel": 2}, {"block_size": 32}, "gloo"),
        ({"pipeline_stages": 2}, {"tensor_parallel": 2}, "auto"),
        ({"pipeline_stages": 2}, {"tensor_parallel": 2}, "gloo"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k} {v}" for k, v in value.items()),
)
def test_answers_are_those_of_one_worker(
    start_cluster: Callable[..., Any],
    wait: Callable[..., None],
    alone: list[list[int]],
    prefill: dict[str, int],
    decode: dict[str, int],
    transport: str,
) -> None:
    router = RouterConfig(slo=SLO(ttft_s=60.0, tpot_s=10.0), unready_wait_s=20)
    worker = WorkerConfig(worker_id="template", role=Role.MIXED, transport=transport)
    cluster = start_cluster(ENGINE, router=router, worker=worker)
    holder = cluster.add(Role.PREFILL, **prefill)
    cluster.add(Role.DECODE, **decode)
    cluster.wait_ready()
    assert ask(cluster, transport) == alone
    assert ask(cluster, transport) == alone  # with prefixes in both caches
    cluster.wait_clean()
    if transport == "gloo":
        assert kill_while_it_sends(cluster, holder, wait) == alone
        return
    os.kill(holder.runtime.shell.engine._device._forward.pids[0], signal.SIGKILL)
    wait(lambda: not holder.healthy(), "the worker to have gone with its rank")
    assert "rank 1" in str(holder.runtime.shell.failure)
