"""kill -9 of either half of a request at every moment of its life, on real processes: clients notice time alone.

The paced device's KV is a hash chain over all tokens, so an answer that is right was resumed from the right place.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import WorkerStub
from tandem.cluster.types import Role
from tandem.router.client import Answer, TandemClient, TandemError

MODEL = "dummy:tiny-llama"
PROMPT = list(range(1, 120))
ENGINE = EngineConfig(
    model=MODEL,
    device="paced",
    kv_cache_bytes=16 * 2**20,
    paced_step_s=0.01,
    paced_prefill_token_s=0.00001,
    paced_decode_row_s=0.0,
)
SLOW_PREFILL = {"paced_prefill_token_s": 0.005, "max_batched_tokens": 32, "max_running": 16}
"""0.6 s for PROMPT, in four chunks."""
SLOW_DECODE = {"paced_step_s": 0.4}
Wait = Callable[..., None]


def expected(prompt: list[int], n: int) -> list[int]:
    config = resolve_model(MODEL).config
    return list(expected_tokens(prompt, n, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


class Member:
    """A worker process and a way to ask it how it stands."""

    def __init__(self, cluster: Cluster, role: Role, name: str, engine: dict[str, Any]) -> None:
        self._cluster, self.role, self.name, self._engine = cluster, role, name, engine
        self.start()

    def start(self) -> None:
        """Begins its next life."""
        config = WorkerConfig(
            worker_id=self.name,
            role=self.role,
            engine=replace(ENGINE, **self._engine),
            routers=(self._cluster.router["registry"],),
            lease_s=self._cluster.lease_s,
            credit_factor=4.0,
        )
        self.process, addresses = self._cluster.processes.start("worker", config)
        self.process: subprocess.Popen[str]
        self._channel = grpc.insecure_channel(addresses["address"], options=(("grpc.enable_http_proxy", 0),))

    def status(self) -> pb.WorkerStatus:
        return WorkerStub(self._channel).Status(pb.StatusRequest(), timeout=10)

    def kill(self) -> None:
        self._channel.close()
        self.process.kill()
        self.process.wait(10)

    def leftovers(self) -> dict[str, int]:
        """What somebody still owns here."""
        status = self.status()
        counts = {
            "blocks": status.num_blocks - status.free_blocks - status.cached_blocks,
            "leases": status.leases,
            "credited": status.credited_blocks,
            "pulls": status.pulls,
            "sequences": status.streams,
            "waiting": status.waiting,
            "running": status.running,
            "held": status.held,
        }
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        self._channel.close()


class Cluster:
    """A router and its workers as real processes."""

    def __init__(self, processes: Any, wait: Wait, *, lease_s: float = 30.0, **router: Any) -> None:
        self.processes, self.wait, self.lease_s = processes, wait, lease_s
        config = RouterConfig(
            model=MODEL, http_port=0, grpc_port=0, registry_port=0, **{"unready_wait_s": 20.0, **router}
        )
        self.router = processes.start("router", config)[1]
        self.workers: dict[str, Member] = {}
        self.client = TandemClient(self.router["grpc"])

    def add(self, role: Role, name: str, **engine: Any) -> Member:
        self.workers[name] = Member(self, role, name, engine)
        return self.workers[name]

    def ready(self) -> list[str]:
        workers = httpx.get(f"http://{self.router['http']}/ready", trust_env=False).json()["workers"]
        return [worker["worker_id"] for worker in workers if worker["state"] == "ready"]

    def wait_ready(self, *names: str) -> None:
        wanted = names or tuple(self.workers)
        self.wait(lambda: set(wanted) <= set(self.ready()), f"{wanted} to be ready")

    def metric(self, name: str, label: str = "") -> float:
        lines = httpx.get(f"http://{self.router['http']}/metrics", trust_env=False).text.splitlines()
        hits = [line for line in lines if line.startswith(f"tandem:{name}{{") and label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in hits)

    def wait_clean(self) -> None:
        """Nothing of any request is left on any worker, nor in the router."""
        for member in self.workers.values():
            self.wait(
                lambda member=member: not member.leftovers(),
                lambda member=member: f"{member.name} to be clean; left: {member.leftovers()}",
            )
        assert self.metric("requests_in_flight") == 0

    def close(self) -> None:
        self.client.close()
        for member in self.workers.values():
            member.close()


@pytest.fixture
def start(processes: Any, wait: Wait) -> Iterator[Callable[..., Cluster]]:
    clusters: list[Cluster] = []

    def make(**config: Any) -> Cluster:
        clusters.append(Cluster(processes, wait, **config))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


class Asked:
    """A request in a thread of its own."""

    def __init__(self, cluster: Cluster, prompt: list[int], max_tokens: int, **arguments: Any) -> None:
        self.answer = Answer(0)
        self.finishes = 0
        self.error: TandemError | None = None
        values = {"temperature": 0, "top_logprobs": 1, "timeout_s": 60.0, **arguments}
        self._generation = cluster.client.generate(token_ids=prompt, max_tokens=max_tokens, **values)
        self._prompt, self._max_tokens = prompt, max_tokens
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def tokens(self) -> int:
        return len(self.answer.token_ids)

    def _read(self) -> None:
        try:
            for delta in self._generation:
                self.answer.add(delta)
                self.answer.usage = delta.usage or self.answer.usage
                self.finishes += bool(delta.finish_reason)
        except TandemError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), f"no end after {self.tokens} tokens"

    def check(self) -> None:
        """The whole answer is right, and is told once."""
        self.join()
        assert self.error is None, self.error
        want = expected(self._prompt, self._max_tokens)
        assert self.answer.token_ids == want
        assert self.finishes == 1
        assert [entry.token_id for entry in self.answer.logprobs] == want
        assert self.answer.usage is not None
        assert (self.answer.usage.prompt_tokens, self.answer.usage.completion_tokens) == (len(self._prompt), len(want))


# --- no second prefill ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["queued", "computing", "held"])
def test_a_decode_worker_that_dies_before_its_first_step_costs_no_second_prefill(
    start: Callable[..., Cluster], wait: Wait, moment: str
) -> None:
    """Whatever the prefill is doing meanwhile, the next decode worker takes what comes of it."""
    cluster = start()
    prefill = cluster.add(Role.PREFILL, "p0", **SLOW_PREFILL)
    first = cluster.add(Role.DECODE, "d0", **SLOW_DECODE)
    cluster.add(Role.DECODE, "d1", **SLOW_DECODE)
    cluster.wait_ready()
    before = Asked(cluster, [9] * 64, 1) if moment == "queued" else None
    asked = Asked(cluster, PROMPT, 4)
    if moment == "held":
        wait(lambda: asked.tokens == 1, "the first token")
    else:
        wait(lambda: first.status().streams == 1, "the decode half to be here")
        if moment == "computing":
            wait(lambda: 0 < prefill.status().computed_tokens_total < len(PROMPT), "prefill to compute")
    first.kill()
    asked.check()
    assert asked.answer.timings is not None
    assert (asked.answer.timings.prefill_worker, asked.answer.timings.decode_worker) == ("p0", "d1")
    if before is not None:
        before.check()
    computed = prefill.status().computed_tokens_total
    assert computed == len(PROMPT) + (64 if before is not None else 0), "the prompt was computed once"
    assert cluster.metric("request_retries_total", "worker_lost") == 1
    assert cluster.metric("prefills_kept_total") == 1
    del cluster.workers["d0"]
    cluster.wait_clean()


def test_the_only_decode_worker_that_dies_before_its_first_step_takes_the_held_kv_in_its_next_life(
    start: Callable[..., Cluster], wait: Wait
) -> None:
    cluster = start()
    prefill = cluster.add(Role.PREFILL, "p0", **SLOW_PREFILL)
    decode = cluster.add(Role.DECODE, "d0", **SLOW_DECODE)
    cluster.wait_ready()
    asked = Asked(cluster, PROMPT, 4)
    wait(lambda: decode.status().streams == 1, "the decode half to be here")
    decode.kill()
    wait(lambda: asked.tokens == 1, "the first token, though no decode worker is there")
    decode.start()
    asked.check()
    assert prefill.status().computed_tokens_total == len(PROMPT)
    assert cluster.metric("prefills_kept_total") == 1
    cluster.wait_clean()


def test_kv_whose_lease_ran_out_is_computed_again(start: Callable[..., Cluster], wait: Wait) -> None:
    cluster = start(lease_s=0.5)
    prefill = cluster.add(Role.PREFILL, "p0")
    decode = cluster.add(Role.DECODE, "d0", **SLOW_DECODE)
    cluster.wait_ready()
    asked = Asked(cluster, PROMPT, 4)
    wait(lambda: asked.tokens == 1, "the first token")
    decode.kill()
    wait(lambda: not prefill.leftovers(), "the lease to run out")
    decode.start()
    asked.check()
    assert cluster.metric("request_retries_total", "expired") == 1
    cluster.wait_clean()


def test_a_prefill_worker_that_dies_before_its_kv_has_moved_is_replaced_behind_the_first_token(
    start: Callable[..., Cluster], wait: Wait
) -> None:
    """The decode worker is full, so that the KV waits in the prefill worker: it goes with it."""
    cluster = start()
    first = cluster.add(Role.PREFILL, "p0")
    cluster.add(Role.DECODE, "d0", kv_cache_bytes=2**17, paced_step_s=0.02, max_running=1)
    cluster.wait_ready()
    room = cluster.workers["d0"].status().max_model_len
    filler = Asked(cluster, [7] * (room - 60), 50)
    wait(lambda: filler.tokens >= 2, "the decode worker to be full")
    asked = Asked(cluster, PROMPT, 4)
    wait(lambda: asked.tokens == 1, "the first token")
    assert first.status().held == 1
    assert not filler.finishes
    first.kill()
    cluster.add(Role.PREFILL, "p1")
    asked.check()
    filler.check()
    assert cluster.metric("request_retries_total") >= 1
    assert cluster.metric("prefills_kept_total") == 0
    del cluster.workers["p0"]
    cluster.wait_clean()


def test_a_prefill_worker_that_dies_after_its_kv_has_moved_is_not_missed(
    start: Callable[..., Cluster], wait: Wait
) -> None:
    cluster = start()
    prefill = cluster.add(Role.PREFILL, "p0")
    cluster.add(Role.DECODE, "d0", paced_step_s=0.05)
    cluster.wait_ready()
    asked = Asked(cluster, PROMPT, 20)
    wait(lambda: asked.tokens >= 3, "the decode worker to stream")
    prefill.kill()
    asked.check()
    assert cluster.metric("request_retries_total") == 0
    del cluster.workers["p0"]
    cluster.wait_clean()


# --- any moment -------------------------------------------------------------------------------------------------------

TOKENS = 24
MOMENTS: dict[str, Callable[[Cluster, list[Asked]], bool]] = {
    "before dispatch": lambda c, asked: True,
    "credited or queued": lambda c, asked: any(
        _live(m).credited_blocks or _live(m).waiting for m in c.workers.values()
    ),
    "computing": lambda c, asked: any(m.role is Role.PREFILL and _live(m).running for m in c.workers.values()),
    "transfer": lambda c, asked: any(_live(m).pulls for m in c.workers.values()),
    "first token": lambda c, asked: any(a.tokens >= 1 for a in asked),
    "first step": lambda c, asked: any(a.tokens >= 2 for a in asked),
    "mid stream": lambda c, asked: any(a.tokens >= TOKENS // 2 for a in asked),
    "one token short": lambda c, asked: any(a.tokens >= TOKENS - 1 for a in asked),
    "one is done": lambda c, asked: any(a.tokens == TOKENS for a in asked),
}


def _live(member: Member) -> pb.WorkerStatus:
    return member.status()


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_kill_at_any_moment_changes_no_answer(start: Callable[..., Cluster], wait: Wait, role: Role) -> None:
    """Two workers of each role. Requests come one after the other, so that each kill hits several moments at once."""
    cluster = start(max_attempts=5)
    for name in ("p0", "p1"):
        cluster.add(Role.PREFILL, name, paced_prefill_token_s=0.001, max_batched_tokens=32, max_running=16)
    for name in ("d0", "d1"):
        cluster.add(Role.DECODE, name, paced_step_s=0.01)
    cluster.wait_ready()
    pool = [member for member in cluster.workers.values() if member.role is role]
    for number, (moment, reached) in enumerate(MOMENTS.items()):
        asked: list[Asked] = []
        if moment != "before dispatch":
            asked = [Asked(cluster, [200 + number, i, *PROMPT], TOKENS) for i in range(4)]
            wait(lambda reached=reached, asked=asked: reached(cluster, asked), moment)
        victim = max(pool, key=lambda member: member.status().streams)
        victim.kill()
        asked += [Asked(cluster, [300 + number, i, *PROMPT], TOKENS) for i in range(2)]
        for one in asked:
            one.check()
        victim.start()
        cluster.wait_ready()
    cluster.wait_clean()
    assert cluster.metric("request_retries_total") >= 1
    assert cluster.metric("request_failures_total") == 0
