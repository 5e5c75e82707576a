"""A small blocking client of the gRPC API (`tandem.v1`).

    with TandemClient("127.0.0.1:8001") as client:
        for delta in client.generate("The capital of France is", max_tokens=16):
            print(delta.text, end="")
        print(client.generate(messages=[{"role": "user", "content": "Hi"}], seed=7).collect().text)

Errors are `TandemError` with the gRPC code, the server's message (it names the field) and, where the server said so,
how long to wait. Nothing is retried here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from ..cluster.proto import tandem_v1_pb2 as pb
from ..cluster.proto import tandem_v1_pb2_grpc as pb_grpc
from ..cluster.tls import ClientTLS
from .client_request import build_request

DEFAULT_TIMEOUT_S = 600.0


class TandemError(Exception):
    """The router refused a request, or a stream broke off."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token and of its most likely rivals, (token id, bytes, logprob) each."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class ClientDelta:
    """A piece of one choice. `timings` (seconds) come with a choice's last piece, `usage` with the stream's last."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop_reason: str
    timings: pb.Timings | None
    usage: pb.Usage | None


@dataclass(slots=True)
class Answer:
    """One choice, whole."""

    choice: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str = ""
    timings: pb.Timings | None = None
    usage: pb.Usage | None = None

    def add(self, delta: ClientDelta) -> None:
        """Appends a delta of this choice."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason or self.stop_reason
        self.timings = delta.timings or self.timings


class Generation:
    """A running request: iterate over its deltas, or collect them.

    Iterating to the end, `cancel` or leaving a `with` block frees it on the server.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[ClientDelta]:
        try:
            for response in self._call:
                yield _delta(response)
        except grpc.RpcError as error:
            raise _tandem_error(error) from None
        finally:
            self._call.cancel()

    def collect_all(self) -> list[Answer]:
        """Waits for every choice, in the order of their indices."""
        answers: dict[int, Answer] = {}
        usage: pb.Usage | None = None
        for delta in self:
            answers.setdefault(delta.choice, Answer(delta.choice)).add(delta)
            usage = delta.usage or usage
        for answer in answers.values():
            answer.usage = usage
        return [answers[choice] for choice in sorted(answers)]

    def collect(self) -> Answer:
        """Waits for the answer of a request with one choice."""
        answers = self.collect_all()
        if len(answers) != 1:
            raise ValueError(f"collect: the request has {len(answers)} choices; allowed: 1, or use collect_all")
        return answers[0]

    def cancel(self) -> None:
        """Ends the request on the server; idempotent."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class TandemClient:
    """One channel to one router. Thread-safe; close it, or use it in a `with` block."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: ClientTLS | None = None,
    ) -> None:
        """`tls`: for a router that serves TLS, whom to trust and what to show; None: plain. Raises ConfigError."""
        options = (("grpc.enable_http_proxy", 0),)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            ca, identity = tls.load()
            pair = (None, None) if identity is None else (identity.key, identity.cert)
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, *pair), options=options)
        self._stub = pb_grpc.TandemStub(self._channel)
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._timeout_s = timeout_s

    def generate(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
        slo_class: str = "",
        slo_ttft_ms: float | None = None,
        slo_tpot_ms: float | None = None,
        **sampling: Any,
    ) -> Generation:
        """Starts a request with exactly one of `text`, `messages` (role and content each) and `token_ids`.

        `sampling`: the fields of `SamplingOptions` (temperature, max_tokens, seed, stop=[…], n, top_logprobs, …).
        `timeout_s` is the deadline of the whole answer; `slo_class` names the class of its promise, `slo_ttft_ms` and
        `slo_tpot_ms` promises of this request alone. Raises ValueError for arguments that cannot be sent; what the
        router refuses comes as TandemError while iterating.
        """
        request = build_request(
            text=text,
            messages=messages,
            token_ids=token_ids,
            model=model,
            request_id=request_id,
            sampling=sampling,
            slo_class=slo_class,
            slo_ttft_ms=slo_ttft_ms,
            slo_tpot_ms=slo_tpot_ms,
        )
        return Generation(self._stub.Generate(request, timeout=timeout_s or self._timeout_s, metadata=self._metadata))

    def models(self) -> list[pb.Model]:
        """The models served now."""
        try:
            reply = self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _tandem_error(error) from None
        return list(reply.models)

    def close(self) -> None:
        """Closes the channel; requests still running are canceled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _delta(response: pb.GenerateResponse) -> ClientDelta:
    return ClientDelta(
        choice=response.choice,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(
            TokenLogprob(
                entry.token_id,
                entry.token,
                entry.logprob,
                tuple((top.token_id, top.token, top.logprob) for top in entry.top),
            )
            for entry in response.logprobs
        ),
        finish_reason=response.finish_reason,
        stop_reason=response.stop_reason,
        timings=response.timings if response.HasField("timings") else None,
        usage=response.usage if response.HasField("usage") else None,
    )


def _tandem_error(error: Any) -> TandemError:
    retry_after_s = None
    for key, value in error.trailing_metadata() or ():
        if key == "retry-after-ms":
            retry_after_s = int(value) / 1000
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and re.search("Connection reset|Socket closed|preface", details):
        details += "; does the router serve TLS there, and is tls= given?"
    return TandemError(error.code(), details, retry_after_s)
