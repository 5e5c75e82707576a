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
from tandem.cluster.config import EngineConfig, RouterConfig
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import SLO, Role, SamplingParams

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


def ask(cluster: Any) -> list[list[int]]:
    """All prompts at once; each takes the split."""

    def one(prompt: list[int]) -> list[int]:
        answer = cluster.grpc.generate(token_ids=prompt, max_tokens=OUTPUT, temperature=0, ignore_eos=True).collect()
        assert answer.timings.path == "split"
        return list(answer.token_ids)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(one, PROMPTS))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"tensor_parallel": 2}, {"block_size": 32}),
        ({"pipeline_stages": 2}, {"tensor_parallel": 2}),
    ],
    ids=["TP 2 to one rank with blocks of 32", "PP 2 to TP 2"],
)
def test_answers_are_those_of_one_worker(
    start_cluster: Callable[..., Any],
    wait: Callable[..., None],
    alone: list[list[int]],
    prefill: dict[str, int],
    decode: dict[str, int],
) -> None:
    router = RouterConfig(slo=SLO(ttft_s=60.0, tpot_s=10.0), unready_wait_s=20)
    cluster = start_cluster(ENGINE, router=router)
    holder = cluster.add(Role.PREFILL, **prefill)
    cluster.add(Role.DECODE, **decode)
    cluster.wait_ready()
    assert ask(cluster) == alone
    assert ask(cluster) == alone  # with prefixes in both caches
    cluster.wait_clean()
    os.kill(holder.runtime.shell.engine._device._forward.pids[0], signal.SIGKILL)
    wait(lambda: not holder.healthy(), "the worker to have gone with its rank")
    assert "rank 1" in str(holder.runtime.shell.failure)
