"""TLS at the router's two doors: who gets in, and what those who do not are told, by each of our own clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest
from tandem.cluster import cli
from tandem.cluster.bench.client import CHAT, Target, send
from tandem.cluster.bench.server import ask
from tandem.cluster.cli_chat import ChatOptions, stream_chat
from tandem.cluster.cli_status import fetch
from tandem.cluster.config import ConfigError
from tandem.cluster.tls import ClientTLS
from tandem.cluster.workload.datasets import BenchRequest
from tandem.router.client import TandemClient, TandemError

MESSAGES = [{"role": "user", "content": "Hi"}]
NAMES = ("chat", "status", "bench", "load", "grpc")


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("TANDEM_CA", "TANDEM_CLIENT_CERT", "TANDEM_CLIENT_KEY", "TANDEM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def secure_front(start_front: Callable[..., Any], authority: Any) -> Any:
    cert, key = authority.issue("router")
    return start_front(tls_cert=cert, tls_key=key)


@pytest.fixture
def mutual_front(start_front: Callable[..., Any], authority: Any) -> Any:
    cert, key = authority.issue("router")
    return start_front(tls_cert=cert, tls_key=key, tls_client_ca=authority.ca)


def outcomes(front: Any, tls: ClientTLS | None, scheme: str) -> dict[str, str]:
    """What each client gets: `ok`, or the words of its error. `tls` None: the gRPC client speaks plain."""
    url = f"{scheme}://{front.http}"
    files = tls or ClientTLS()

    def chat() -> None:
        options = ChatOptions(url=url, model="tiny", max_tokens=4, tls=files)
        assert "".join(stream_chat(options, "tiny", MESSAGES))

    def load() -> None:
        target = Target(base_url=url, model="tiny", endpoint=CHAT, tls=files, timeout_s=20)
        record = asyncio.run(send(target, BenchRequest(prompt="Hi", max_tokens=4), 0.0))
        if record.error:
            raise OSError(record.error)

    def over_grpc() -> None:
        with TandemClient(front.grpc, tls=tls, timeout_s=20) as client:
            assert client.generate("Hi", max_tokens=4).collect().text
            assert client.models()

    clients = {
        "chat": chat,
        "status": lambda: fetch(url, tls=files),
        "bench": lambda: ask(url, "/v1/models", tls=files),
        "load": load,
        "grpc": over_grpc,
    }
    found = {}
    for name, client in clients.items():
        try:
            client()
            found[name] = "ok"
        except (OSError, TandemError) as error:
            found[name] = str(error)
    return found


def test_who_trusts_the_right_authority_gets_in(secure_front: Any, authority: Any) -> None:
    assert outcomes(secure_front, ClientTLS(ca=authority.ca), "https") == dict.fromkeys(NAMES, "ok")


def test_who_trusts_another_is_told_so(secure_front: Any, other_authority: Any) -> None:
    found = outcomes(secure_front, ClientTLS(ca=other_authority.ca), "https")
    for name in ("chat", "status", "bench"):
        assert "its certificate is not accepted: " in found[name], found
        assert "--ca or TANDEM_CA names who signed it" in found[name], found
    assert "CERTIFICATE_VERIFY_FAILED" in found["load"]
    assert found["grpc"].startswith("UNAVAILABLE: ")
    assert "CERTIFICATE_VERIFY_FAILED" in found["grpc"]


def test_who_speaks_plain_is_told_so(secure_front: Any) -> None:
    found = outcomes(secure_front, None, "http")
    for name in ("chat", "status", "bench"):
        assert "is it https://?" in found[name], found
    assert found["load"] not in ("", "ok")
    assert found["grpc"].startswith("UNAVAILABLE: ")
    assert "does the router serve TLS there, and is tls= given?" in found["grpc"]


def test_who_speaks_tls_to_a_plain_door_is_told_so(front: Any, authority: Any) -> None:
    found = outcomes(front, ClientTLS(ca=authority.ca), "https")
    for name in ("chat", "status", "bench"):
        assert "does not speak TLS; is it http://?" in found[name], found
    assert found["load"] not in ("", "ok")
    assert found["grpc"].startswith("UNAVAILABLE: ")


def test_where_certificates_are_wanted_none_gets_in_without(
    mutual_front: Any, authority: Any, other_authority: Any
) -> None:
    cert, key = authority.issue("client")
    assert outcomes(mutual_front, ClientTLS(ca=authority.ca, cert=cert, key=key), "https") == dict.fromkeys(NAMES, "ok")
    theirs = other_authority.issue("client")
    for tls in (ClientTLS(ca=authority.ca), ClientTLS(ca=authority.ca, cert=theirs[0], key=theirs[1])):
        found = outcomes(mutual_front, tls, "https")
        assert "ok" not in found.values(), found
        for name in ("chat", "status", "bench"):
            assert "TANDEM_CLIENT_CERT" in found[name] or "it closed the connection" in found[name], found
        assert found["grpc"].startswith("UNAVAILABLE: ")
    assert len(mutual_front.service.requests) == 3, "only those of the known client were served"


def test_certificates_and_keys_are_wanted_together(start_front: Callable[..., Any], authority: Any) -> None:
    pair = authority.issue("router")
    front = start_front(tls_cert=pair[0], tls_key=pair[1], tls_client_ca=authority.ca, api_key="a-key-of-some-length")
    cert, key = authority.issue("client")
    tls = ClientTLS(ca=authority.ca, cert=cert, key=key)
    with httpx.Client(verify=tls.context(), trust_env=False) as client:
        assert client.get(f"{front.url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer a-key-of-some-length"}
        assert client.get(f"{front.url}/v1/models", headers=headers).status_code == 200
    with TandemClient(front.grpc, tls=tls) as client, pytest.raises(TandemError) as error:
        client.models()
    assert error.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_a_name_that_the_certificate_does_not_hold_is_refused(start_front: Callable[..., Any], authority: Any) -> None:
    cert, key = authority.issue("elsewhere", "elsewhere.example")
    front = start_front(tls_cert=cert, tls_key=key)
    found = outcomes(front, ClientTLS(ca=authority.ca), "https")
    for name in ("chat", "status", "bench"):
        assert "IP address mismatch" in found[name], found
    assert "ok" not in found.values()


def test_old_tls_is_refused(secure_front: Any, authority: Any) -> None:
    import ssl

    context = ClientTLS(ca=authority.ca).context()
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with httpx.Client(verify=context, trust_env=False) as client, pytest.raises(httpx.ConnectError):
        client.get(f"{secure_front.url}/health")


@pytest.mark.parametrize(("field", "value"), [("tls_cert", "/none"), ("tls_key", "/none"), ("tls_client_ca", "/none")])
def test_a_wrong_file_ends_the_start_with_its_name(
    start_front: Callable[..., Any], authority: Any, field: str, value: str
) -> None:
    cert, key = authority.issue("router")
    fields = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.ca, field: value}
    with pytest.raises(ConfigError, match=rf"^{field}: '/none' is not allowed; allowed: a readable PEM file"):
        start_front(**fields)


def test_tandem_restart_takes_a_ca_and_a_key(
    start_front: Callable[..., Any], authority: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cert, key = authority.issue("router")
    front = start_front(tls_cert=cert, tls_key=key, api_key="a-key-of-some-length")
    restart = ["restart", "worker-of-nobody", "--url", f"https://{front.http}"]
    assert cli.run(restart) == 1
    assert "--ca or TANDEM_CA names who signed it" in capsys.readouterr().err
    assert cli.run([*restart, "--ca", authority.ca]) == 1
    assert "only to those who show a key" in capsys.readouterr().err
    assert cli.run([*restart, "--ca", authority.ca, "--api-key", "a-key-of-some-length"]) == 2
    assert "worker: 'worker-of-nobody' is not allowed; allowed:" in capsys.readouterr().err
