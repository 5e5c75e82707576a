"""Workers that answer at once, for measuring a router alone: the real gRPC servicer, streams and heartbeats of a worker
around services that compute nothing and hand nothing off.

`python -m tandem.cluster.bench.router_worker --registry HOST:PORT` runs a prefill and a decode worker in one process,
prints a JSON line with their addresses and ends with its standard input. A paced engine would do, but its own scheduler
takes more of a processor than the router that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..clock import MonotonicClock
from ..config import WorkerConfig
from ..engine.scheduler_events import SchedulerEvent
from ..proto import tandem_internal_v1_pb2 as pb
from ..proto.tandem_internal_v1_pb2_grpc import RegistryStub, add_WorkerServicer_to_server
from ..rpc import HEARTBEAT_TIMEOUT_S, PROTOCOL_VERSION, make_server, new_epoch, open_channel
from ..types import Role, Side
from ..worker.outbox import Outbox
from ..worker.servicer import Servicer
from ..worker.services import DecodeHandler, LiveSequence, PrefillHandler
from ..worker.shell import WorkerFacts, WorkerShell

BLOCKS = 2**24
BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
HEARTBEAT_S = 0.25
MAX_UNREAD_FRAMES = 4
"""A stream with so many frames unread gets no step: a router that is the bottleneck is not buried under frames."""


class _Services:
    """What the two have in common: nothing to free, nothing to expire."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._flushing = False

    def _post(self, sequence: pb.Sequence, event: pb.Event, attempt: int, side: Side) -> None:
        """Adds an event to the router's next frame; all of one turn of the loop leave in one."""
        event.request_id, event.choice, event.attempt = sequence.request_id, sequence.choice, attempt
        event.side = pb.SIDE_PREFILL if side is Side.PREFILL else pb.SIDE_DECODE
        self._outbox.post(sequence.router_id, event)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._outbox.flush()

    def on_event(self, sequence: LiveSequence, event: SchedulerEvent) -> None:
        raise AssertionError("there is no engine")

    def end(self, sequence: LiveSequence, reason: str) -> None:
        raise AssertionError("the shell keeps no sequences")

    def tick(self, now_s: float) -> None:
        """Nothing expires."""

    def fill_status(self, status: pb.WorkerStatus) -> None:
        """Nothing to add."""

    def idle(self) -> bool:
        return True

    async def close(self) -> None:
        """Nothing to end."""


class InstantPrefill(_Services, PrefillHandler):
    """The first token, in the turn of the loop that takes the prompt."""

    async def prefill(self, request: pb.PrefillRequest) -> None:
        sequence = request.sequence
        tokens = pb.TokensEvent(
            index=0,
            tokens=[pb.SampledToken(token_id=token_at(0))],
            finish_reason="" if request.handoff else "length",
            prefill=pb.PrefillTimings(),
        )
        self._post(sequence, pb.Event(tokens=tokens), sequence.prefill_attempt, Side.PREFILL)

    def abort(self, request: pb.AbortRequest) -> None:
        """Nothing is kept."""


@dataclass(slots=True)
class _Row:
    sequence: pb.Sequence
    index: int


class InstantDecode(_Services, DecodeHandler):
    """One token for every row a step, a step every `step_s`."""

    def __init__(self, outbox: Outbox, step_s: float) -> None:
        super().__init__(outbox)
        self._step_s = step_s
        self._rows: dict[tuple[str, int], _Row] = {}
        self._credits = 0
        self._work = asyncio.Event()

    async def reserve(self, request: pb.ReserveRequest) -> int:
        self._credits += 1
        return self._credits

    async def decode(self, request: pb.DecodeRequest) -> None:
        sequence = request.sequence
        self._rows[sequence.request_id, sequence.choice] = _Row(sequence, 1)
        self._work.set()

    def abort(self, request: pb.AbortRequest) -> None:
        self._rows.pop((request.request_id, request.choice), None)

    def router_gone(self, router_id: str) -> None:
        for key, row in list(self._rows.items()):
            if row.sequence.router_id == router_id:
                del self._rows[key]

    async def run(self) -> None:
        """The steps; until canceled."""
        while True:
            await self._work.wait()
            await asyncio.sleep(self._step_s)
            if self._outbox.most_unread < MAX_UNREAD_FRAMES:
                self._step()

    def _step(self) -> None:
        for key, row in list(self._rows.items()):
            last = row.index + 1 >= row.sequence.sampling.max_tokens
            first = 0 if row.index == 1 else row.index  # the first event repeats the prefill worker's token
            tokens = pb.TokensEvent(
                index=first,
                tokens=[pb.SampledToken(token_id=token_at(index)) for index in range(first, row.index + 1)],
                finish_reason="length" if last else "",
            )
            if first == 0:
                tokens.decode.transport = "none"
            self._post(row.sequence, pb.Event(tokens=tokens), row.sequence.decode_attempt, Side.DECODE)
            row.index += 1
            if last:
                del self._rows[key]
        if not self._rows:
            self._work.clear()


def token_at(index: int) -> int:
    """A letter: every vocabulary has them, and none of them ends an answer."""
    return 97 + index % 26


class InstantWorker:
    """One worker on the running loop."""

    def __init__(self, role: Role, registries: Sequence[str], step_s: float) -> None:
        facts = WorkerFacts(
            worker_id=f"instant-{role}",
            epoch=new_epoch(),
            model="instant",
            fingerprint="instant",
            kv_layout=b"instant",
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=2**31,
            device="instant",
        )
        self._registries = registries
        self._shell = WorkerShell(WorkerConfig(worker_id=facts.worker_id, role=role), facts, MonotonicClock())
        self._decode = InstantDecode(self._shell.outbox, step_s)
        self._server = make_server()
        servicer = Servicer(self._shell, InstantPrefill(self._shell.outbox), self._decode)
        add_WorkerServicer_to_server(servicer, self._server)
        self.epoch = facts.epoch
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def serve(self) -> None:
        """Until canceled."""
        await self._server.start()
        try:
            await asyncio.gather(self._decode.run(), *map(self._heartbeats, self._registries))
        finally:
            await self._server.stop(0)

    def status(self) -> pb.WorkerStatus:
        """A worker with room for everybody."""
        facts = self._shell.facts
        return pb.WorkerStatus(
            worker_id=facts.worker_id,
            epoch=facts.epoch,
            role=self._shell.role,
            address=self.address,
            kv_address=self.address,
            protocol_version=PROTOCOL_VERSION,
            model=facts.model,
            fingerprint=facts.fingerprint,
            kv_layout=facts.kv_layout,
            max_model_len=facts.max_model_len,
            device=facts.device,
            pid=os.getpid(),
            block_size=facts.block_size,
            num_blocks=BLOCKS,
            free_blocks=BLOCKS,
            credit_limit_blocks=BLOCKS,
            max_waiting=2**20,
            max_running=2**20,
            step_time=pb.StepTime(step_s=1e-5, prefill_token_s=1e-9, decode_row_s=1e-9, context_token_s=0.0),
            steps_total=1000,
            integrity_ok=True,
        )

    async def _heartbeats(self, registry: str) -> None:
        async with open_channel(registry) as channel:
            stub = RegistryStub(channel)
            while True:
                with contextlib.suppress(OSError):
                    await stub.Heartbeat(self.status(), timeout=HEARTBEAT_TIMEOUT_S * 10)
                await asyncio.sleep(HEARTBEAT_S)


async def _serve(registries: Sequence[str], step_s: float) -> None:
    workers = [InstantWorker(role, registries, step_s) for role in (Role.PREFILL, Role.DECODE)]
    serving = asyncio.gather(*(worker.serve() for worker in workers))
    addresses = {role: {"address": w.address, "epoch": w.epoch} for role, w in zip("pd", workers, strict=True)}
    print(json.dumps({"prefill": addresses["p"], "decode": addresses["d"]}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


def main() -> None:
    """Serves until standard input ends."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", required=True, nargs="+", help="of each router process")
    parser.add_argument("--step-ms", type=float, default=1.0)
    options = parser.parse_args()
    if not 0 <= options.step_ms < math.inf:
        parser.error(f"--step-ms: {options.step_ms:g} is not allowed; allowed: 0 or more")
    uvloop.run(_serve(options.registry, options.step_ms / 1000))


if __name__ == "__main__":
    main()
