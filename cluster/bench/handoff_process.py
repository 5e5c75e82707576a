"""A worker of `tandem bench handoff` seen from its router: the process, its channel, and what it has told."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from grpc import aio

from ...router.commands import Commands
from ..proto import tandem_internal_v1_pb2 as pb
from ..proto.tandem_internal_v1_pb2_grpc import WorkerStub
from ..rpc import PROTOCOL_VERSION, open_channel
from .handoff_traffic import Traffic
from .handoff_worker import WorkerSpec

ROUTER_ID = "bench"
CALL_S = 120.0
START_S = 300.0


class WorkerProcess:
    """One worker of the benchmark: its process, its channel, and what it has told the router."""

    def __init__(self, spec: WorkerSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self._process = process
        self.address = self.kv_address = ""
        self.epoch = 0
        self.fingerprint = ""
        self.stub: Any = None
        self.commands = Commands(spec.worker_id, 0)
        """What the router asks, on the stream that it has with every worker."""
        self._channel: aio.Channel | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tokens: dict[str, asyncio.Future[float]] = {}
        self._finishes: dict[str, asyncio.Future[float]] = {}

    @classmethod
    async def start(cls, spec: WorkerSpec) -> WorkerProcess:
        """A worker that serves, with this process attached to it. RuntimeError if it does not come up."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tandem.cluster.bench.handoff_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**24,
        )
        worker = cls(spec, process)
        try:
            facts = await worker._ask(json.dumps(asdict(spec)), START_S)
            worker.address, worker.kv_address, worker.epoch = facts["address"], facts["kv_address"], facts["epoch"]
            worker.fingerprint = facts["fingerprint"]
            worker._channel = open_channel(worker.address)
            worker.stub = WorkerStub(worker._channel)
            worker.commands = Commands(spec.worker_id, worker.epoch)
            attached = asyncio.get_running_loop().create_future()
            worker._reader = asyncio.create_task(worker._read(attached))
            await asyncio.wait({attached, worker._reader}, timeout=CALL_S, return_when=asyncio.FIRST_COMPLETED)
            if not attached.done():
                raise RuntimeError(f"worker {spec.worker_id} cannot be attached to") from worker._reader.exception()
        except BaseException:
            await worker.close()
            raise
        return worker

    def first_token(self, request_id: str) -> asyncio.Future[float]:
        """Resolves when this worker's first frame about the request is here, to that moment."""
        future = self._tokens[request_id] = asyncio.get_running_loop().create_future()
        return future

    def finish(self, request_id: str) -> asyncio.Future[float]:
        """Resolves when the request has ended here, to that moment."""
        future = self._finishes[request_id] = asyncio.get_running_loop().create_future()
        return future

    async def marks(self, *, mute: bool = False) -> dict[str, list[dict[str, Any]]]:
        """What it recorded since the last time. `mute`: see `Command`."""
        return await self._ask(json.dumps({"mute": mute}), CALL_S)

    async def pull(self, traffic: Traffic, timeout_s: float, *, mute: bool = False) -> dict[str, Any]:
        """Lets it pull over and over; what it moved."""
        return await self._ask(json.dumps({"mute": mute, "pull": asdict(traffic)}), timeout_s)

    async def close(self) -> None:
        """Ends the process; idempotent."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 10)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _ask(self, line: str, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line.encode() + b"\n")
        answer = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        if not answer:
            raise RuntimeError(f"worker {self.spec.worker_id} has ended")
        parsed: dict[str, Any] = json.loads(answer)
        if "error" in parsed:
            raise RuntimeError(f"worker {self.spec.worker_id}: {parsed['error']}")
        return parsed

    async def _frames(self) -> AsyncIterator[pb.RouterFrame]:
        yield pb.RouterFrame(router_id=ROUTER_ID, protocol_version=PROTOCOL_VERSION, epoch=self.epoch)
        while True:
            yield await self.commands.next_frame()

    async def _read(self, attached: asyncio.Future[None]) -> None:
        async for frame in self.stub.Attach(self._frames()):
            now_s = time.monotonic()
            if not attached.done():
                attached.set_result(None)
            for answer in frame.answers:
                self.commands.answered(answer)
            for event in frame.events:
                self._tell(self._tokens.pop(event.request_id, None), event, now_s)
                if event.HasField("failed") or event.tokens.finish_reason:
                    self._tell(self._finishes.pop(event.request_id, None), event, now_s)

    def _tell(self, future: asyncio.Future[float] | None, event: pb.Event, now_s: float) -> None:
        if future is None or future.done():
            return
        if event.HasField("failed"):
            future.set_exception(RuntimeError(f"{self.spec.worker_id}: {event.failed.message}"))
        else:
            future.set_result(now_s)
