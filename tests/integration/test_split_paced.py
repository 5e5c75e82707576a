"""The split end to end over real sockets, on the paced device: what each path answers, what each way out leaves.

The paced device's tokens depend on every KV slot of the context, so an answer that is right proves the handoff.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.engine.devices.paced import PacedDevice
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role, SamplingParams
from tandem.router.client import Answer

MODEL = "dummy:tiny-llama"
PROMPT = list(range(40, 40 + 100))
Start = Callable[..., Any]
Paced = Callable[..., EngineConfig]


def expected(prompt: list[int], n: int, **sampling: Any) -> list[int]:
    config = resolve_model(MODEL).config
    params = SamplingParams(max_tokens=n, **({"temperature": 0.0} | sampling))
    return list(expected_tokens(prompt, n, params, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


def test_a_split_request_moves_its_kv_and_answers_right(start_split: Start, paced: Paced) -> None:
    cluster = start_split(paced())
    answer = cluster.grpc.generate(token_ids=PROMPT, max_tokens=12, temperature=0).collect()
    assert answer.token_ids == expected(PROMPT, 12)
    assert answer.finish_reason == "length"
    assert (answer.timings.path, answer.timings.prefill_worker, answer.timings.decode_worker) == (
        "split",
        "prefill-0",
        "decode-0",
    )
    layout_bytes = cluster.workers["decode-0"].runtime.shell.engine._device.kv.layout.block_bytes
    assert answer.timings.transferred_bytes == -(-len(PROMPT) // 16) * layout_bytes
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == 12
    cluster.wait_clean()


def test_a_prefix_hit_is_neither_computed_nor_transferred_again(start_split: Start, paced: Paced) -> None:
    cluster = start_split(paced())
    first = cluster.grpc.generate(token_ids=PROMPT, max_tokens=4, temperature=0).collect()
    again = cluster.grpc.generate(token_ids=PROMPT, max_tokens=4, temperature=0).collect()
    assert again.token_ids == first.token_ids == expected(PROMPT, 4)
    assert again.usage.cached_tokens == 96
    assert again.timings.transferred_bytes < first.timings.transferred_bytes
    cluster.wait_clean()


@pytest.mark.parametrize(
    ("roles", "threshold", "max_tokens", "path"),
    [
        ((Role.PREFILL, Role.DECODE), 0, 5, "split"),
        ((Role.PREFILL, Role.DECODE), 1000, 5, "local"),
        ((Role.PREFILL, Role.DECODE), 0, 1, "prefill_only"),
        ((Role.MIXED,), 0, 5, "mixed"),
    ],
)
def test_every_path_gives_the_same_tokens_and_is_counted(
    start_cluster: Start, paced: Paced, roles: tuple[Role, ...], threshold: int, max_tokens: int, path: str
) -> None:
    cluster = start_cluster(paced(), router=RouterConfig(local_prefill_threshold_tokens=threshold))
    for role in roles:
        cluster.add(role)
    cluster.wait_ready()
    answer = cluster.grpc.generate(token_ids=PROMPT, max_tokens=max_tokens, temperature=0).collect()
    assert answer.token_ids == expected(PROMPT, max_tokens)
    assert answer.timings.path == path
    assert (
        f'tandem:choices_by_path_total{{model_name="{MODEL}",path="{path}"}} 1.0' in cluster.http.get("/metrics").text
    )
    cluster.wait_clean()


def test_choices_are_independent_and_share_the_prompt(start_split: Start, paced: Paced) -> None:
    cluster = start_split(paced())
    answers = cluster.grpc.generate(token_ids=PROMPT, max_tokens=6, temperature=0.9, seed=7, n=3).collect_all()
    assert [answer.choice for answer in answers] == [0, 1, 2]
    for answer in answers:
        assert answer.token_ids == expected(PROMPT, 6, temperature=0.9, seed=7, choice=answer.choice)
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert answers[0].usage.prompt_tokens == len(PROMPT)
    cluster.wait_clean()


def test_many_requests_at_once(start_split: Start, paced: Paced) -> None:
    cluster = start_split(paced(kv_cache_bytes=2 * 2**20, max_batched_tokens=128))
    prompts = [[60 + i, *range(i, 20 + 5 * i)] for i in range(32)]

    def ask(i: int) -> list[int]:
        return cluster.grpc.generate(token_ids=prompts[i], max_tokens=3 + i, temperature=0).collect().token_ids

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert answers == [expected(prompts[i], 3 + i) for i in range(32)]
    cluster.wait_clean()


def test_two_workers_of_each_role_share_the_work(start_cluster: Start, paced: Paced) -> None:
    cluster = start_cluster(paced(paced_step_s=0.01))
    for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE):
        cluster.add(role)
    cluster.wait_ready()

    def ask(i: int) -> tuple[list[int], str, str]:
        answer = cluster.grpc.generate(token_ids=[i, *PROMPT], max_tokens=8, temperature=0).collect()
        return answer.token_ids, answer.timings.prefill_worker, answer.timings.decode_worker

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert [tokens for tokens, _, _ in answers] == [expected([i, *PROMPT], 8) for i in range(16)]
    assert {prefill for _, prefill, _ in answers} == {"prefill-0", "prefill-1"}
    assert {decode for _, _, decode in answers} == {"decode-0", "decode-1"}
    cluster.wait_clean()


def test_a_prompt_beyond_the_kv_memory_is_refused_with_both_numbers(start_split: Start, paced: Paced) -> None:
    cluster = start_split(paced(kv_cache_bytes=2**20))
    limit = cluster.status("decode-0").max_model_len
    prompt = [5] * (limit + 1)
    answer = cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 4})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(limit) in error["message"]
    assert str(limit + 1) in error["message"]
    cluster.wait_clean()


# Cancelling at every stage. Each stage is held open by the pace of a device or by a full pool, seen, and then left.


STAGES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Any], bool]]] = {
    # stage: (prefill engine, decode engine, how it is seen)
    "prefill computes": (
        {"paced_prefill_token_s": 0.02, "max_batched_tokens": 64},
        {},
        lambda c: c.status("prefill-0").queued_prefill_tokens > 0 and c.status("decode-0").pulls > 0,
    ),
    "decode waits for its first step": (
        {},
        {"paced_step_s": 0.5},
        lambda c: c.status("prefill-0").leases > 0,
    ),
    "decode streams": (
        {},
        {"paced_step_s": 0.02},
        lambda c: c.status("decode-0").context_tokens > len(PROMPT) + 2,
    ),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("door", ["http", "grpc"])
def test_cancelling_at_every_stage_leaves_nothing(
    start_cluster: Start, paced: Paced, stage: str, door: str, wait: Start
) -> None:
    prefill, decode, seen = STAGES[stage]
    cluster = start_cluster(paced())
    cluster.add(Role.PREFILL, **prefill)
    cluster.add(Role.DECODE, **decode)
    cluster.wait_ready()
    leave = threading.Event()
    thread = threading.Thread(target=_ask_and_leave, args=(cluster, door, leave))
    thread.start()
    wait(lambda: seen(cluster), f"the stage '{stage}'")
    leave.set()
    cluster.wait_clean()
    thread.join(30)
    again = cluster.grpc.generate(token_ids=[9, 9, 9], max_tokens=2, temperature=0).collect()
    assert again.token_ids == expected([9, 9, 9], 2)


def _ask_and_leave(cluster: Any, door: str, leave: threading.Event) -> None:
    """Sends a long request and closes the connection when told to."""
    if door == "grpc":
        generation = cluster.grpc.generate(token_ids=PROMPT, max_tokens=300, temperature=0)
        threading.Thread(target=lambda: (leave.wait(30), generation.cancel()), daemon=True).start()
        with pytest.raises(Exception, match="CANCELLED"):
            generation.collect()
        return
    # A plain socket: closing an HTTP client from another thread leaves its connection open until its next read.
    body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 300, "temperature": 0, "stream": True}).encode()
    host, port = cluster.router.http_address.split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        assert leave.wait(30)


def test_a_request_whose_time_runs_out_is_ended_on_both_sides(start_cluster: Start, paced: Paced) -> None:
    cluster = start_cluster(paced())
    cluster.add(Role.PREFILL)
    cluster.add(Role.DECODE, paced_step_s=0.05)
    cluster.wait_ready()
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 300}
    answer = cluster.http.post("/v1/completions", json=body, headers={"x-request-timeout-s": "0.5"})
    assert answer.status_code == 504
    cluster.wait_clean()


def test_a_full_router_refuses_with_429_and_keeps_what_it_admitted(start_cluster: Start, paced: Paced) -> None:
    cluster = start_cluster(paced(), router=RouterConfig(max_waiting=2))
    cluster.add(Role.PREFILL, paced_prefill_token_s=0.005)
    cluster.add(Role.DECODE)
    cluster.wait_ready()

    def ask(i: int) -> httpx.Response:
        body = {"model": MODEL, "prompt": [i, *PROMPT], "max_tokens": 2}
        return cluster.http.post("/v1/completions", json=body)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) >= 2
    assert codes.count(429) >= 1
    assert set(codes) == {200, 429}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
    cluster.wait_clean()


def test_no_worker_is_an_error_not_a_wait_for_ever(start_cluster: Start, paced: Paced) -> None:
    cluster = start_cluster(paced(), router=RouterConfig(unready_wait_s=0.2))
    assert cluster.http.get("/health").status_code == 200
    assert cluster.http.get("/ready").status_code == 503
    answer = cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "max_tokens": 2})
    assert answer.status_code == 503


def test_workers_whose_kv_differs_are_never_paired(
    start_cluster: Start, paced: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = start_cluster(paced(), router=RouterConfig(unready_wait_s=0.2))
    cluster.add(Role.PREFILL)
    make = PacedDevice.for_model

    def other_weights(*args: object, **fields: object) -> PacedDevice:
        device = make(*args, **fields)  # type: ignore[arg-type]
        device.fingerprint = "of other weights"
        return device

    monkeypatch.setattr(PacedDevice, "for_model", other_weights)
    cluster.add(Role.DECODE)
    answer = cluster.http.get("/ready")
    assert answer.status_code == 503


@pytest.mark.parametrize(("prefill", "decode"), [(16, 32), (64, 16), (48, 32)])
def test_block_sizes_may_differ(start_cluster: Start, paced: Paced, prefill: int, decode: int) -> None:
    """Whole blocks, blocks in part, a prefix that the decode worker has, prompts of less than a block."""
    cluster = start_cluster(paced(max_batched_tokens=100))
    cluster.add(Role.PREFILL, block_size=prefill)
    cluster.add(Role.DECODE, block_size=decode)
    cluster.wait_ready()
    for length in (1, 15, 32, 97, 160, 230):
        prompt = list(range(50, 50 + length))
        answer = cluster.grpc.generate(token_ids=prompt, max_tokens=20, temperature=0).collect()
        assert answer.token_ids == expected(prompt, 20)
        assert answer.timings is not None
        assert answer.timings.path == "split"
        assert answer.timings.transport == "grpc"
    cluster.wait_clean()


def test_kv_that_waits_in_the_prefill_worker_is_pulled_when_blocks_come_free(
    start_cluster: Start, paced: Paced, wait: Start
) -> None:
    """DistServe §4.3: the prefill worker's memory is the buffer for bursts."""
    cluster = start_cluster(paced(), worker=WorkerConfig(worker_id="t", role=Role.MIXED, credit_factor=4.0))
    cluster.add(Role.PREFILL)
    cluster.add(Role.DECODE, kv_cache_bytes=2**17, paced_step_s=0.005)
    cluster.wait_ready()
    room_tokens = cluster.status("decode-0").num_blocks * 16
    length = room_tokens // 2 - 40  # two at a time
    assert 40 < length < cluster.status("decode-0").max_model_len - 30

    def ask(i: int) -> Answer:
        return cluster.grpc.generate(token_ids=[i + 1] * length, max_tokens=30, temperature=0).collect()

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(ask, i) for i in range(6)]
        wait(lambda: cluster.status("prefill-0").leases >= 2, "KV to wait in the prefill worker")
        answers = [future.result() for future in futures]
    assert [answer.token_ids for answer in answers] == [expected([i + 1] * length, 30) for i in range(6)]
    waits_s = sorted(answer.timings.decode_queue_s for answer in answers if answer.timings is not None)
    assert len(waits_s) == 6
    assert waits_s[-1] >= 29 * 0.005 > waits_s[0], "the last waited for a whole answer, and its timings say so"
    cluster.wait_clean()


def test_a_worker_shows_its_own_metrics(start_cluster: Start, paced: Paced) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = WorkerConfig(worker_id="t", role=Role.MIXED, metrics_port=port)
    cluster = start_cluster(paced(), worker=worker)
    cluster.add(Role.MIXED)
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    blocks = cluster.status("mixed-0").num_blocks
    assert f'tandem:kv_blocks_free{{role="mixed",worker="mixed-0"}} {float(blocks)}' in text
    cluster.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
