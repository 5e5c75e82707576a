"""The ten troubles, six to ten: see `test_troubles.py`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import grpc
import pytest
from asked import MODEL, Asked, expected
from kv_proxy import What
from members import WAIT_S
from scenes import Rig, opened
from tandem.cluster.bench.client import Target, send
from tandem.cluster.types import Role
from tandem.cluster.workload.datasets import BenchRequest
from tandem.router.client import TandemError
from whole_cluster import Cluster, prompts, wait_until

PROMPT = list(range(40, 140))


# --- 6 ----------------------------------------------------------------------------------------------------------------


def test_trouble_6_workers_that_cannot_exchange_kv_are_never_paired(start: Callable[..., Cluster]) -> None:
    """6: a mismatch accepted at start fails per request (vllm#42895, sglang#15674). Not ready, and it says why; with
    one that fits, requests go there, whatever its block size.
    """
    cluster = start(unready_wait_s=0.3)
    cluster.add(Role.PREFILL, "p0", model="dummy:opt-125m", kv_cache_bytes=2**25)
    decode = cluster.add(Role.DECODE, "d0", block_size=32)
    cluster.wait_ready()
    answer = cluster.http.get("/ready")
    assert answer.status_code == 503
    assert "layout" in answer.text
    with pytest.raises(TandemError) as refused:
        cluster.ask(PROMPT, 4)
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    assert "layout" in refused.value.message
    cluster.add(Role.PREFILL, "p1", block_size=16)
    cluster.wait_ready()
    for prompt in prompts(4, 70):
        answered = cluster.ask(prompt, 4)
        assert answered.token_ids == expected(prompt, 4)
        assert answered.timings is not None
        assert answered.timings.prefill_worker == "p1"
    assert not cluster.run(decode.status()).handoff_failures_total


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 48])
def test_trouble_6_the_last_block_is_whole_or_in_part_and_right(runner: asyncio.Runner, rig: Rig, tokens: int) -> None:
    """6: partial last block off by one (vllm#21074, #50558). The paced device checks every slot of the context."""

    async def story() -> None:
        scene = await opened(rig, tokens)
        await scene.request.reserve()
        await scene.request.prefill()
        await scene.request.decode()
        outcome = await scene.request.outcome()
        assert (outcome.kind, outcome.tokens) == ("answer", rig.expected(scene.request))
        assert scene.proxy.seen[What.BLOCK] == -(-tokens // 16)
        await scene.close()
        await rig.wait_clean()

    runner.run(story())


# --- 7 ----------------------------------------------------------------------------------------------------------------


def test_trouble_7_kv_waits_where_it_is_and_the_second_queue_pushes_back_on_the_first(
    start: Callable[..., Cluster],
) -> None:
    """7: decode staging eats KV capacity; a hard cap on concurrent handoffs; no backpressure across the two queues
    (sglang#27622). A small decode worker under many requests: what is prefilled and not yet decoded stays within what
    the decode worker has promised, in the prefill worker's memory; nothing is staged, and all are answered.
    """
    cluster = start()
    prefill = cluster.add(Role.PREFILL, "p0")
    decode = cluster.add(Role.DECODE, "d0", kv_cache_bytes=28 * 4096)
    cluster.wait_ready()
    asked = [Asked(cluster.grpc, prompt, 30) for prompt in prompts(24, 100)]
    blocks = -(-101 // 16)
    seen_waiting = 0
    while any(one.tokens < 30 and one.error is None for one in asked):
        there, here = cluster.run(prefill.status()), cluster.run(decode.status())
        assert here.credited_blocks <= here.credit_limit_blocks
        assert there.held <= here.credit_limit_blocks // blocks + here.num_blocks // blocks
        seen_waiting = max(seen_waiting, there.held)
    for one in asked:
        one.check()
    assert seen_waiting > 0, "nothing ever waited: the test shows nothing"
    cluster.wait_clean()


# --- 8 ----------------------------------------------------------------------------------------------------------------


def test_trouble_8_the_door_refuses_where_the_promise_cannot_be_kept(start: Callable[..., Cluster]) -> None:
    """8: TTFT of 160 s against a promise of 3 s, and no scale-up (dynamo#10528). What cannot be served in time is
    refused at once with a time to come back, and TTFT does not grow with the queue. That the planner counts queueing,
    and that the P:D ratio is planned (DistServe#28, llm-d-router#546), is the planner's part, which is not here yet.
    """
    cluster = start()
    cluster.add(Role.PREFILL, "p0", paced_prefill_token_s=0.005)
    cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()
    for prompt in prompts(9, 40):  # the router learns how long a prompt takes
        cluster.ask(prompt, 2)
    asked = [
        Asked(cluster.grpc, prompt, 2, slo_ttft_ms=3000.0) for prompt in prompts(14, 200)
    ]  # a second of prefill each
    for one in asked:
        one.join()
    refused = [one.error for one in asked if one.error is not None]
    served = [one for one in asked if one.error is None]
    assert refused
    assert served
    assert {error.code for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(error.retry_after_s is not None and error.retry_after_s > 0 for error in refused)
    for one in served:
        one.check()
        assert one.answer.timings is not None
        assert one.answer.timings.ttft_s < 2 * 3.0, "of 14 s, had all been let in"
    cluster.wait_clean()


@pytest.mark.parametrize("leaves", ["p0", "d0"])
def test_trouble_8_a_worker_that_leaves_takes_no_request_with_it(start: Callable[..., Cluster], leaves: str) -> None:
    """8: scale-down kills requests (dynamo#13565). A worker is drained in the middle of its work, and ends."""
    cluster = start()
    for name, role in {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}.items():
        cluster.add(role, name, paced_step_s=0.01)
    cluster.wait_ready()
    asked = [Asked(cluster.grpc, prompt, 40) for prompt in prompts(12, 60)]
    wait_until(lambda: all(one.tokens >= 2 for one in asked[:4]), "the first tokens")
    cluster.workers[leaves].signal(signal.SIGTERM)
    asked += [Asked(cluster.grpc, prompt, 10) for prompt in prompts(6, 50)]
    for one in asked:
        one.check()
    assert cluster.run(asyncio.wait_for(cluster.workers[leaves].process.wait(), WAIT_S)) == 0
    assert cluster.metric("request_failures_total") == 0
    cluster.wait_clean()


# --- 9 ----------------------------------------------------------------------------------------------------------------


def test_trouble_9_ttft_is_the_same_for_client_and_server(start: Callable[..., Cluster]) -> None:
    """9: which TTFT is it? (vllm#29474). The benchmark's own client and the router's metrics see the same request: the
    server's time lies within the client's, and both hold the prefill.
    """
    cluster = start()
    cluster.add(Role.PREFILL, "p0", paced_prefill_token_s=0.005)
    cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()
    target = Target(base_url=cluster.url, model=MODEL, temperature=0.0)
    before_s, between_s = 0.0, []
    for prompt in prompts(5, 100):
        record = cluster.run(send(target, BenchRequest(prompt=tuple(prompt), max_tokens=5), due_s=0.0))
        assert record.ok, record.error
        assert record.ttft_s is not None
        ttft_s = cluster.metric("time_to_first_token_seconds_sum") - before_s
        before_s += ttft_s
        assert 100 * 0.005 <= ttft_s <= record.ttft_s
        between_s.append(record.ttft_s - ttft_s)
    assert min(between_s) < 100 * 0.005, "another TTFT is meant"  # one of them met no busy machine
    tpot_s = cluster.metric("request_time_per_output_token_seconds_sum")
    assert tpot_s > 0
    assert cluster.metric("request_decode_time_seconds_sum") == pytest.approx(4 * tpot_s)  # the first one excluded


def test_trouble_9_tokens_are_counted_once_and_kv_has_its_latency(start: Callable[..., Cluster]) -> None:
    """9: prompt and cached tokens counted twice (vllm#33289); no KV latency metric (sglang#7944). Three choices of one
    prompt, then the prompt again.
    """
    cluster = start()
    cluster.add(Role.PREFILL, "p0")
    cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "temperature": 0.5, "seed": 1, "n": 3}
    usage = cluster.http.post("/v1/completions", json=body).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (100, 15, 115)
    again = cluster.ask(PROMPT, 5)
    assert again.usage is not None
    assert (again.usage.prompt_tokens, again.usage.cached_tokens) == (100, 96)
    assert cluster.metric("prompt_tokens_total") == 200
    assert cluster.metric("generation_tokens_total") == 20
    assert cluster.metric("prefix_cache_queries_total") == 200
    assert cluster.metric("prefix_cache_hits_total") == 96
    assert cluster.metric("handoffs_total") == 4
    assert cluster.metric("kv_transfer_time_seconds_count") == 4
    assert cluster.metric("kv_transferred_bytes_total") > 0


# --- 10 ---------------------------------------------------------------------------------------------------------------


def test_trouble_10_a_request_that_goes_round_the_split_is_counted_and_visible(start: Callable[..., Cluster]) -> None:
    """10: a silent bypass: decode-only served everything and nobody saw (modelplane#175)."""
    cluster = start(local_prefill_threshold_tokens=64)
    prefill = cluster.add(Role.PREFILL, "p0")
    cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()
    paths = []
    for prompt, n in ((PROMPT[:20], 5), (PROMPT, 5), ([7, *PROMPT], 1)):
        answer = cluster.ask(prompt, n)
        assert answer.token_ids == expected(prompt, n)
        assert answer.timings is not None
        paths.append(answer.timings.path)
    assert paths == ["local", "split", "prefill_only"]
    for path in paths:
        assert cluster.metric("choices_by_path_total", f'path="{path}"') == 1
    assert cluster.metric("handoffs_total") == 1
    assert cluster.run(prefill.status()).computed_tokens_total > 0  # visible on the worker, too: it did serve


def test_trouble_10_logprobs_and_finish_reason_are_those_of_a_colocated_worker(start: Callable[..., Cluster]) -> None:
    """10: logprobs or a wrong finish_reason through the split (sglang#33507). The same requests to a split and to a
    mixed cluster; the first token's logprobs cross the handoff.
    """
    clusters = {}
    for path, roles in {"split": (Role.PREFILL, Role.DECODE), "mixed": (Role.MIXED,)}.items():
        clusters[path] = start()
        for role in roles:
            clusters[path].add(role, f"{role}-0")
        clusters[path].wait_ready()
    stop = expected(PROMPT, 4)[-1]
    for sampling, finish_reason, length in (
        ({}, "length", 8),
        ({"stop_token_ids": [stop]}, "stop", 4),
        ({"stop_token_ids": [stop], "min_tokens": 8}, "length", 8),
    ):
        said = []
        for path, cluster in clusters.items():
            answer = cluster.ask(PROMPT, 8, top_logprobs=2, **sampling)
            assert answer.timings is not None
            assert answer.timings.path == path
            assert answer.finish_reason == finish_reason
            assert len(answer.token_ids) == len(answer.logprobs) == length
            said.append((answer.token_ids, answer.logprobs, answer.stop_reason))
        assert said[0] == said[1]
