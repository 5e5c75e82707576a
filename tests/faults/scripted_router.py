"""The router's part of `tandem.internal.v1.Worker`, one call at a time, so that a test can stop between any two."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio
from members import POLL_S, WAIT_S, Member
from tandem.cluster.messages import sampling_to_proto
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.rpc import PROTOCOL_VERSION
from tandem.cluster.types import SamplingParams, Side

SIDES = {pb.SIDE_PREFILL: Side.PREFILL, pb.SIDE_DECODE: Side.DECODE}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended. `kind`: `answer`, `failed:<reason>`, `refused:<status>`, `lost:<side>` or `silence`."""

    kind: str
    tokens: tuple[int, ...] = ()
    message: str = ""


class Refused(Exception):
    """A worker said no to a call."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code


class ScriptedRouter:
    """One router as the workers see it: a stream from each, and calls."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.events: list[tuple[str, pb.Event]] = []
        """(worker id, event), in order of arrival."""
        self.lost: set[str] = set()
        """Workers whose streams have ended."""
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def attach(self, member: Member) -> None:
        """Opens the stream; returns when the worker knows this router."""
        request = pb.RouterFrame(router_id=self.router_id, protocol_version=PROTOCOL_VERSION, epoch=member.epoch)
        attached = asyncio.Event()
        self.lost.discard(member.worker_id)

        async def read() -> None:
            try:
                async for frame in member.stub.Attach(iter([request])):
                    attached.set()
                    self.events += [(member.worker_id, event) for event in frame.events]
            except aio.AioRpcError:
                pass
            finally:
                self.lost.add(member.worker_id)

        self._readers[member.worker_id] = asyncio.create_task(read())
        await asyncio.wait_for(attached.wait(), WAIT_S)

    async def detach(self) -> None:
        """Breaks every stream."""
        for task in self._readers.values():
            task.cancel()
        await asyncio.gather(*self._readers.values(), return_exceptions=True)
        self._readers.clear()

    def events_of(self, request_id: str, attempt: int) -> list[pb.Event]:
        """What workers said about one attempt."""
        return [e for _, e in self.events if e.request_id == request_id and e.attempt == attempt]


class Request:
    """One attempt at one request, between one prefill worker and one decode worker."""

    def __init__(
        self,
        router: ScriptedRouter,
        request_id: str,
        prefill: Member,
        decode: Member,
        prompt: Iterable[int],
        *,
        max_tokens: int,
        kv_address: str | None = None,
        attempt: int = 1,
        timeout_s: float = WAIT_S,
        sampling: SamplingParams | None = None,
    ) -> None:
        self.router = router
        self.request_id = request_id
        self.prefill_worker = prefill
        self.decode_worker = decode
        self.prompt = tuple(prompt)
        self.kv_address = kv_address or prefill.kv_address
        self.attempt = attempt
        self.timeout_s = timeout_s
        self.sampling = sampling or SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.credit_id = 0
        self.prefilled = False
        self.decoding = False

    # The calls, each once. `Refused`.

    async def reserve(self, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "decode_attempt": self.attempt,
            "router_id": self.router.router_id,
            "context_tokens": len(self.prompt),
            "epoch": self.decode_worker.epoch,
        }
        call = self.decode_worker.stub.Reserve(pb.ReserveRequest(**(fields | changes)), timeout=WAIT_S)
        self.credit_id = (await _asked(call)).credit_id

    async def prefill(self, **changes: Any) -> None:
        fields: dict[str, Any] = {"handoff": True, "epoch": self.prefill_worker.epoch}
        request = pb.PrefillRequest(sequence=self.sequence(), **(fields | changes))
        await _asked(self.prefill_worker.stub.Prefill(request, timeout=WAIT_S))
        self.prefilled = True

    async def decode(self, *, local: bool = False, **changes: Any) -> None:
        fields: dict[str, Any] = {"credit_id": self.credit_id, "epoch": self.decode_worker.epoch}
        request = pb.DecodeRequest(sequence=self.sequence(), **(fields | changes))
        if not local:
            request.peer.worker_id = self.prefill_worker.worker_id
            request.peer.epoch = self.prefill_worker.epoch
            request.peer.kv_address = self.kv_address
        await _asked(self.decode_worker.stub.Decode(request, timeout=WAIT_S))
        self.decoding = True

    async def abort(self, *members: Member) -> None:
        """Ends this attempt on the members named; none: on both."""
        message = pb.AbortRequest(
            request_id=self.request_id,
            prefill_attempt=self.attempt,
            decode_attempt=self.attempt,
            router_id=self.router.router_id,
        )
        for member in members or (self.prefill_worker, self.decode_worker):
            if member.alive:
                await member.stub.Abort(message, timeout=WAIT_S)

    def sequence(self) -> pb.Sequence:
        return pb.Sequence(
            request_id=self.request_id,
            prefill_attempt=self.attempt,
            decode_attempt=self.attempt,
            prompt_token_ids=self.prompt,
            sampling=sampling_to_proto(self.sampling),
            timeout_s=self.timeout_s,
            router_id=self.router.router_id,
        )

    # What came of it

    def tokens(self) -> tuple[int, ...]:
        """Output tokens by index, as far as they have come without a gap; a token that is said twice, and differently,
        fails the test.
        """
        said: dict[int, int] = {}
        for event in self.router.events_of(self.request_id, self.attempt):
            for index, token in enumerate(event.tokens.tokens, event.tokens.index):
                assert said.setdefault(index, token.token_id) == token.token_id, f"output {index} was said twice"
        return tuple(said[index] for index in range(len(said)) if index in said)

    def ended(self) -> Outcome | None:
        """How it ended, as a router would see it; None while it goes on. After the first token only the decode worker
        matters; a prefill worker that fails then, or is lost, is no failure of the request.
        """
        needs_prefill = True
        for event in self.router.events_of(self.request_id, self.attempt):
            side = SIDES[event.side]
            if event.HasField("tokens"):
                needs_prefill = False
                if side is Side.DECODE and event.tokens.finish_reason:
                    return Outcome("answer", self.tokens())
            elif side is Side.DECODE or needs_prefill:
                return Outcome(f"failed:{event.failed.reason}", message=event.failed.message)
        if self.decode_worker.worker_id in self.router.lost:
            return Outcome("lost:decode")
        if needs_prefill and self.prefill_worker.worker_id in self.router.lost:
            return Outcome("lost:prefill")
        return None

    async def wait_first_token(self) -> None:
        await self.wait_tokens(1)

    async def wait_tokens(self, count: int) -> None:
        """Returns when at least so many output tokens have come."""
        try:
            async with asyncio.timeout(WAIT_S):
                while len(self.tokens()) < count:
                    ended = self.ended()
                    assert ended is None or ended.kind == "answer", f"{self.request_id}: {ended}"
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"{self.request_id}: {len(self.tokens())} of {count} tokens came") from None

    async def outcome(self) -> Outcome:
        """Waits for the end, which must come within the request's own time."""
        try:
            async with asyncio.timeout(self.timeout_s + 5.0):
                while (ended := self.ended()) is None:  # noqa: ASYNC110 - what workers have said
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"{self.request_id}: neither answer nor error within its {self.timeout_s} s") from None
        return ended


async def _asked(call: Any) -> Any:
    try:
        return await call
    except aio.AioRpcError as error:
        raise Refused(error.code(), error.details() or "") from error
