"""Strangers at every port of a running cluster: workers, their KV, the registry; and the cluster's own members behind
the same checks, serving as they always do. Computes nothing: the paced device.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from tandem.cluster.auth import OPEN, SECRET_VARIABLE, MemberCredentials
from tandem.cluster.config import ConfigError, RouterConfig, SecurityConfig, WorkerConfig, to_dict
from tandem.cluster.launch.members import RouterMember, WorkerMember
from tandem.cluster.proto import tandem_internal_v1_pb2 as pb
from tandem.cluster.types import Role
from tandem.kvtransfer.grpc_transport import SERVICE as KV

SECRET = "the secret of this cluster"
MODEL = "dummy:tiny-llama"
ANSWER_S = 20.0
WORKER, REGISTRY = (pb.DESCRIPTOR.services_by_name[name] for name in ("Worker", "Registry"))
KV_METHODS = ("Hello", "Pull", "Confirm", "Abort")


def configs(security: SecurityConfig) -> dict[str, Any]:
    return {
        "router": RouterConfig(security=security),
        "worker": WorkerConfig(worker_id="template", role=Role.MIXED, security=security),
    }


def methods(cluster: Any) -> list[tuple[str, str]]:
    """Path and address of every method that members serve, from the services' own descriptions."""
    found = [(f"/{REGISTRY.full_name}/{method.name}", cluster.router.registry_address) for method in REGISTRY.methods]
    for worker in cluster.workers.values():
        found += [(f"/{WORKER.full_name}/{method.name}", worker.address) for method in WORKER.methods]
        found += [(f"/{KV}/{name}", worker.kv_address) for name in KV_METHODS]
    return found


async def knock(credentials: MemberCredentials, path: str, address: str) -> str:
    """The status of a call with an empty message; an answer that is not a stream is one of a single message."""
    async with credentials.channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_stream(path)(b"", timeout=ANSWER_S)
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"


async def knock_everywhere(cluster: Any, credentials: MemberCredentials) -> list[str]:
    return await asyncio.gather(*(knock(credentials, path, address) for path, address in methods(cluster)))


def ask(cluster: Any) -> list[int]:
    """Serves one request over both pools."""
    prompt = list(range(3, 40))
    answer = cluster.grpc.generate(token_ids=prompt, max_tokens=4, ignore_eos=True, temperature=0.0).collect()
    assert answer.timings is not None
    assert answer.timings.path == "split"
    return answer.token_ids


def test_without_the_secret_no_method_of_any_port_is_reached(
    start_split: Callable[..., Any], paced: Callable[..., Any]
) -> None:
    cluster = start_split(paced(), **configs(SecurityConfig(secret=SECRET)))
    assert len(ask(cluster)) == 4, "its own members are at home"
    wrong = MemberCredentials.load(SecurityConfig(secret="another cluster's secret"))
    for stranger in (OPEN, wrong):
        answers = asyncio.run(knock_everywhere(cluster, stranger))
        assert len(answers) == len(REGISTRY.methods) + 2 * (len(WORKER.methods) + len(KV_METHODS))
        assert set(answers) == {"UNAUTHENTICATED"}, answers
    right = MemberCredentials.load(SecurityConfig(secret=SECRET))
    for path, address in methods(cluster):
        if not path.endswith("/Drain"):  # that one would be obeyed
            assert asyncio.run(knock(right, path, address)) != "UNAUTHENTICATED", path
    assert len(ask(cluster)) == 4
    cluster.wait_clean()


def test_a_worker_of_another_cluster_does_not_join_and_says_why(
    start_split: Callable[..., Any],
    paced: Callable[..., Any],
    wait: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = start_split(paced(), **configs(SecurityConfig(secret=SECRET)))
    config = WorkerConfig(
        worker_id="evil",
        role=Role.MIXED,
        engine=paced(),
        routers=(cluster.router.registry_address,),
        security=SecurityConfig(secret="another cluster's secret"),
    )
    stranger = WorkerMember(config)
    try:
        with caplog.at_level(logging.WARNING):
            stranger.start(60)
            said = "the secret is not this cluster's"
            wait(lambda: any(said in record.message for record in caplog.records), "the stranger to say why")
        names = {worker["worker_id"] for worker in cluster.http.get("/ready").json()["workers"]}
        assert names == {"prefill-0", "decode-0"}
    finally:
        stranger.stop()


def test_members_with_certificates_serve_and_keep_everybody_else_out(
    start_split: Callable[..., Any], paced: Callable[..., Any], authority: Any, other_authority: Any
) -> None:
    cert, key = authority.issue("member")
    security = SecurityConfig(secret=SECRET, tls_cert=cert, tls_key=key, tls_ca=authority.ca)
    cluster = start_split(paced(), **configs(security))
    assert len(ask(cluster)) == 4
    theirs = other_authority.issue("member")
    strangers = {
        "the secret, but no TLS": SecurityConfig(secret=SECRET),
        "a certificate of somebody else": replace(security, tls_cert=theirs[0], tls_key=theirs[1]),
        "trust in somebody else": replace(security, tls_ca=other_authority.ca),
    }
    for name, stranger in strangers.items():
        answers = asyncio.run(knock_everywhere(cluster, MemberCredentials.load(stranger)))
        assert set(answers) == {"UNAVAILABLE"}, (name, answers)
    no_secret = MemberCredentials.load(replace(security, secret="another cluster's secret"))
    assert set(asyncio.run(knock_everywhere(cluster, no_secret))) == {"UNAUTHENTICATED"}
    assert len(ask(cluster)) == 4
    cluster.wait_clean()


def test_a_member_alone_takes_the_secret_from_its_environment(
    processes: Any, paced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    config = WorkerConfig(worker_id="w", role=Role.MIXED, engine=paced())
    _, addresses = processes.start("worker", config)
    monkeypatch.delenv(SECRET_VARIABLE)
    status = f"/{WORKER.full_name}/Status"
    assert asyncio.run(knock(OPEN, status, addresses["address"])) == "UNAUTHENTICATED"
    right = MemberCredentials.load(SecurityConfig(secret=SECRET))
    assert asyncio.run(knock(right, status, addresses["address"])) == "OK"


@pytest.mark.parametrize("kind", ["worker", "router"])
def test_a_member_that_everybody_could_call_does_not_start(
    kind: str, tmp_path: Path, paced: Callable[..., Any]
) -> None:
    config: WorkerConfig | RouterConfig = RouterConfig(host="0.0.0.0", api_key="a-key-of-some-length", model=MODEL)
    if kind == "worker":
        config = WorkerConfig(worker_id="w", role=Role.MIXED, engine=paced(), host="0.0.0.0")
    path = tmp_path / "member.json"
    path.write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-m", "tandem.cluster.launch.process", kind, "--config", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != SECRET_VARIABLE}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{kind}: host: '0.0.0.0' is not allowed; allowed: a loopback address"), ended.stderr
    assert SECRET_VARIABLE in ended.stderr


def test_a_router_whose_clients_need_no_key_does_not_start_beyond_loopback() -> None:
    ports = {"http_port": 0, "grpc_port": 0, "registry_port": 0}
    security = SecurityConfig(secret=SECRET)
    router = RouterMember(RouterConfig(host="0.0.0.0", model=MODEL, security=security, **ports))
    with pytest.raises(ConfigError, match=r"^host: '0\.0\.0\.0' is not allowed; .*api_keys_file.*insecure"):
        router.start(60)
