"""Members of one cluster know each other, and nobody else gets as far as a handler."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from tandem.cluster.auth import METADATA_KEY, OPEN, SECRET_VARIABLE, MemberCredentials, check_clients, resolve_secret
from tandem.cluster.config import ConfigError, RouterConfig, SecurityConfig

SECRET, OTHER = "our secret, quite long", "their secret, quite long"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
Ask = Callable[[aio.Channel, str], Awaitable[bytes]]


def member(secret: str = SECRET, **fields: Any) -> MemberCredentials:
    return MemberCredentials.load(SecurityConfig(secret=secret, **fields))


@pytest.fixture(autouse=True)
def no_secret_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)


class Handlers:
    """One method of every kind; notes what reached a handler."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def add_to(self, server: aio.Server) -> None:
        async def one(request: bytes, context: Any) -> bytes:
            self.reached.append("one")
            return request

        async def one_of_many(requests: AsyncIterator[bytes], context: Any) -> bytes:
            self.reached.append("one_of_many")
            return b"".join([request async for request in requests])

        async def many(request: bytes, context: Any) -> AsyncIterator[bytes]:
            self.reached.append("many")
            yield request

        async def many_of_many(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            self.reached.append("many_of_many")
            async for request in requests:
                yield request

        methods = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(one),
            "unary_stream": grpc.unary_stream_rpc_method_handler(many),
            "stream_unary": grpc.stream_unary_rpc_method_handler(one_of_many),
            "stream_stream": grpc.stream_stream_rpc_method_handler(many_of_many),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", methods),))


async def call(channel: aio.Channel, kind: str, **metadata: Any) -> bytes:
    """One call of that kind with one message each way."""
    method = getattr(channel, kind)(f"/t.T/{kind}")

    async def requests() -> AsyncIterator[bytes]:
        yield b"x"

    running = method(requests() if kind.startswith("stream") else b"x", timeout=20, **metadata)
    if kind.endswith("unary"):
        return bytes(await running)
    return b"".join([message async for message in running])


async def outcome(credentials: MemberCredentials, port: int, kind: str, **metadata: Any) -> str:
    async with credentials.channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            assert await call(channel, kind, **metadata) == b"x"
        except aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "OK"


async def serve(credentials: MemberCredentials, handlers: Handlers) -> tuple[aio.Server, int]:
    server = credentials.server([], 100)
    handlers.add_to(server)
    health = health_aio.HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = credentials.listen(server, "127.0.0.1:0")
    await server.start()
    return server, port


def run_scene(scene: Callable[[int, Handlers], Awaitable[None]], credentials: MemberCredentials) -> None:
    async def run() -> None:
        handlers = Handlers()
        server, port = await serve(credentials, handlers)
        try:
            await scene(port, handlers)
        finally:
            await server.stop(0)

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_only_members_get_as_far_as_a_handler(kind: str) -> None:
    async def scene(port: int, handlers: Handlers) -> None:
        assert (await outcome(OPEN, port, kind)).startswith("UNAUTHENTICATED: the cluster's secret is missing")
        assert (await outcome(member(OTHER), port, kind)).startswith(
            "UNAUTHENTICATED: the secret is not this cluster's"
        )
        assert handlers.reached == []
        assert await outcome(member(), port, kind) == "OK"
        assert len(handlers.reached) == 1

    run_scene(scene, member())


def test_neither_the_secret_itself_nor_two_tokens_will_do() -> None:
    token = member().token
    assert token is not None

    async def scene(port: int, handlers: Handlers) -> None:
        for shown in (SECRET, "", token[:-1], token.upper()):
            answer = await outcome(OPEN, port, "unary_unary", metadata=((METADATA_KEY, shown),))
            assert answer.startswith("UNAUTHENTICATED: the secret is not"), shown
        both = ((METADATA_KEY, "x"), (METADATA_KEY, token))
        assert (await outcome(OPEN, port, "unary_unary", metadata=both)).startswith("UNAUTHENTICATED")
        assert handlers.reached == []
        assert await outcome(OPEN, port, "unary_unary", metadata=((METADATA_KEY, token),)) == "OK"

    run_scene(scene, member())


def test_a_callers_own_metadata_travels_too() -> None:
    async def scene(port: int, handlers: Handlers) -> None:
        assert await outcome(member(), port, "unary_stream", metadata=(("mine", "1"),)) == "OK"

    run_scene(scene, member())


def test_a_stranger_who_never_speaks_is_answered() -> None:
    """The refusal does not wait for a message of a streaming call."""

    async def scene(port: int, handlers: Handlers) -> None:
        async with OPEN.channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            running = channel.stream_stream("/t.T/stream_stream")(timeout=20)
            assert await running.code() is grpc.StatusCode.UNAUTHENTICATED

    run_scene(scene, member())


def test_strangers_may_ask_for_health_and_a_server_without_a_secret_asks_for_none() -> None:
    async def scene(port: int, handlers: Handlers) -> None:
        async with OPEN.channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING

    async def open_scene(port: int, handlers: Handlers) -> None:
        assert await outcome(OPEN, port, "unary_unary") == "OK"
        assert await outcome(member(), port, "unary_unary") == "OK"

    run_scene(scene, member())
    run_scene(open_scene, OPEN)


def test_who_keeps_knocking_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(port: int, handlers: Handlers) -> None:
        for _ in range(5):
            await outcome(member(OTHER), port, "unary_unary")

    with caplog.at_level(logging.WARNING):
        run_scene(scene, member())
    said = [record.message for record in caplog.records if "refused" in record.message]
    assert said == ["refused /t.T/unary_unary, called with another cluster's secret; refused so far: 1"]
    assert member().token not in " ".join(said)


# --- mutual TLS -------------------------------------------------------------------------------------------------------


def tls(authority: Any, name: str, *hosts: str, ca: str | None = None, **fields: Any) -> MemberCredentials:
    cert, key = authority.issue(name, *hosts)
    return member(tls_cert=cert, tls_key=key, tls_ca=ca or authority.ca, **fields)


def test_members_with_certificates_of_one_authority_meet(authority: Any) -> None:
    async def scene(port: int, handlers: Handlers) -> None:
        for kind in KINDS:
            assert await outcome(tls(authority, "b"), port, kind) == "OK"

    run_scene(scene, tls(authority, "a"))


def test_the_secret_counts_behind_tls_too(authority: Any) -> None:
    cert, key = authority.issue("c")
    other = MemberCredentials.load(SecurityConfig(secret=OTHER, tls_cert=cert, tls_key=key, tls_ca=authority.ca))

    async def scene(port: int, handlers: Handlers) -> None:
        assert (await outcome(other, port, "unary_unary")).startswith("UNAUTHENTICATED")

    run_scene(scene, tls(authority, "a"))


@pytest.mark.parametrize("who", ["plain", "no certificate", "signed elsewhere", "trusts elsewhere", "other name"])
def test_whoever_does_not_fit_is_told_and_reaches_nothing(authority: Any, other_authority: Any, who: str) -> None:
    """The call fails as UNAVAILABLE within its deadline, which is far away: nobody waits for it."""
    ours = tls(authority, "a", *(("elsewhere.example",) if who == "other name" else ()))
    callers = {
        "plain": lambda: member(),
        "signed elsewhere": lambda: tls(other_authority, "d", ca=authority.ca),
        "trusts elsewhere": lambda: tls(authority, "e", ca=other_authority.ca),
        "other name": lambda: tls(authority, "f"),
    }

    root = Path(authority.ca).read_bytes()

    async def bare(port: int) -> str:
        credentials = grpc.ssl_channel_credentials(root)
        async with aio.secure_channel(f"127.0.0.1:{port}", credentials, [("grpc.enable_http_proxy", 0)]) as channel:
            with pytest.raises(aio.AioRpcError) as error:
                await call(channel, "unary_unary")
            return f"{error.value.code().name}: {error.value.details()}"

    async def scene(port: int, handlers: Handlers) -> None:
        answer = await (bare(port) if who == "no certificate" else outcome(callers[who](), port, "unary_unary"))
        assert answer.startswith("UNAVAILABLE: "), answer
        assert handlers.reached == []

    run_scene(scene, ours)


def test_one_name_for_all_members_will_do_where_it_is_set(authority: Any) -> None:
    named = tls(authority, "g", "tandem.member", tls_server_name="tandem.member")

    async def scene(port: int, handlers: Handlers) -> None:
        assert await outcome(named, port, "unary_unary") == "OK"

    run_scene(scene, named)


def test_tls_towards_a_plain_server_fails_at_once(authority: Any) -> None:
    async def scene(port: int, handlers: Handlers) -> None:
        assert (await outcome(tls(authority, "a"), port, "unary_unary")).startswith("UNAVAILABLE: ")

    run_scene(scene, member())


# --- where a secret comes from, and where one must be -----------------------------------------------------------------


def test_the_configs_secret_wins_then_its_files_then_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    path.write_text("from the file, long enough\n")
    path.chmod(0o600)
    assert resolve_secret(SecurityConfig()) is None
    monkeypatch.setenv(SECRET_VARIABLE, " from the environment ")
    assert resolve_secret(SecurityConfig()) == "from the environment"
    assert resolve_secret(SecurityConfig(secret_file=str(path))) == "from the file, long enough"
    assert resolve_secret(SecurityConfig(secret=SECRET, secret_file=str(path))) == SECRET
    assert MemberCredentials.load(SecurityConfig(secret_file=str(path))) == member("from the file, long enough")
    monkeypatch.setenv(SECRET_VARIABLE, "  ")
    assert resolve_secret(SecurityConfig()) is None


@pytest.mark.parametrize("content", [None, b"", b"\n", b"two\nlines", b"\xff"])
def test_a_secret_file_that_holds_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^security\.secret_file: '.*secret' is not allowed; allowed: a readable file"
    ):
        resolve_secret(SecurityConfig(secret_file=str(path)))


def test_short_secrets_and_readable_files_are_warned_of_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "secret"
    path.write_text("hidden")
    path.chmod(0o640)
    with caplog.at_level(logging.DEBUG):
        credentials = MemberCredentials.load(SecurityConfig(secret_file=str(path)))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "hidden" not in " ".join(record.message for record in caplog.records)
    assert credentials.token not in repr(credentials)


def test_a_wrong_file_is_named_below_security(authority: Any) -> None:
    cert, key = authority.issue("h")
    with pytest.raises(ConfigError, match=r"^security\.tls_key: '/none' is not allowed"):
        MemberCredentials.load(SecurityConfig(tls_cert=cert, tls_key="/none", tls_ca=authority.ca))
    with pytest.raises(ConfigError, match=r"^security\.tls_ca: "):
        MemberCredentials.load(SecurityConfig(tls_cert=cert, tls_key=key, tls_ca=key))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "node.example"])
def test_beyond_loopback_members_need_a_secret_and_clients_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=f"^host: '{host}' is not allowed; .*TANDEM_CLUSTER_SECRET"):
        OPEN.check_exposure(host, insecure=False)
    OPEN.check_exposure(host, insecure=True)
    member().check_exposure(host, insecure=False)
    with pytest.raises(ConfigError, match=rf"^router\.host: '{host}' is not allowed; .*api_keys_file"):
        check_clients(RouterConfig(host=host), under="router")
    allowed: list[dict[str, Any]] = [
        {"insecure": True},
        {"api_key": "k"},
        {"api_keys_file": "f"},
        {"tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"},
    ]
    for fields in allowed:
        check_clients(RouterConfig(host=host, **fields))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_nothing_is_needed(host: str) -> None:
    OPEN.check_exposure(host, insecure=False)
    check_clients(RouterConfig(host=host))


def test_every_grpc_channel_and_server_of_the_package_is_made_where_strangers_are_thought_of(repository: Path) -> None:
    made = re.compile(r"(?:insecure|secure)_channel\(|add_(?:insecure|secure)_port\(|\b(?:aio|grpc)\.server\(")
    packages = ("cluster", "decode_worker", "kvtransfer", "prefill_worker", "router")
    paths = [path for package in packages for path in (repository / package).rglob("*.py")]
    found = {str(path.relative_to(repository)) for path in paths if made.search(path.read_text())}
    clients = {"router/client.py", "cluster/bench/grpc_client.py"}
    measured_on_loopback = {"cluster/bench/router_worker.py"}
    assert found == {"cluster/auth.py", "router/grpc_api.py"} | clients | measured_on_loopback
