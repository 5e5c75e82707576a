"""A whole worker on the test's own loop, without a router: the test speaks the router's part over real gRPC."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from owned import owned
from tandem.cluster.config import EngineConfig, WorkerConfig
from tandem.cluster.engine.plan import StepOutput, StepPlan
from tandem.cluster.launch.compose import WorkerRuntime
from tandem.cluster.messages import sampling_to_proto
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import WorkerStub
from tandem.cluster.rpc import PROTOCOL_VERSION, open_channel
from tandem.cluster.types import Role, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))  # for `scenario`

WAIT_S = 20.0


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Lets the loop run until `condition()`; fails after a bounded wait, saying what was waited for."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - what it looks at is plain state of code under test
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(f"waited {WAIT_S:g} s for {what}")


class GatedDevice:
    """Lets a device's steps end only while `gate` is set; with `error` set, the next step raises it."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.gate = threading.Event()
        self.gate.set()
        self.computing = threading.Event()
        self.error: Exception | None = None
        self.late_steps_total = 0
        self.plans_ahead, self.looks_ahead = device.plans_ahead, device.looks_ahead
        self.wait, self.done = device.wait, device.done

    def launch(self, plan: StepPlan) -> None:
        self.computing.set()
        self._device.launch(plan)

    def collect(self) -> StepOutput:
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        output: StepOutput = self._device.collect()
        return output


class Bench:
    """One worker, a router's stream to it, and everything it has said on that stream."""

    until = staticmethod(until)

    def __init__(self, role: Role, *, engine: dict[str, Any] | None = None, **worker: Any) -> None:
        self.failures: list[BaseException] = []
        small: dict[str, Any] = {
            "model": "dummy:tiny-llama",
            "device": "paced",
            "kv_cache_bytes": 2**20,
            "paced_step_s": 0.0001,
            "paced_prefill_token_s": 0.0,
            "paced_decode_row_s": 0.0,
        }
        config = WorkerConfig(worker_id=role.value, role=role, engine=EngineConfig(**{**small, **(engine or {})}))
        self.runtime = WorkerRuntime(replace(config, **worker), self.failures.append)
        self.events: list[pb.Event] = []
        self.stream_ended = False
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Bench:
        await self.runtime.start()
        shell = self.runtime.shell
        assert shell is not None
        self.shell = shell
        self.device = GatedDevice(shell.engine._device)
        shell.engine._device = self.device  # type: ignore[assignment]
        self.channel = open_channel(shell.address)
        self.stub = WorkerStub(self.channel)
        await self.attach()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.device.gate.set()
        await self.detach()
        await self.channel.close()
        await self.runtime.stop()

    async def attach(self) -> None:
        """Opens the router's stream, beside an older one if there is one."""
        request = pb.RouterFrame(router_id="r", protocol_version=PROTOCOL_VERSION, epoch=self.shell.facts.epoch)
        attached = asyncio.Event()
        self.stream_ended = False

        async def read() -> None:
            async for frame in self.stub.Attach(iter([request])):
                attached.set()
                self.events.extend(frame.events)
            self.stream_ended = True

        self._reader = asyncio.create_task(read())
        await attached.wait()

    async def detach(self) -> None:
        """Breaks the router's stream."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def sequence(self, tokens: int = 20, attempt: int = 1, **fields: Any) -> pb.Sequence:
        sampling = {"max_tokens": 4, "temperature": 0.0, **fields.pop("sampling", {})}
        values = {"request_id": "q", "timeout_s": 60.0, "router_id": "r", **fields}
        return pb.Sequence(
            prompt_token_ids=range(1, tokens + 1),
            prefill_attempt=attempt,
            decode_attempt=attempt,
            sampling=sampling_to_proto(SamplingParams(**sampling)),
            **values,
        )

    async def prefill(self, sequence: pb.Sequence, *, handoff: bool = True, epoch: int | None = None) -> None:
        epoch = self.shell.facts.epoch if epoch is None else epoch
        await self.stub.Prefill(pb.PrefillRequest(sequence=sequence, handoff=handoff, epoch=epoch), timeout=WAIT_S)

    async def reserve(self, sequence: pb.Sequence, **changes: Any) -> int:
        fields: dict[str, Any] = {
            "request_id": sequence.request_id,
            "choice": sequence.choice,
            "decode_attempt": sequence.decode_attempt,
            "router_id": "r",
            "context_tokens": len(sequence.prompt_token_ids) + len(sequence.output_token_ids),
            "epoch": self.shell.facts.epoch,
        }
        reply = await self.stub.Reserve(pb.ReserveRequest(**{**fields, **changes}), timeout=WAIT_S)
        return int(reply.credit_id)

    async def decode(self, sequence: pb.Sequence, credit_id: int, peer: Bench | None = None, **changes: Any) -> None:
        request = pb.DecodeRequest(sequence=sequence, credit_id=credit_id, epoch=self.shell.facts.epoch)
        if peer is not None:
            facts = peer.shell.facts
            request.peer.CopyFrom(
                pb.PrefillPeer(worker_id=facts.worker_id, epoch=facts.epoch, kv_address=peer.shell.kv_address)
            )
        request.MergeFrom(pb.DecodeRequest(**changes))
        await self.stub.Decode(request, timeout=WAIT_S)

    async def abort(self, attempt: int = 1, choice: int = 0) -> None:
        request = pb.AbortRequest(
            request_id="q", choice=choice, prefill_attempt=attempt, decode_attempt=attempt, router_id="r"
        )
        await self.stub.Abort(request, timeout=WAIT_S)

    def tokens(self, choice: int = 0, attempt: int = 1) -> dict[int, int]:
        """Output index to token, as this worker has said; two different tokens for one index fail."""
        said: dict[int, int] = {}
        for event in self.events:
            if event.HasField("tokens") and (event.choice, event.attempt) == (choice, attempt):
                for index, token in enumerate(event.tokens.tokens, event.tokens.index):
                    assert said.setdefault(index, token.token_id) == token.token_id
        return said

    def failed(self) -> list[str]:
        return [event.failed.reason for event in self.events if event.HasField("failed")]

    def finished(self) -> bool:
        return any(event.tokens.finish_reason for event in self.events if event.HasField("tokens"))

    def leftovers(self) -> dict[str, int]:
        """What somebody still owns here."""
        return owned(self.shell.status())

    async def clean(self) -> None:
        """Returns when nothing is left; proves the ledger on the engine's own thread."""
        await until(lambda: not self.leftovers() and self.shell.idle, f"nothing to be left of {self.leftovers()}")
        check = self.shell.engine.submit(lambda scheduler: scheduler.check_integrity())
        await asyncio.wrap_future(check)


@pytest.fixture
def bench() -> type[Bench]:
    """`async with bench(Role.PREFILL) as worker: await worker.prefill(worker.sequence())`."""
    return Bench


@pytest.fixture
def gated() -> type[GatedDevice]:
    return GatedDevice
