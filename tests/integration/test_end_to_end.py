"""The real model through real processes: router, prefill, decode and mixed workers, HTTP and gRPC, fp32 and greedy.

What the split answers must be what a mixed worker and transformers answer, token for token, except where the two most
likely tokens tie within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import openai
import pytest
import torch
from tandem.cluster.config import EngineConfig, RouterConfig
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.proto import tandem_v1_pb2 as pb
from tandem.cluster.proto import tandem_v1_pb2_grpc as pb_grpc
from tandem.cluster.types import SLO, Role
from tandem.router.client import TandemClient
from tandem.router.tokenizer import load_tokenizer

MODEL = "smollm2-135m"
ENGINE = EngineConfig(model=MODEL, dtype="float32", kv_cache_bytes=384 * 2**20, max_batched_tokens=256)
TIE = 1e-3
"""Two logits closer than this tie: fp32 sums of another order differ by about 1e-4 on this model."""


@dataclass(frozen=True)
class Served:
    """Two clusters on one model: split, and mixed."""

    http: str
    grpc: str
    mixed_grpc: str
    registry_http: tuple[str, str]


@pytest.fixture(scope="module")
def served(smollm2: ModelFiles, module_processes: Any, module_wait: Callable[..., None]) -> Served:
    # The oracle's machine is slow: a promise that was broken would be a refusal.
    slo = SLO(ttft_s=60.0, tpot_s=10.0)
    config = RouterConfig(model=MODEL, http_port=0, grpc_port=0, registry_port=0, unready_wait_s=60, slo=slo)
    _, split = module_processes.start("router", config)
    _, mixed = module_processes.start("router", config)
    module_processes.worker(ENGINE, Role.PREFILL, "prefill-0", split["registry"])
    module_processes.worker(ENGINE, Role.DECODE, "decode-0", split["registry"])
    module_processes.worker(ENGINE, Role.MIXED, "mixed-0", mixed["registry"])
    for router in (split, mixed):
        ready = f"http://{router['http']}/ready"
        module_wait(lambda ready=ready: httpx.get(ready, trust_env=False).status_code == 200, "the cluster to be ready")
    return Served(split["http"], split["grpc"], mixed["grpc"], (split["http"], mixed["http"]))


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with httpx.Client(trust_env=False, timeout=120) as http_client:
        yield openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="none", http_client=http_client, max_retries=0)


def test_the_openai_client_works_unchanged(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    answer = whole.choices[0].message.content
    assert answer is not None
    assert "Paris" in answer
    assert whole.usage is not None
    pieces = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(pieces)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == answer
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs_come_through_the_split(client: openai.OpenAI) -> None:
    """PEERS: trouble 10. The first token's come from the prefill worker, the rest from the decode worker."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    assert content is not None
    assert answer.usage is not None
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-6)
        assert entry.logprob <= 0


def test_a_generated_grpc_client_gets_the_whole_story(served: Served) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        stub = pb_grpc.TandemStub(channel)
        assert [model.id for model in stub.ListModels(pb.ListModelsRequest(), timeout=10).models] == [MODEL]
        request = pb.GenerateRequest(model=MODEL, text="def fibonacci(n):")
        request.sampling.max_tokens = 10
        request.sampling.temperature = 0
        responses = list(stub.Generate(request, timeout=120))
    tokens = [token for response in responses for token in response.token_ids]
    last = next(response for response in responses if response.finish_reason)
    assert len(tokens) == 10
    assert last.timings.path == "split"
    assert last.timings.transferred_bytes > 0
    assert 0 < last.timings.ttft_s <= last.timings.e2e_s
    assert responses[-1].usage.completion_tokens == 10


def test_32_requests_of_all_kinds_at_once(client: openai.OpenAI, served: Served, real_prompts: list[str]) -> None:
    """Each asked twice at once with everything else: seeded and greedy answers do not depend on their company."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 11, "top_p": 0.9},
        {"temperature": 1.0, "seed": 12, "extra_body": {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2}},
        {"temperature": 0, "frequency_penalty": 0.8, "presence_penalty": 0.4, "stop": ["\n\n"]},
        {"temperature": 0.7, "seed": 13, "n": 2},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.9, "seed": 14, "logit_bias": {"28": -100}},
        {"temperature": 0, "extra_body": {"min_tokens": 6, "ignore_eos": True}},
    ]

    def ask(i: int) -> list[tuple[str, str | None]]:
        # Requests i and i + 16 are the same.
        case = i % 16
        answer = client.completions.create(
            model=MODEL, prompt=real_prompts[case][:400], max_tokens=8 + case, **kinds[case % len(kinds)]
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= (8 + case) * len(answer.choices)
        return [(choice.text, choice.finish_reason) for choice in answer.choices]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert answers[:16] == answers[16:]
    assert all(reason in ("stop", "length") for answer in answers for _, reason in answer)


def test_the_split_the_mixed_worker_and_transformers_agree(
    served: Served, smollm2: ModelFiles, oracle: Any, real_prompts: list[str]
) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompts = [tokenizer.encode(prompt, add_special=True)[:120] for prompt in real_prompts[::2]]

    def ask(address: str) -> list[list[int]]:
        with TandemClient(address) as client, ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: _greedy(client, prompt), prompts))

    split, mixed = ask(served.grpc), ask(served.mixed_grpc)
    ties = sum(_check_greedy(oracle, prompt, tokens) for prompt, tokens in zip(prompts, split, strict=True))
    assert ties <= 2, "so many ties are not rounding"
    if split != mixed:
        for prompt, tokens in zip(prompts, mixed, strict=True):
            _check_greedy(oracle, prompt, tokens)


def _greedy(client: TandemClient, prompt: list[int]) -> list[int]:
    return client.generate(token_ids=prompt, max_tokens=24, temperature=0, ignore_eos=True).collect().token_ids


def _check_greedy(oracle: Any, prompt: list[int], tokens: list[int]) -> int:
    """Every token is transformers' most likely one behind those before it, or ties with it; returns how many tie."""
    assert len(tokens) == 24
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    best = logits.argmax(-1).tolist()
    ties = 0
    for place, (token, expected) in enumerate(zip(tokens, best, strict=True)):
        gap = float(logits[place, expected] - logits[place, token])
        assert gap < TIE, f"token {place} is {token}, transformers says {expected}, {gap:.5f} above"
        ties += token != expected
    return ties


def test_nothing_is_left_behind(served: Served, module_wait: Callable[..., None]) -> None:
    """After all of the above: no block held, no lease, no credit, no stream, on any worker."""

    def clean(address: str, count: int) -> bool:
        workers = httpx.get(f"http://{address}/ready", trust_env=False).json()["workers"]
        return len(workers) == count and all(
            worker["num_blocks"] == worker["free_blocks"] + worker["cached_blocks"]
            and not any(worker[name] for name in ("leases", "credited_blocks", "pulls", "running", "waiting", "held"))
            for worker in workers
        )

    for address, count in zip(served.registry_http, (2, 1), strict=True):
        module_wait(lambda address=address, count=count: clean(address, count), "every worker to be clean")
