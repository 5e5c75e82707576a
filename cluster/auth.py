"""How members of one cluster know each other: a shared secret with every call, and mutual TLS where it is configured.

A caller proves that it knows the secret by an HMAC of it in the metadata (`METADATA_KEY`). A server's interceptor
compares in constant time and refuses UNAUTHENTICATED before any handler runs and before any message is read. Only the
standard health service answers strangers. Without TLS the proof passes in the clear, as everything else does: it keeps
strangers out who can reach a port, not those who can read the network.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc import aio

from .config import ConfigError, RouterConfig, SecurityConfig, is_loopback
from .tls import Identity, load_ca, load_identity

logger = logging.getLogger(__name__)

SECRET_VARIABLE = "TANDEM_CLUSTER_SECRET"
METADATA_KEY = "tandem-member"
MIN_SECRET_CHARS = 16
"""Shorter ones can be guessed; they are warned of, not refused."""
_PURPOSE = b"tandem member 1"
_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
_SAY_AGAIN_S = 10.0
_MAX_SECRET_BYTES = 4096

Options = Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberTLS:
    """A member's own certificate, and who must have signed the others'."""

    identity: Identity
    ca: bytes
    server_name: str | None = None
    """The name that every member's certificate holds; None: each holds the host or address under which it is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberCredentials:
    """What one member shows and asks for. Without anything (`OPEN`), members trust whoever reaches their ports."""

    token: str | None = field(default=None, repr=False)
    tls: MemberTLS | None = None

    @classmethod
    def load(cls, config: SecurityConfig) -> MemberCredentials:
        """From the configuration, the files that it names and the environment. Raises ConfigError. Blocks: reads files.

        The fields it names are those of `security`.
        """
        secret = resolve_secret(config)
        tls = None
        if config.tls_cert is not None:
            assert config.tls_key is not None
            assert config.tls_ca is not None
            try:
                identity = load_identity(config.tls_cert, config.tls_key)
                tls = MemberTLS(
                    identity=identity, ca=load_ca(config.tls_ca, "tls_ca"), server_name=config.tls_server_name
                )
            except ConfigError as error:
                raise error.under("security") from None
        return cls(token=None if secret is None else _token(secret), tls=tls)

    @property
    def keeps_strangers_out(self) -> bool:
        """Whether a caller must prove that it belongs here."""
        return self.token is not None or self.tls is not None

    def check_exposure(self, host: str, *, insecure: bool) -> None:
        """ConfigError where members would listen beyond loopback and let everybody in."""
        if insecure or is_loopback(host) or self.keeps_strangers_out:
            return
        allowed = (
            "a loopback address such as 127.0.0.1; beyond it members share a secret "
            f"(security.secret, security.secret_file or {SECRET_VARIABLE}), or insecure says that they need none"
        )
        raise ConfigError("host", host, allowed)

    def is_secret(self, shown: str) -> bool:
        """Whether that is the cluster's secret itself; in constant time. False where there is none."""
        return self.token is not None and hmac.compare_digest(_token(shown), self.token)

    def proof(self, message: bytes) -> bytes:
        """A MAC of `message` that members alone can make; where there is no secret, everybody. 32 bytes."""
        return hmac.new((self.token or "").encode(), message, hashlib.sha256).digest()

    def channel(self, address: str, options: Options) -> aio.Channel:
        """An asyncio channel to the member at `host:port`."""
        if self.tls is None:
            channel = aio.insecure_channel(address, options=list(options))
        else:
            credentials = grpc.ssl_channel_credentials(self.tls.ca, self.tls.identity.key, self.tls.identity.cert)
            names = () if self.tls.server_name is None else (("grpc.ssl_target_name_override", self.tls.server_name),)
            channel = aio.secure_channel(address, credentials, options=[*options, *names])
        return channel if self.token is None else _AuthenticatedChannel(channel, ((METADATA_KEY, self.token),))

    def server(self, options: Options, max_calls: int) -> aio.Server:
        """An asyncio server, without a port yet, that refuses strangers; RESOURCE_EXHAUSTED beyond `max_calls`."""
        interceptors = () if self.token is None else (SecretInterceptor(self.token),)
        return aio.server(options=list(options), maximum_concurrent_rpcs=max_calls, interceptors=interceptors)

    def listen(self, server: aio.Server, address: str) -> int:
        """Gives a server its port (0: any free one) and returns it. RuntimeError if it cannot be bound."""
        if self.tls is None:
            return open_port(server, address, None, None)
        return open_port(server, address, self.tls.identity, self.tls.ca)


OPEN = MemberCredentials()
"""No secret, no TLS: for loopback and tests."""


def open_port(server: aio.Server, address: str, identity: Identity | None, client_ca: bytes | None) -> int:
    """Lets a server listen at `address` (port 0: any free one) and returns the port. With an identity over TLS; with
    `client_ca`, callers must show a certificate that it signed. RuntimeError if the port cannot be bound.
    """
    if identity is None:
        return int(server.add_insecure_port(address))
    pairs = ((identity.key, identity.cert),)
    credentials = grpc.ssl_server_credentials(pairs, client_ca, require_client_auth=client_ca is not None)
    return int(server.add_secure_port(address, credentials))


def resolve_secret(config: SecurityConfig) -> str | None:
    """The members' secret: the config's, else its file's, else the environment's. Raises ConfigError. Reads a file."""
    secret, where = config.secret, "security.secret"
    if secret is None and config.secret_file is not None:
        secret, where = _read_secret(config.secret_file), "security.secret_file"
    if secret is None:
        secret, where = os.environ.get(SECRET_VARIABLE, "").strip() or None, SECRET_VARIABLE
    if secret is not None and len(secret) < MIN_SECRET_CHARS:
        logger.warning("%s: shorter than %d characters, it can be guessed", where, MIN_SECRET_CHARS)
    return secret


def check_clients(config: RouterConfig, under: str = "") -> None:
    """ConfigError where a router would listen beyond loopback and clients need neither key nor certificate. Pure."""
    keyed = config.api_key is not None or config.api_keys_file is not None or config.tls_client_ca is not None
    if config.insecure or is_loopback(config.host) or keyed:
        return
    allowed = (
        "a loopback address such as 127.0.0.1; beyond it clients must present a key (api_key, api_keys_file) or a "
        "certificate (tls_client_ca), or insecure says that they need none"
    )
    raise ConfigError("host", config.host, allowed).under(under)


def warn_if_shared(path: str | Path, what: str) -> None:
    """Logs a line where other users of this machine can read a file of secrets."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return
    if mode & 0o044:
        logger.warning("%s: %s can be read by other users (mode %o); chmod 600 it", what, path, mode & 0o777)


class SecretInterceptor(aio.ServerInterceptor):
    """Refuses every call, streams included, that does not show the token; the health service is open."""

    def __init__(self, token: str) -> None:
        self._digest = _digest(token)
        self._refused = 0
        self._said_s = -_SAY_AGAIN_S

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        """Called by gRPC with every call, before its handler."""
        if handler_call_details.method.startswith(_OPEN_SERVICES):
            return await continuation(handler_call_details)
        shown = [value for key, value in handler_call_details.invocation_metadata or () if key == METADATA_KEY]
        if len(shown) == 1 and hmac.compare_digest(_digest(shown[0]), self._digest):
            return await continuation(handler_call_details)
        self._note(handler_call_details.method, shown=bool(shown))
        return _refuse_wrong if shown else _refuse_missing

    def _note(self, method: str, *, shown: bool) -> None:
        """One line now and then: a stranger who keeps knocking does not fill the log."""
        self._refused += 1
        now_s = time.monotonic()
        if now_s - self._said_s >= _SAY_AGAIN_S:
            self._said_s = now_s
            how = "with another cluster's secret" if shown else "without the cluster's secret"
            logger.warning("refused %s, called %s; refused so far: %d", method, how, self._refused)


class _AuthenticatedChannel(aio.Channel):
    """A channel whose every call carries the same metadata. Not interceptors: those cost a task for each call."""

    def __init__(self, channel: aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    async def __aenter__(self) -> _AuthenticatedChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_metadata(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_metadata(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_metadata(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_metadata(self._channel.stream_stream(*args, **kwargs))

    def _with_metadata(self, method: Callable[..., Any]) -> Callable[..., Any]:
        mine = self._metadata

        def call(*args: Any, metadata: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> Any:
            return method(*args, metadata=(*(metadata or ()), *mine), **kwargs)

        return call


def _refusal(message: str) -> grpc.RpcMethodHandler:
    """A handler for calls of any kind: as a stream both ways it ends the call without reading what was sent."""

    async def refuse(_requests: Any, context: aio.ServicerContext) -> NoReturn:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        raise AssertionError("context.abort returned")

    return grpc.stream_stream_rpc_method_handler(refuse)


_HINT = f"members show the one that {SECRET_VARIABLE}, security.secret or security.secret_file sets"
_refuse_missing = _refusal(f"the cluster's secret is missing; {_HINT}")
_refuse_wrong = _refusal(f"the secret is not this cluster's; {_HINT}")


def _token(secret: str) -> str:
    """What is shown in place of the secret: printable whatever the secret is made of."""
    return hmac.new(secret.encode(), _PURPOSE, hashlib.sha256).hexdigest()


def _digest(shown: str | bytes) -> bytes:
    return hashlib.sha256(shown if isinstance(shown, bytes) else shown.encode("utf-8", "surrogateescape")).digest()


def _read_secret(path: str) -> str:
    allowed = "a readable file of one line, the secret"
    try:
        with Path(path).expanduser().open("rb") as file:
            text = file.read(_MAX_SECRET_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("security.secret_file", path, f"{allowed} ({getattr(error, 'strerror', error)})") from None
    if not text or "\n" in text:
        raise ConfigError("security.secret_file", path, allowed)
    warn_if_shared(path, "security.secret_file")
    return text
