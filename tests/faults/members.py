"""Real worker processes that a test may kill, stop and let go on, each with the channel on which it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc import aio
from owned import owned
from tandem.cluster.auth import MemberCredentials
from tandem.cluster.config import EngineConfig, WorkerConfig, to_dict
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import WorkerStub
from tandem.cluster.rpc import open_channel
from tandem.cluster.types import Role

WAIT_S = 20.0
POLL_S = 0.003
PROOF_POLL_S, PROOF_S = 0.1, 3.0
START_S = 60.0


@dataclass
class Member:
    """One life of one worker."""

    process: asyncio.subprocess.Process
    worker_id: str
    role: Role
    address: str
    kv_address: str
    epoch: int
    credentials: MemberCredentials
    """Of its cluster."""
    channel: aio.Channel
    stub: WorkerStub

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def status(self) -> pb.WorkerStatus:
        """What it says of itself now."""
        return await self.stub.Status(pb.StatusRequest(), timeout=WAIT_S)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self.process.kill()
        await asyncio.wait_for(self.process.wait(), WAIT_S)

    async def close(self) -> None:
        """Ends the process, stopped or not, and the channel."""
        if self.alive:
            await self.kill()
        await self.channel.close()

    async def leftovers(self) -> dict[str, Any]:
        """Blocks, leases, credits, pulls, sequences and handoffs that somebody still owns here."""
        status = await self.status()
        more: dict[str, Any] = {
            "queued_prefill_tokens": status.queued_prefill_tokens,
            "context_tokens": status.context_tokens,
            "holder_states": dict(status.holder_states),
            "puller_states": dict(status.puller_states),
            "broken_ledger": not status.integrity_ok,
        }
        return owned(status) | {name: count for name, count in more.items() if count}

    async def wait_clean(self) -> None:
        """Returns when nothing of any request is left."""
        left: dict[str, Any] = {}
        try:
            async with asyncio.timeout(WAIT_S):
                while left := await self.leftovers():  # noqa: ASYNC110 - another process
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"{self.worker_id} still owns {left}") from None

    async def proven_since(self, start_s: float) -> bool:
        """Whether the engine has proven its ledger of blocks since then (monotonic clock). It does so once, when it has
        been idle for half a second; one that cannot ends its process.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROOF_S):
                while (await self.status()).integrity_age_s >= time.monotonic() - start_s:  # noqa: ASYNC110
                    await asyncio.sleep(PROOF_POLL_S)
                return True
        return False

    async def wait_states(self, **expected: int) -> None:
        """Returns when handoffs stand exactly so: `held=1, pulling=1`."""
        states: dict[str, int] = {}
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    status = await self.status()
                    states = {**status.holder_states, **status.puller_states}
                    if states == expected:
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"{self.worker_id} has handoffs {states}, not {expected}") from None


async def start_member(folder: Path, name: str, role: Role, engine: EngineConfig, **fields: Any) -> Member:
    """Starts a worker that heartbeats to nobody; keyword arguments are fields of its `WorkerConfig`."""
    config = WorkerConfig(worker_id=name, role=role, engine=engine, **fields)
    path = folder / f"{name}-{os.urandom(4).hex()}.json"
    path.write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-m", "tandem.cluster.launch.process", "worker", "--config", str(path)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=folder)
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), START_S)
    assert line, f"{name} ended before it served"
    facts = json.loads(line)
    credentials = MemberCredentials.load(config.security)
    channel = open_channel(facts["address"], credentials)
    return Member(
        process=process,
        worker_id=name,
        role=role,
        address=facts["address"],
        kv_address=facts["kv_address"],
        epoch=facts["epoch"],
        credentials=credentials,
        channel=channel,
        stub=WorkerStub(channel),
    )
