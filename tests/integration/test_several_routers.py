"""Several routers before the same workers. Each sees only its own load, and heartbeats; the workers decide: whatever
routers believe, promises of KV, places and queues keep within their bounds, and what is admitted is answered right.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tandem.cluster.config import EngineConfig, RouterConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.launch.members import RouterMember
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role, SamplingParams
from tandem.kvtransfer.protocol.credits import CreditLedger
from tandem.router.client import TandemClient, TandemError

MODEL = "dummy:tiny-llama"
WAIT_S = 60.0
PATIENT: dict[str, Any] = {"slo_class": "batch", "timeout_s": WAIT_S, "temperature": 0}
"""Of requests that no door refuses because they would have to wait."""
Start = Callable[..., Any]
Paced = Callable[..., EngineConfig]


def expected(prompt: list[int], n: int) -> list[int]:
    config = resolve_model(MODEL).config
    params = SamplingParams(max_tokens=n, temperature=0.0)
    return list(expected_tokens(prompt, n, params, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


class Router:
    """One more router in this process, and a client of it."""

    def __init__(self, config: RouterConfig) -> None:
        self.member = RouterMember(config)
        self.member.start(WAIT_S)
        self.grpc = TandemClient(self.member.grpc_address)

    def close(self) -> None:
        self.grpc.close()
        self.member.stop()


@pytest.fixture
def start_routers() -> Iterator[Callable[..., list[Router]]]:
    """`start_routers(2, cluster)`: more routers, which workers that are added afterwards serve as well."""
    routers: list[Router] = []

    def start(count: int, cluster: Any, **fields: Any) -> list[Router]:
        config = RouterConfig(model=MODEL, http_port=0, grpc_port=0, registry_port=0, **fields)
        more = [Router(config) for _ in range(count)]
        cluster.registries += [router.member.registry_address for router in more]
        routers.extend(more)
        return more

    yield start
    for router in routers:
        router.close()


def wait_known(wait: Start, routers: list[TandemClient]) -> None:
    """Returns when every router could serve a request."""

    def ready(client: TandemClient) -> bool:
        try:
            return client.generate(token_ids=[1], max_tokens=1, temperature=0, timeout_s=5).collect().token_ids != []
        except TandemError:
            return False

    for client in routers:
        wait(lambda client=client: ready(client), "a router to know its workers")


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Looks at every promise and every queued sequence of all workers in this process, as it is made."""
    seen: dict[str, Any] = {"broken": [], "refused": 0, "promised": 0}
    grant, add = CreditLedger.grant, Scheduler.add

    def checked_grant(self: CreditLedger, *args: Any, **kwargs: Any) -> int | None:
        credit = grant(self, *args, **kwargs)
        seen["refused"] += credit is None
        seen["promised"] = max(seen["promised"], self.blocks)
        if self.blocks > self.limit_blocks and len(self) > 1:
            seen["broken"].append(f"{self.blocks} of {self.limit_blocks} blocks promised to {len(self)}")
        return credit

    def checked_add(self: Scheduler, *args: Any) -> None:
        add(self, *args)
        load = self.load()
        if load.waiting > self._max_waiting or load.running > self._prompts._max_running:
            seen["broken"].append(f"{load.waiting} wait, {load.running} run")

    monkeypatch.setattr(CreditLedger, "grant", checked_grant)
    monkeypatch.setattr(Scheduler, "add", checked_add)
    return seen


@pytest.mark.parametrize("count", [2, 3])
def test_routers_together_never_ask_more_of_a_worker_than_it_has(
    start_cluster: Start, start_routers: Start, paced: Paced, bounds: dict[str, Any], wait: Start, count: int
) -> None:
    small = RouterConfig(max_waiting=12)
    cluster = start_cluster(paced(paced_step_s=0.002), router=small)
    routers = start_routers(count - 1, cluster, max_waiting=12)
    cluster.add(Role.PREFILL, kv_cache_bytes=2**19, max_waiting=4)
    cluster.add(Role.DECODE, kv_cache_bytes=2**18, max_waiting=4, max_running=4)
    clients = [cluster.grpc, *(router.grpc for router in routers)]
    wait_known(wait, clients)
    room_tokens = cluster.status("decode-0").num_blocks * 16
    chance = random.Random(count)
    asks = [
        (client, [n + 1, *chance.choices(range(1, 200), k=chance.choice([5, 40, room_tokens // 3]))], chance.random())
        for n, client in zip(range(40 * count), itertools.cycle(clients), strict=False)
    ]

    def ask(what: tuple[TandemClient, list[int], float]) -> str:
        client, prompt, luck = what
        want = expected(prompt, 12)
        got: list[int] = []
        generation = client.generate(token_ids=prompt, max_tokens=12, temperature=0, timeout_s=WAIT_S)
        if luck < 0.1:  # canceled wherever it stands by then
            threading.Timer(luck, generation.cancel).start()
        try:
            for delta in generation:
                got += delta.token_ids
                if 0.1 < luck < 0.2:
                    generation.cancel()
        except TandemError as error:
            if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return "refused" if error.retry_after_s is not None and not got else "refused, but not clearly"
            if error.code is grpc.StatusCode.CANCELLED and luck < 0.2 and got == want[: len(got)]:
                return "canceled"
            return f"failed: {error}"
        return "answered" if got == want else "answered wrongly"

    with ThreadPoolExecutor(14 * count) as pool:
        ends = list(pool.map(ask, asks))
    assert bounds["broken"] == []
    assert bounds["refused"] > 0, "nobody had to wait for a credit: the test asks for too little"
    assert set(ends) <= {"answered", "canceled", "refused"}
    assert ends.count("answered") >= 20
    assert ends.count("canceled") >= 1
    cluster.wait_clean()
    for client in clients:
        prompt = [7, 8, 9]
        assert client.generate(token_ids=prompt, max_tokens=3, temperature=0).collect().token_ids == expected(prompt, 3)
    cluster.wait_clean()


def test_a_large_context_is_not_starved_by_another_routers_small_ones(
    start_cluster: Start, start_routers: Start, paced: Paced, bounds: dict[str, Any], wait: Start
) -> None:
    cluster = start_cluster(paced(paced_step_s=0.002))
    [other] = start_routers(1, cluster)
    cluster.add(Role.PREFILL)
    cluster.add(Role.DECODE, kv_cache_bytes=2**16, max_running=4)
    wait_known(wait, [cluster.grpc, other.grpc])
    blocks = cluster.status("decode-0").num_blocks
    large = [5] * (blocks * 16 - 16)
    assert len(large) < cluster.status("decode-0").max_model_len - 8
    stop, failures = threading.Event(), list[Exception]()

    def stream(worker: int) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            prompt = [worker + 1, number % 200 + 1] * 20
            try:
                got = cluster.grpc.generate(token_ids=prompt, max_tokens=8, **PATIENT).collect()
                assert got.token_ids == expected(prompt, 8)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=stream, args=(worker,)) for worker in range(12)]
    for thread in threads:
        thread.start()
    try:
        wait(lambda: bounds["refused"] > 3, "the small ones to wait for each other")
        answer = other.grpc.generate(token_ids=large, max_tokens=8, **PATIENT).collect()
        assert answer.token_ids == expected(large, 8)
        assert failures == []
        assert all(thread.is_alive() for thread in threads), "the small ones went on meanwhile"
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert failures == []
    assert bounds["broken"] == []
    cluster.wait_clean()


def test_a_router_that_is_killed_takes_its_own_sequences_along_and_no_others(
    start_cluster: Start, paced: Paced, processes: Any, wait: Start
) -> None:
    cluster = start_cluster(paced())
    config = RouterConfig(model=MODEL, http_port=0, grpc_port=0, registry_port=0)
    process, addresses = processes.start("router", config)
    cluster.registries.append(addresses["registry"])
    cluster.add(Role.PREFILL, paced_prefill_token_s=0.001)
    cluster.add(Role.DECODE, paced_step_s=0.02)
    with TandemClient(addresses["grpc"]) as doomed:
        wait_known(wait, [cluster.grpc, doomed])
        ours = cluster.grpc.generate(token_ids=[1] * 40, max_tokens=100, temperature=0, timeout_s=WAIT_S)
        stream = iter(ours)
        got = list(next(stream).token_ids)
        with ThreadPoolExecutor(4) as pool:  # one that decodes, others in prefill and its queue
            theirs = [
                pool.submit(doomed.generate(token_ids=[n + 2] * 300, max_tokens=200, **PATIENT).collect)
                for n in range(4)
            ]
            wait(lambda: cluster.status("decode-0").running >= 2, "the other router's first to decode")
            wait(lambda: cluster.status("prefill-0").streams >= 1, "its others to be on their way")
            process.kill()
            process.wait(10)
            for future in theirs:
                with pytest.raises(TandemError):
                    future.result(WAIT_S)
        wait(lambda: cluster.leftovers("decode-0").get("sequences") == 1, "what it had asked for to end")
        wait(lambda: not cluster.leftovers("prefill-0"), "its prompts and their KV to go")
        for delta in stream:
            got += delta.token_ids
        assert got == expected([1] * 40, 100)
    cluster.wait_clean()


def test_what_clients_call_their_requests_does_not_matter_to_the_workers(
    start_cluster: Start, start_routers: Start, paced: Paced, wait: Start
) -> None:
    """Routers draw the ids under which workers know a request: two clients may use the same one at once."""
    cluster = start_cluster(paced(paced_step_s=0.01))
    [other] = start_routers(1, cluster)
    cluster.add(Role.PREFILL)
    cluster.add(Role.DECODE)
    clients = [cluster.grpc, cluster.grpc, other.grpc, other.grpc]
    wait_known(wait, clients)
    prompts = [[n + 1] * 30 for n in range(len(clients))]

    def ask(client: TandemClient, prompt: list[int]) -> list[int]:
        generation = client.generate(token_ids=prompt, max_tokens=40, temperature=0, request_id="the same")
        return generation.collect().token_ids

    with ThreadPoolExecutor(len(clients)) as pool:
        futures = [pool.submit(ask, client, prompt) for client, prompt in zip(clients, prompts, strict=True)]
        wait(lambda: cluster.status("decode-0").running == len(clients), "all of them to run at once")
        assert [future.result(WAIT_S) for future in futures] == [expected(prompt, 40) for prompt in prompts]
    cluster.wait_clean()


def test_no_prompt_is_computed_for_a_decode_pool_that_is_full(
    start_cluster: Start, start_routers: Start, paced: Paced, wait: Start
) -> None:
    """Backpressure over both pools: requests wait at the routers, and flow when decode has room again."""
    cluster = start_cluster(paced())
    [other] = start_routers(1, cluster)
    cluster.add(Role.PREFILL)
    cluster.add(Role.DECODE, max_running=1, max_waiting=1, paced_step_s=0.03)  # who occupies it stays for 13 s
    wait_known(wait, [cluster.grpc, other.grpc])
    clients = [cluster.grpc, other.grpc]
    prompts = [[n + 1] * 64 for n in range(10)]

    def ask(n: int) -> list[int]:
        client = clients[n % 2]
        return client.generate(token_ids=prompts[n], max_tokens=5, **PATIENT).collect().token_ids

    with ThreadPoolExecutor(len(prompts)) as pool:
        occupants = [clients[0].generate(token_ids=[90 + n] * 64, max_tokens=440, **PATIENT) for n in range(2)]
        streams = [iter(occupant) for occupant in occupants]
        for stream in streams:
            assert next(stream).token_ids  # the one decodes; the other's KV waits in the prefill worker's memory
        wait(lambda: cluster.status("decode-0").waiting == 1, "the decode pool to be full")
        wait(lambda: cluster.status("prefill-0").leases == 1, "the confirmation of the one that decodes")
        before = cluster.status("prefill-0")
        futures = [pool.submit(ask, n) for n in range(len(prompts))]
        computed = cluster.status("decode-0").steps_total
        while cluster.status("decode-0").steps_total < computed + 20:
            now = cluster.status("prefill-0")
            assert (now.waiting, now.queued_prefill_tokens, now.leases) == (0, 0, 1)
            assert now.computed_tokens_total == before.computed_tokens_total
            assert now.free_blocks == before.free_blocks
            time.sleep(0.01)
        assert not any(future.done() for future in futures)
        for occupant in occupants:
            occupant.cancel()
        assert [future.result(WAIT_S) for future in futures] == [expected(prompt, 5) for prompt in prompts]
    cluster.wait_clean()
