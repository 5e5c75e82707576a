"""The router's core behind workers that do what a test says, and what many of its tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest
from grpc import aio
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.config import RouterConfig
from tandem.cluster.events import WaterfallLog
from tandem.cluster.metrics import RouterMetrics
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.proto.tandem_internal_v1_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from tandem.cluster.rpc import PROTOCOL_VERSION, Refusal, new_epoch
from tandem.cluster.types import Role, SamplingParams, Side
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.core import RouterCore
from tandem.router.link import WorkerLink
from tandem.router.members import Membership
from tandem.router.service import Delta, GenerateRequest, ModelCard

MODEL = "tiny"
WAIT_S = 20.0


# --- workers that do what a test says ---------------------------------------------------------------------------------


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Lets the loop run until `condition()`; fails after a bounded wait, saying what was waited for."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - what it looks at is plain state of code under test
                await asyncio.sleep(0.002)
    except TimeoutError:
        pytest.fail(f"waited {WAIT_S:g} s for {what}")


Script = Callable[[Any], "list[pb.Event]"]


class ScriptedWorker(WorkerServicer):
    """A worker's gRPC server without a worker: refuses, answers, dies and sends events as the test says."""

    def __init__(self, worker_id: str, role: Role, **status: Any) -> None:
        self.worker_id, self.role = worker_id, role
        self.epoch = int(status.pop("epoch", new_epoch()))
        self.calls: list[Any] = []
        """Requests in the order of their arrival."""
        self.refuse: dict[str, list[grpc.StatusCode]] = {}
        """Method to the statuses of its next calls."""
        self.hold: dict[str, asyncio.Event] = {}
        """Method to what its calls wait for before they are answered."""
        self.on_prefill: Script = lambda request: []
        self.on_decode: Script = lambda request: []
        self.reply_epoch: int | None = None
        self.attached_routers: list[str] = []
        self._fields = status
        self._streams: list[asyncio.Queue[pb.StepFrame | None]] = []
        self._server: aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = aio.server()
        add_WorkerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def die(self) -> None:
        """As kill -9 looks from outside: every connection breaks."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def status(self, **changes: Any) -> pb.WorkerStatus:
        fields: dict[str, Any] = {
            "worker_id": self.worker_id,
            "epoch": self.epoch,
            "role": self.role,
            "address": f"127.0.0.1:{self.port}",
            "kv_address": f"127.0.0.1:{self.port + 1}",
            "protocol_version": PROTOCOL_VERSION,
            "fingerprint": "f",
            "max_model_len": 1000,
            "block_size": 4,
            "num_blocks": 64,
            "free_blocks": 64,
            "credit_limit_blocks": 64,
            "max_waiting": 8,
            "max_running": 8,
        }
        return pb.WorkerStatus(**{**fields, **self._fields, **changes})

    def send(self, *events: pb.Event) -> None:
        for stream in self._streams:
            stream.put_nowait(pb.StepFrame(epoch=self.epoch, events=events))

    def break_streams(self) -> None:
        for stream in self._streams:
            stream.put_nowait(None)

    def leave(self) -> None:
        """Says that it has drained, and ends the streams."""
        for stream in self._streams:
            stream.put_nowait(pb.StepFrame(epoch=self.epoch, leaving=True))
        self.break_streams()

    def requests(self, kind: type[Any]) -> list[Any]:
        return [call for call in self.calls if isinstance(call, kind)]

    async def Attach(self, frames: AsyncIterator[pb.RouterFrame], context: Any) -> AsyncIterator[pb.StepFrame]:
        request = await anext(frames)
        if request.epoch != self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "epoch")
        stream: asyncio.Queue[pb.StepFrame | None] = asyncio.Queue()
        self._streams.append(stream)
        self.attached_routers.append(request.router_id)
        running: set[asyncio.Task[None]] = set()
        reading = asyncio.create_task(self._read_commands(frames, stream, running))
        try:
            yield pb.StepFrame(epoch=self.epoch)
            while (frame := await stream.get()) is not None:
                yield frame
        finally:
            for task in (reading, *running):
                task.cancel()
            self._streams.remove(stream)

    async def _read_commands(
        self,
        frames: AsyncIterator[pb.RouterFrame],
        stream: asyncio.Queue[pb.StepFrame | None],
        running: set[asyncio.Task[None]],
    ) -> None:
        async for frame in frames:
            for command in frame.commands:
                task = asyncio.create_task(self._answer(command, stream))
                running.add(task)
                task.add_done_callback(running.discard)

    async def _answer(self, command: pb.Command, stream: asyncio.Queue[pb.StepFrame | None]) -> None:
        """By the method of the same name, whose reply or refusal becomes the answer."""
        kind = command.WhichOneof("kind")
        method = {"prefill": self.Prefill, "reserve": self.Reserve, "decode": self.Decode, "abort": self.Abort}[kind]
        answer = pb.Answer(id=command.id, epoch=self.epoch)
        try:
            reply = await method(getattr(command, kind), RefusingContext())
        except Refusal as refusal:
            answer.code, answer.message = refusal.code.value[0], refusal.message
        else:
            answer.epoch = getattr(reply, "epoch", self.epoch)
            answer.credit_id = getattr(reply, "credit_id", 0)
        stream.put_nowait(pb.StepFrame(epoch=self.epoch, answers=[answer]))

    async def _take(self, method: str, request: Any, context: Any) -> int:
        self.calls.append(request)
        if getattr(request, "epoch", self.epoch) != self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"epoch: {request.epoch} is another life")
        if method in self.hold:
            await self.hold[method].wait()
        if self.refuse.get(method):
            await context.abort(self.refuse[method].pop(0), f"{method} refused by the script")
        return self.epoch if self.reply_epoch is None else self.reply_epoch

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.SubmitReply:
        epoch = await self._take("Prefill", request, context)
        self.send(*self.on_prefill(request))
        return pb.SubmitReply(epoch=epoch)

    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.ReserveReply:
        epoch = await self._take("Reserve", request, context)
        return pb.ReserveReply(epoch=epoch, credit_id=len(self.requests(pb.ReserveRequest)))

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.SubmitReply:
        epoch = await self._take("Decode", request, context)
        self.send(*self.on_decode(request))
        return pb.SubmitReply(epoch=epoch)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortReply:
        await self._take("Abort", request, context)
        return pb.AbortReply()

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:
        await self._take("Drain", request, context)
        return pb.DrainReply()


def event_of(sequence: pb.Sequence, side: Side, **kind: Any) -> pb.Event:
    """An event of that attempt: `tokens=(index, ids, finish_reason)` or `failed=(reason, retryable)`."""
    event = pb.Event(request_id=sequence.request_id, choice=sequence.choice)
    event.side = pb.SIDE_PREFILL if side is Side.PREFILL else pb.SIDE_DECODE
    event.attempt = sequence.prefill_attempt if side is Side.PREFILL else sequence.decode_attempt
    if "tokens" in kind:
        index, ids, finish = kind["tokens"]
        event.tokens.CopyFrom(pb.TokensEvent(index=index, finish_reason=finish))
        event.tokens.tokens.extend(pb.SampledToken(token_id=token_id) for token_id in ids)
    else:
        reason, retryable = kind["failed"]
        event.failed.CopyFrom(pb.FailedEvent(reason=reason, message="by the script", retryable=retryable))
    return event


class Rig:
    """Membership and core of a router with scripted workers behind real sockets, on the running loop."""

    event = staticmethod(event_of)
    until = staticmethod(until)

    def __init__(self, **config: Any) -> None:
        self.clock = MonotonicClock()
        self.members = Membership(router_id="r", clock=self.clock, heartbeat_timeout_s=1000)
        self.metrics = RouterMetrics(MODEL)
        self.core = RouterCore(
            RouterConfig(**{"unready_wait_s": WAIT_S, "max_attempts": 3, **config}),
            router_id="r",
            members=self.members,
            tokenizer=ByteTokenizer(300),
            metrics=self.metrics,
            log=WaterfallLog(None),
            clock=self.clock,
            card=ModelCard(id=MODEL, max_model_len=1000, created_unix_s=0),
        )
        self.workers: list[ScriptedWorker] = []

    async def __aenter__(self) -> Rig:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.core.close()
        await self.members.close()
        for worker in self.workers:
            await worker.die()

    async def worker(self, worker_id: str, role: Role, **status: Any) -> ScriptedWorker:
        """Starts a worker that has joined and is attached."""
        worker = ScriptedWorker(worker_id, role, **status)
        self.workers.append(worker)
        await worker.start()
        await self.heartbeat(worker)
        await until(lambda: self.link(worker_id).attached, f"{worker_id} to be attached")
        return worker

    async def split(self) -> tuple[ScriptedWorker, ScriptedWorker]:
        return await self.worker("p0", Role.PREFILL), await self.worker("d0", Role.DECODE)

    async def heartbeat(self, worker: ScriptedWorker, **changes: Any) -> None:
        await self.members.Heartbeat(worker.status(**changes), RefusingContext())

    def link(self, worker_id: str) -> WorkerLink:
        link = self.members.link(worker_id)
        assert link is not None
        return link

    def request(self, prompt: Sequence[int] = (1, 2, 3, 4, 5), **fields: Any) -> GenerateRequest:
        sampling = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **fields.pop("sampling", {})})
        return GenerateRequest(request_id="q", prompt_token_ids=tuple(prompt), sampling=sampling, **fields)

    async def collect(self, request: GenerateRequest) -> list[Delta]:
        async with asyncio.timeout(WAIT_S):
            return [delta async for delta in self.core.generate(request)]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"tandem:{name}", {"model_name": MODEL, **labels}) or 0.0

    def assert_nothing_left(self) -> None:
        """The router's own accounts are zero: corrections to the views, inboxes, places, requests in flight."""
        for member in self.members.members():
            link = member.link
            sent = link.sent
            owned = (sent.queued_prefill_tokens, sent.patient_prefill_tokens, sent.decode_rows)
            assert owned == (0, 0, 0), link.worker_id
            assert not link._inboxes
        assert self.core._admission.waiting == 0
        assert self.metric("requests_in_flight") == 0


class RefusingContext:
    """Stands for a gRPC context: `abort` raises `Refusal`."""

    async def abort(self, code: grpc.StatusCode, message: str) -> None:
        raise Refusal(code, message)


P, D = Side.PREFILL, Side.DECODE


def text_of(deltas: list[Any]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Any]) -> list[int]:
    return [token.token_id for delta in deltas for token in delta.tokens]


def answers(rig: Any, prefill: Any, decode: Any, ids: list[int]) -> None:
    """Scripts a pair that answers `ids` in the ordinary way, whatever output it resumes behind."""

    def on_prefill(request: pb.PrefillRequest) -> list[pb.Event]:
        have = len(request.sequence.output_token_ids)
        last = "length" if have + 1 == len(ids) else ""
        return [rig.event(request.sequence, P, tokens=(have, ids[have : have + 1], last))]

    def on_decode(request: pb.DecodeRequest) -> list[pb.Event]:
        have = len(request.sequence.output_token_ids)
        return [rig.event(request.sequence, D, tokens=(have, ids[have:], "length"))]

    prefill.on_prefill, decode.on_decode = on_prefill, on_decode
