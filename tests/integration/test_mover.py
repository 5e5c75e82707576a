"""Workers whose KV moves in a process of its own, as real processes: none is left alone, and none hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from tandem.cluster.auth import OPEN
from tandem.cluster.config import EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.mover.worker import KVMover, MoverLost
from tandem.kvtransfer.ticket import HandoffRefused, Hello, Peer, RefusalReason
from tandem.router.client import TandemClient

MODEL = "dummy:tiny-llama"
PROMPT = list(range(1, 120))
ENGINE = EngineConfig(
    model=MODEL, device="paced", kv_cache_bytes=16 * 2**20, paced_step_s=0.01, paced_prefill_token_s=0.00001
)
EXIT_FAILED = 70
LAYOUT = KVLayout(
    block_size=4, groups=(KVGroup(name="all", num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32"),)
)
Wait = Callable[..., None]


def test_a_killed_mover_ends_its_worker_and_a_worker_its_mover(processes: Any, wait: Wait) -> None:
    router = processes.start("router", RouterConfig(model=MODEL, http_port=0, grpc_port=0, registry_port=0))[1]
    roles = {"p0": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}
    members = {
        name: processes.start(
            "worker",
            WorkerConfig(worker_id=name, role=role, engine=ENGINE, routers=(router["registry"],), kv_mover="process"),
        )[0]
        for name, role in roles.items()
    }

    def workers() -> dict[str, dict[str, Any]]:
        answer = httpx.get(f"http://{router['http']}/ready", trust_env=False).json()
        return {worker["worker_id"]: worker for worker in answer["workers"] if worker["state"] == "ready"}

    wait(lambda: len(workers()) == 3, "three workers")
    movers = {name: psutil.Process(worker["kv_mover_pid"]) for name, worker in workers().items()}
    assert all(mover.parent() == psutil.Process(members[name].pid) for name, mover in movers.items())
    with TandemClient(router["grpc"]) as client:
        tokens: list[int] = []
        struck = ""
        for delta in client.generate(token_ids=PROMPT, max_tokens=60, temperature=0):
            tokens += delta.token_ids
            if len(tokens) >= 5 and not struck:
                wait(lambda: any(w["running"] for n, w in workers().items() if n != "p0"), "a running sequence")
                struck = next(n for n, w in workers().items() if n != "p0" and w["running"])
                movers[struck].kill()
        config = resolve_model(MODEL).config
        due = expected_tokens(PROMPT, 60, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        assert tokens == list(due)
    assert members[struck].wait(10) == EXIT_FAILED
    members["p0"].kill()
    (left,) = {"d0", "d1"} - {struck}
    members[left].terminate()
    assert members[left].wait(20) == 0
    _, alive = psutil.wait_procs(movers.values(), timeout=10)
    assert not alive


def test_a_mover_that_stands_still_is_killed_and_its_worker_hears_of_it() -> None:
    """SIGSTOP: it can neither answer nor say that it writes no more."""

    async def scene() -> None:
        told: asyncio.Future[MoverLost] = asyncio.get_running_loop().create_future()
        mover = await KVMover.spawn(cancel_s=0.1)
        try:
            store = MemoryKVStore(LAYOUT, 4)
            await mover.attach(store, transport="grpc", credentials=OPEN)
            mover.on_lost = told.set_result
            os.kill(mover.pid, signal.SIGSTOP)
            mine = Hello(protocol_version=2, worker_id="d", epoch=1, fingerprint="fp", layout=LAYOUT.to_bytes())
            with pytest.raises(HandoffRefused) as refused:
                await mover.transport.hello(Peer("p", 1, "127.0.0.1:1"), mine, timeout_s=0.1)
            assert refused.value.reason is RefusalReason.DEADLINE
            assert "has ended" in str(await asyncio.wait_for(told, 20))
        finally:
            await mover.stop()
        assert not psutil.pid_exists(mover.pid)

    asyncio.run(scene())
