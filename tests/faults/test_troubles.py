"""The ten troubles that users of other systems have reported (PEERS.md, "What their users hit"): each cannot happen
here. Real processes, real sockets; small versions of what `test_matrix.py` and tests/integration do at length.

The first five; the others are in `test_troubles_six_to_ten.py`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from asked import Asked, expected
from kv_proxy import What
from members import WAIT_S
from recipes import puller_pulling
from scenes import DECODE_BLOCKS, SHORT_TOKENS, Rig, opened, seen
from scripted_router import Refused, Request, ScriptedRouter
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import Role
from tandem.router.client import TandemError
from whole_cluster import Cluster, prompts, wait_until

PROMPT = list(range(40, 140))


async def rig_request(rig: Rig) -> Request:
    request = Request(rig.neighbor, rig.name(), rig.prefill, rig.decode, rig.prompt(SHORT_TOKENS), max_tokens=4)
    await request.reserve()
    await request.prefill()
    await request.decode()
    return request


# --- 1 ----------------------------------------------------------------------------------------------------------------


def test_trouble_1_an_abort_frees_decode_blocks_though_prefill_never_signals(runner: asyncio.Runner, rig: Rig) -> None:
    """1: abort leaks decode blocks when prefill never signals (vllm#46283)."""

    async def story() -> None:
        scene = await opened(rig)
        await scene.request.reserve()
        await scene.request.decode()  # and no prefill, ever
        await scene.decode_worker.wait_states(pulling=1)
        assert (await scene.decode_worker.leftovers())["held_blocks"] == 3
        await scene.request.abort(scene.decode_worker)
        await scene.decode_worker.wait_clean()
        await scene.prefill_worker.wait_clean()
        await scene.close()

    runner.run(story())


def test_trouble_1_a_refusal_by_decode_strands_no_prefill_blocks(start: Callable[..., Cluster]) -> None:
    """1: prefill blocks stranded for minutes when decode refuses (vllm#41269). The decode worker is told to drain
    between credit and decode call, and refuses; the lease would be two minutes.
    """
    cluster = start(unready_wait_s=0.5)
    prefill = cluster.add(Role.PREFILL, "p0", worker={"lease_s": 120.0})
    decode = cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()

    async def story() -> None:
        router = ScriptedRouter("scripted")
        await router.attach(prefill)
        await router.attach(decode)
        request = Request(router, "q", prefill, decode, PROMPT, max_tokens=4)
        await request.reserve()
        await request.prefill()
        await request.wait_first_token()
        await decode.stub.Drain(pb.DrainRequest(), timeout=WAIT_S)
        with pytest.raises(Refused, match="draining"):
            await request.decode()
        await request.abort()  # what a router does with a refused attempt
        await prefill.wait_clean()
        await router.detach()

    cluster.run(story())
    with pytest.raises(TandemError):  # the real router's own request: refused, and nothing stays behind
        cluster.ask(PROMPT, 4)
    cluster.wait_clean()


# --- 2 ----------------------------------------------------------------------------------------------------------------


def test_trouble_2_a_late_writer_does_not_reach_blocks_that_others_have_now(runner: asyncio.Runner, rig: Rig) -> None:
    """2: pages reused under a late writer (sglang#24527). Frames of an aborted pull arrive when others fill the whole
    memory of the decode worker.
    """

    async def story() -> None:
        scene = await opened(rig)
        await puller_pulling(scene)
        await scene.request.abort(scene.decode_worker)
        await scene.decode_worker.wait_clean()
        others = [await rig_request(rig) for _ in range(DECODE_BLOCKS // 3 + 1)]  # all its blocks, in turn
        scene.proxy.let_go()  # now the frames come
        for other in others:
            outcome = await other.outcome()
            assert (outcome.kind, outcome.tokens) == ("answer", rig.expected(other)), outcome
        await scene.close()
        await rig.wait_clean()

    runner.run(story())


def test_trouble_2_a_stale_reference_never_gets_another_prompts_kv(runner: asyncio.Runner, rig: Rig) -> None:
    """2: HTTP 200 with another prompt's answer from a stale block reference (vllm#52234). A pull arrives after its
    blocks were given up and handed to others: it is refused, and the answer is an error.
    """

    async def story() -> None:
        scene = await opened(rig)
        scene.proxy.hold(What.PULL)
        await scene.request.reserve()
        await scene.request.prefill()
        await scene.request.wait_first_token()
        await scene.request.decode()
        await seen(scene.proxy, What.PULL)
        await scene.request.abort(scene.prefill_worker)
        others = [await rig_request(rig) for _ in range(14)]  # more than all blocks of the prefill worker, in turn
        scene.proxy.let_go()
        outcome = await scene.request.outcome()
        assert outcome.kind == "failed:aborted"
        assert scene.proxy.seen[What.BLOCK] == 0
        for other in others:
            assert (await other.outcome()).tokens == rig.expected(other)
        await scene.close()
        await rig.wait_clean()

    runner.run(story())


# --- 3 ----------------------------------------------------------------------------------------------------------------


def test_trouble_3_when_one_leg_fails_the_other_ends_and_the_client_hears_of_it(start: Callable[..., Cluster]) -> None:
    """3: one leg fails, the other hangs for minutes (sglang#9726, #29482). kill -9 of the only prefill worker under a
    prompt: the decode worker, whose own leases and waits are minutes away, keeps nothing; the request waits for another
    life of the one that died, and hears within its own time that there was none.
    """
    cluster = start(unready_wait_s=1.0)
    prefill = cluster.add(Role.PREFILL, "p0", paced_prefill_token_s=0.02)
    decode = cluster.add(Role.DECODE, "d0", worker={"pull_wait_s": 600.0, "lease_s": 600.0, "credit_ttl_s": 600.0})
    cluster.wait_ready()
    asked = Asked(cluster.grpc, PROMPT, 4, timeout_s=6.0)
    wait_until(lambda: cluster.run(decode.status()).puller_states.get("pulling") == 1, "the pull")
    prefill.signal(signal.SIGKILL)
    cluster.run(decode.wait_clean())
    assert asked.error is None
    asked.join()
    assert asked.error is not None
    assert asked.error.code is grpc.StatusCode.UNAVAILABLE
    assert "prefill worker" in asked.error.message
    cluster.run(decode.wait_clean())


def test_trouble_3_more_than_fits_into_memory_waits_and_is_answered(start: Callable[..., Cluster]) -> None:
    """3: hangs under load or out of memory (sglang#10110, #6857). Several times what either worker's memory holds, at
    once.
    """
    cluster = start()
    cluster.add(Role.PREFILL, "p0", kv_cache_bytes=24 * 4096)
    cluster.add(Role.DECODE, "d0", kv_cache_bytes=24 * 4096)
    cluster.wait_ready()
    asked = [Asked(cluster.grpc, prompt, 24) for prompt in prompts(20, 100)]
    for one in asked:
        one.check()
    cluster.wait_clean()


# --- 4 ----------------------------------------------------------------------------------------------------------------


def test_trouble_4_a_prefill_worker_that_comes_back_is_another_life_of_it(start: Callable[..., Cluster]) -> None:
    """4: stale peer after a prefill restart: decode crashes, or serves a dead engine for an hour (llm-d#2187,
    vllm#49238). The same name, the same ports, another epoch: the next request is served by it, by a decode worker that
    never went away.
    """
    cluster = start()
    first = cluster.add(Role.PREFILL, "p0")
    decode = cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()
    assert cluster.ask(PROMPT, 4).token_ids == expected(PROMPT, 4)
    ports = {name: int(address.rsplit(":", 1)[1]) for name, address in _addresses(first).items()}
    cluster.run(first.kill())
    second = cluster.add(Role.PREFILL, "p0", worker=ports)
    assert (second.address, second.kv_address) == (first.address, first.kv_address)
    assert second.epoch != first.epoch
    for prompt in prompts(3, 90):
        answer = cluster.ask(prompt, 4)
        assert answer.token_ids == expected(prompt, 4)
        assert answer.timings is not None
        assert answer.timings.path == "split"
    assert decode.alive
    assert cluster.run(decode.status()).pid == decode.process.pid
    cluster.wait_clean()


def _addresses(member: Any) -> dict[str, str]:
    return {"port": member.address, "kv_port": member.kv_address}


# --- 5 ----------------------------------------------------------------------------------------------------------------


def test_trouble_5_where_ttft_went_is_said(start: Callable[..., Cluster]) -> None:
    """5: TTFT far worse than colocated, unexplained (sglang#6411, #24488); the handover is orchestration, not bytes
    (vllm#51919). Every answer says what its TTFT was made of, the handoff is not part of it (the first token leaves
    before), what the handoff cost stands apart, and the metrics are the sums of the same numbers.
    """
    cluster = start()
    cluster.add(Role.PREFILL, "p0", paced_prefill_token_s=0.004, max_batched_tokens=100)  # one prompt a step
    cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()
    asked = [Asked(cluster.grpc, prompt, 6) for prompt in prompts(3, 100)]
    timings = []
    for one in asked:
        one.check()
        assert one.answer.timings is not None
        timings.append(one.answer.timings)
    for t in timings:
        assert t.prefill_s >= 100 * 0.004  # the device's own time: it is found where it was spent
        assert t.queue_s + t.prefill_s <= t.ttft_s
        assert t.exposed_transfer_s >= 0
        assert t.transferred_bytes > 0
        assert t.transport in ("grpc", "mapped")
        assert t.ttft_s + t.decode_s == pytest.approx(t.e2e_s)
    assert max(t.queue_s for t in timings) > 0.2  # who came last waited for the others, and is told so
    for metric, values in {
        "time_to_first_token_seconds": [t.ttft_s for t in timings],
        "request_queue_time_seconds": [t.queue_s for t in timings],
        "request_prefill_time_seconds": [t.prefill_s for t in timings],
        "kv_transfer_exposed_seconds": [t.exposed_transfer_s for t in timings],
        "request_decode_queue_time_seconds": [t.decode_queue_s for t in timings],
    }.items():
        assert cluster.metric(f"{metric}_count") == 3
        assert cluster.metric(f"{metric}_sum") == pytest.approx(sum(values), abs=1e-6)
