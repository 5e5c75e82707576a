"""The gRPC front end: `tandem.v1` on grpc.aio, with standard health checking and reflection, so that grpcurl works.

Options go through the same checks as HTTP's (`params`). A refusal is a status from `errors`; it carries google.rpc
details (field violations, retry info) for clients that read them, and "retry-after-ms" in the trailing metadata for
those that do not. A canceled call cancels the request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from contextlib import AsyncExitStack, aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..cluster.proto import tandem_v1_pb2 as pb
from ..cluster.proto import tandem_v1_pb2_grpc as pb_grpc
from ..cluster.rpc import SERVER_OPTIONS
from ..cluster.types import SampledToken, Timings
from .door import DEADLINE_GRACE_S, Door, shutting_down
from .errors import DeadlineExceeded, InvalidRequest, ServiceError
from .grpc_checks import RefuseMalformed
from .openai_requests import parse_messages
from .openai_responses import Usage, json_logprob
from .params import Fields, check_prompt_length, parse_options, parse_token_ids, parse_top_logprobs
from .service import Delta, GenerateRequest, ModelCard
from .slo_classes import FIELDS, Promise, SLOClasses, parse_promise

_log = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["Tandem"]
SERVICE_NAME: str = _SERVICE.full_name
MAX_CONCURRENT_CALLS = 16_384
MAX_CALLS_PER_CONNECTION = 4096
MAX_METADATA_BYTES = 32 * 1024
MAX_REQUEST_ID_CHARS = 128
HEALTH_POLL_S = 0.25
"""How soon `Watch`ers of the health service are told of a change; `Check` always asks anew."""
MESSAGE_S = 0.00015
"""About what a message takes of the event loop, whatever is in it. Between two of its messages a stream leaves so much
time to every other one: where that is longer than a step, the loop could not send each token by itself, and what has
come meanwhile leaves as one.
"""


class TandemServicer(pb_grpc.TandemServicer):
    """`tandem.v1.Tandem`. Handlers write to the context instead of yielding, so that a cancel always ends in them."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._slo_classes = SLOClasses(door.config)
        self._streams = 0
        """Answers that are streamed now."""

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> None:
        """See tandem_v1.proto."""
        try:
            self._door.check_key(_authorization(context))
            with self._door.admitted(), self._door.bodies.holding(request.ByteSize()):
                prepared = await self._prepare(request, _remaining_s(context))
                async with asyncio.timeout(prepared.timeout_s + DEADLINE_GRACE_S):
                    await self._run(prepared, context)
        except ServiceError as error:
            await abort(context, error, self._door)
        except TimeoutError:
            await abort(context, DeadlineExceeded("the answer was not taken within its time"), self._door)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._door.closing or task is None:
                raise
            task.uncancel()
            await abort(context, shutting_down(), self._door)
        except Exception:
            _log.exception("unexpected error at the gRPC door")
            await abort(context, ServiceError("internal error; the router's log has more"), self._door)

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse]
    ) -> pb.ListModelsResponse:
        """See tandem_v1.proto."""
        try:
            self._door.check_key(_authorization(context))
        except ServiceError as error:
            await abort(context, error, self._door)
        cards = self._door.service.models()
        return pb.ListModelsResponse(
            models=[
                pb.Model(id=card.id, max_model_len=card.max_model_len, created_unix_s=card.created_unix_s)
                for card in cards
            ]
        )

    async def _prepare(self, request: pb.GenerateRequest, remaining_s: float) -> GenerateRequest:
        arrival_s = self._door.now_s()
        card = self._door.card(request.model or None)
        limits = self._door.limits(card)
        fields = Fields(_plain(request.sampling), prefix="sampling.")
        options = parse_options(fields, limits, top_logprobs=parse_top_logprobs(fields, "top_logprobs"))
        promise = self._promise(request)
        param, ids = await self._tokenize(request, card)
        return GenerateRequest(
            request_id=f"grpc-{secrets.token_hex(12)}",
            prompt_token_ids=ids,
            sampling=options.resolve(len(ids), param=param),
            n=options.n,
            stop=options.stop,
            timeout_s=min(remaining_s, self._door.config.request_timeout_s),
            client_request_id=request.request_id[:MAX_REQUEST_ID_CHARS],
            continuation=not request.HasField("chat"),
            promise=promise,
            arrival_s=arrival_s,
        )

    def _promise(self, request: pb.GenerateRequest) -> Promise:
        values = {
            name: getattr(request, name)
            for name in (FIELDS.slo_class, FIELDS.ttft_ms, FIELDS.tpot_ms)
            if name == FIELDS.slo_class or request.HasField(name)
        }
        return parse_promise(Fields(values), self._slo_classes, FIELDS)

    async def _tokenize(self, request: pb.GenerateRequest, card: ModelCard) -> tuple[str, tuple[int, ...]]:
        """The field that holds the prompt, and its token ids."""
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return "text", await self._door.encode(request.text, add_special=True, param="text")
        if kind == "chat":
            messages = [{"role": item.role, "content": item.content} for item in request.chat.messages]
            parsed = parse_messages(Fields({"messages": messages}, prefix="chat."))
            return "chat.messages", await self._door.encode_chat(parsed, param="chat.messages")
        if kind == "tokens":
            ids = request.tokens.token_ids
            check_prompt_length(len(ids), card.max_model_len, param="tokens.token_ids")
            fields = Fields({}, prefix="tokens.")
            return "tokens.token_ids", parse_token_ids(fields, "token_ids", ids, self._door.tokenizer.vocab_size)
        raise InvalidRequest("prompt: is missing; allowed: one of text, chat, tokens", param="prompt")

    async def _run(
        self, request: GenerateRequest, context: aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> None:
        usage = Usage(prompt_tokens=len(request.prompt_token_ids))
        unfinished, messages = request.n, 0
        async with AsyncExitStack() as streaming:
            deltas = await streaming.enter_async_context(aclosing(self._door.run(request)))
            async for delta in deltas:
                usage.add(delta)
                unfinished -= delta.finish_reason is not None
                if not (delta.text or delta.tokens or delta.finish_reason):
                    continue
                response = self._response(request, delta)
                if not unfinished:
                    response.usage.prompt_tokens = usage.prompt_tokens
                    response.usage.completion_tokens = usage.completion_tokens
                    response.usage.cached_tokens = usage.cached_tokens
                await context.write(response)
                messages += 1
                if messages == 1:
                    self._streams += 1
                    streaming.callback(self._stream_ended)
                if unfinished and (pause := pause_s(messages, self._streams)):
                    await asyncio.sleep(pause)

    def _stream_ended(self) -> None:
        self._streams -= 1

    def _response(self, request: GenerateRequest, delta: Delta) -> pb.GenerateResponse:
        response = pb.GenerateResponse(
            request_id=request.request_id,
            choice=delta.choice,
            text=delta.text,
            token_ids=[token.token_id for token in delta.tokens],
            finish_reason="" if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason="" if delta.stop_reason is None else str(delta.stop_reason),
        )
        if request.sampling.top_logprobs is not None:
            response.logprobs.extend(self._token_logprob(token) for token in delta.tokens)
        if delta.timings is not None:
            response.timings.CopyFrom(timings_to_proto(delta.timings))
        return response

    def _token_logprob(self, token: SampledToken) -> pb.TokenLogprob:
        piece = self._door.tokenizer.token_bytes
        return pb.TokenLogprob(
            token_id=token.token_id,
            logprob=json_logprob(token.logprob),
            token=piece(token.token_id),
            top=[
                pb.TopLogprob(token_id=token_id, logprob=json_logprob(logprob), token=piece(token_id))
                for token_id, logprob in token.top
            ],
        )


def pause_s(messages: int, streams: int) -> float:
    """How long a stream that has sent so many messages, one of so many streams, leaves the loop to the others before it
    sends the next. The first tokens wait for nobody.
    """
    return streams * MESSAGE_S if messages > 1 and streams > 1 else 0.0


def timings_to_proto(timings: Timings) -> pb.Timings:
    """`cluster.types.Timings` for the wire; TPOT stays absent where there is none."""
    return pb.Timings(
        queue_s=timings.queue_s,
        prefill_s=timings.prefill_s,
        ttft_s=timings.ttft_s,
        transfer_s=timings.transfer_s,
        exposed_transfer_s=timings.exposed_transfer_s,
        decode_queue_s=timings.decode_queue_s,
        decode_s=timings.decode_s,
        e2e_s=timings.e2e_s,
        tpot_s=timings.tpot_s,
        prefill_worker=timings.prefill_worker,
        decode_worker=timings.decode_worker,
        path=timings.path,
        transferred_bytes=timings.transferred_bytes,
        transport=timings.transport,
        slo_class=timings.slo_class,
    )


def _plain(options: pb.SamplingOptions) -> dict[str, Any]:
    """The fields that the client set; repeated ones as lists, maps as dicts."""
    values: dict[str, Any] = {}
    for descriptor, value in options.ListFields():
        if descriptor.name == "logit_bias":
            values[descriptor.name] = dict(value)
        else:
            values[descriptor.name] = value if isinstance(value, bool | int | float) else list(value)
    return values


def _authorization(context: aio.ServicerContext[Any, Any]) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("latin-1")
    return None


def _remaining_s(context: aio.ServicerContext[Any, Any]) -> float:
    remaining_s = context.time_remaining()
    return math.inf if remaining_s is None else max(remaining_s, 0.001)


async def abort(context: aio.ServicerContext[Any, Any], error: ServiceError, door: Door) -> NoReturn:
    """Ends the call with the error's status, google.rpc details and retry-after."""
    door.count_refusal(error)
    details: list[message.Message] = []
    metadata: list[tuple[str, str | bytes]] = []
    if error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        retry_after_ms = math.ceil(max(error.retry_after_s, 0.0) * 1000)
        delay = duration_pb2.Duration(seconds=retry_after_ms // 1000, nanos=retry_after_ms % 1000 * 1_000_000)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        metadata.append(("retry-after-ms", str(retry_after_ms)))
    if details:
        status = status_pb2.Status(code=grpc.StatusCode[error.grpc_code].value[0], message=error.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(grpc.StatusCode[error.grpc_code], error.message, trailing_metadata=tuple(metadata))
    raise AssertionError("context.abort returned")


class ReadinessHealth(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """grpc.health.v1 for the server ("") and for `tandem.v1.Tandem`: SERVING exactly while requests can be served."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self._door = door
        self._told: int | None = None

    async def refresh(self) -> None:
        """Tells watchers where readiness has changed."""
        response = health_pb2.HealthCheckResponse
        now = response.SERVING if self._door.readiness().ready else response.NOT_SERVING
        if now != self._told:
            self._told = now
            for service in ("", SERVICE_NAME):
                await self.set(service, now)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Current readiness, not the last poll's."""
        await self.refresh()
        return await super().Check(request, context)

    async def poll(self) -> None:
        """Refreshes until canceled."""
        while True:
            await self.refresh()
            await asyncio.sleep(HEALTH_POLL_S)


def build_grpc_server(door: Door) -> tuple[aio.Server, ReadinessHealth]:
    """A server without a port yet, and the health service whose `poll` its owner runs."""
    limits = {
        "grpc.max_receive_message_length": door.config.max_body_bytes,
        "grpc.max_metadata_size": MAX_METADATA_BYTES,
        "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
        "grpc.http2.max_concurrent_streams": MAX_CALLS_PER_CONNECTION,
        "grpc.server_handshake_timeout_ms": 10_000,
        "grpc.max_connection_idle_ms": 600_000,
        # Pings more often than SERVER_OPTIONS allows end the connection after so many.
        "grpc.http2.max_ping_strikes": 3,
        "grpc.so_reuseport": int(door.config.processes > 1),
    }
    options = [*(option for option in SERVER_OPTIONS if option[0] not in limits), *limits.items()]
    takes = {f"/{SERVICE_NAME}/{method.name}": method.input_type.full_name for method in _SERVICE.methods}
    server = aio.server(
        options=options, maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS, interceptors=(RefuseMalformed(takes),)
    )
    pb_grpc.add_TandemServicer_to_server(TandemServicer(door), server)
    readiness = ReadinessHealth(door)
    health_pb2_grpc.add_HealthServicer_to_server(readiness, server)
    services = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(services, server)
    return server, readiness
