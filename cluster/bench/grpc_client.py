"""The client of Tandem's own gRPC API (`tandem.v1`): messages are stamped as they come and read when all are there.

Python's gRPC takes about three times the processor time for a streamed token that `client` takes over HTTP: where the
client shares its cores with the server, HTTP disturbs less what is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from ..proto import tandem_v1_pb2 as pb
from ..proto import tandem_v1_pb2_grpc as pb_grpc
from ..tls import ClientTLS
from ..workload.datasets import BenchRequest
from ..workload.report import RequestRecord
from .server import ServerUnusable

_GENERATE = "/tandem.v1.Tandem/Generate"
_LIST_TIMEOUT_S = 30.0
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", 64 * 2**20))
_SLO_HEADERS = {"x-slo-class": "slo_class", "x-slo-ttft-ms": "slo_ttft_ms", "x-slo-tpot-ms": "slo_tpot_ms"}


def in_short(details: str) -> str:
    """What of gRPC's words about a server that it could not reach is for people."""
    if "Failed parsing HTTP/2" in details:
        return "what listens there does not speak gRPC; is it the HTTP port?"
    return "Connection refused" if "Connection refused" in details else details


def grpc_address(url: str) -> tuple[str, bool]:
    """`host:port` and whether TLS is meant, of `host:port`, `grpc://`, `http://`, `grpcs://` or `https://`."""
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("grpc", "grpcs", "http", "https") or not parts.hostname or port is None:
        raise ValueError(f"base_url: {url!r} is not allowed; allowed with tandem-grpc: host:port, grpcs://host:port")
    return parts.netloc.rpartition("@")[2], parts.scheme in ("grpcs", "https")


class GrpcSender:
    """Sends requests to one router. `send` is a `Send`; made inside a running event loop, closed at the end."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        tls: ClientTLS,
        temperature: float | None,
        timeout_s: float,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`headers`: those that name SLOs become fields, the others metadata. Raises ValueError."""
        self.model = ""
        self._url = url
        self._temperature = temperature
        self._timeout_s = timeout_s
        self._slo: dict[str, Any] = {}
        metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        for name, value in headers:
            field = _SLO_HEADERS.get(name.lower())
            if field is None:
                metadata.append((name.lower(), value))
            else:
                self._slo[field] = value if field == "slo_class" else _milliseconds(name, value)
        self._metadata = tuple(metadata)
        address, secure = grpc_address(url)
        if secure:
            ca, identity = tls.load()
            pair = (None, None) if identity is None else (identity.key, identity.cert)
            self._channel = aio.secure_channel(address, grpc.ssl_channel_credentials(ca, *pair), options=_OPTIONS)
        else:
            self._channel = aio.insecure_channel(address, options=_OPTIONS)
        self._generate = self._channel.unary_stream(_GENERATE)  # bytes out, bytes in: read when the answer has ended

    async def models(self) -> list[pb.Model]:
        """What is served. Raises ServerUnusable."""
        try:
            listed = await pb_grpc.TandemStub(self._channel).ListModels(
                pb.ListModelsRequest(), timeout=_LIST_TIMEOUT_S, metadata=self._metadata
            )
        except aio.AioRpcError as error:
            raise ServerUnusable(f"{self._url}: {error.code().name}: {in_short(error.details() or '')}") from None
        if not listed.models:
            raise ServerUnusable(f"{self._url} lists no model")
        return list(listed.models)

    async def send(self, request: BenchRequest, due_s: float, request_id: str = "") -> RequestRecord:
        """Sends one request now and follows its answer to the end; what the server does wrong is in `error`."""
        wire = self._message(request, request_id).SerializeToString()
        sent_s = time.monotonic()
        pieces: list[tuple[float, bytes]] = []
        error = ""
        call = self._generate(wire, timeout=self._timeout_s, metadata=self._metadata)
        try:
            while (piece := await call.read()) is not aio.EOF:
                pieces.append((time.monotonic(), piece))
            if (code := await call.code()) is not grpc.StatusCode.OK:
                error = f"{code.name}: {await call.details()}"
        except aio.AioRpcError as failure:
            error = f"{failure.code().name}: {failure.details()}"
        except asyncio.CancelledError:
            call.cancel()
            raise
        return read_messages(pieces, error, due_s=due_s, sent_s=sent_s, ended_s=time.monotonic())

    async def close(self) -> None:
        """Ends what is under way."""
        await self._channel.close()

    def _message(self, request: BenchRequest, request_id: str) -> pb.GenerateRequest:
        message = pb.GenerateRequest(model=self.model, request_id=request_id, **self._slo)
        if isinstance(request.prompt, str):
            message.chat.messages.add(role="user", content=request.prompt)
        else:
            message.tokens.token_ids.extend(request.prompt)
        message.sampling.max_tokens = request.max_tokens
        if request.ignore_eos:
            message.sampling.ignore_eos = True
        if self._temperature is not None:
            message.sampling.temperature = self._temperature
        return message


def read_messages(
    pieces: Sequence[tuple[float, bytes]], error: str, *, due_s: float, sent_s: float, ended_s: float | None = None
) -> RequestRecord:
    """Makes a record from the serialized messages of a stream, each with its time. A piece of output has tokens. Pure.

    A choice ends with a message that may have none; usage comes with the last one, and with it the stream is whole.
    """
    times: list[float] = []
    texts: list[str] = []
    tokens = prompt_tokens = 0
    timings: dict[str, float | str] = {}
    finished = False
    for when_s, piece in pieces:
        try:
            message = pb.GenerateResponse.FromString(piece)
        except DecodeError:
            error = error or "a message is not what such a stream is made of"
            break
        if message.token_ids or message.text:
            times.append(when_s)
            texts.append(message.text)
            tokens += len(message.token_ids)
        if message.HasField("timings"):
            timings = {field.name: value for field, value in message.timings.ListFields()}
        if message.HasField("usage"):
            prompt_tokens, tokens = message.usage.prompt_tokens, message.usage.completion_tokens
            finished = True
    if not error and not finished:
        error = "the stream had no end"
    return RequestRecord(
        due_s=due_s,
        sent_s=sent_s,
        first_token_s=times[0] if times else None,
        last_token_s=times[-1] if times else None,
        chunk_times_s=tuple(times),
        prompt_tokens=prompt_tokens,
        output_tokens=tokens,
        text="".join(texts),
        error=error,
        ended_s=ended_s,
        timings=timings,
    )


def _milliseconds(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"header: {name}={value!r} is not allowed; allowed: milliseconds") from None
