"""What `tandem serve` settles before anything listens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster import cli_status
from tandem.cluster.auth import SECRET_VARIABLE
from tandem.cluster.cli_serve import welcome
from tandem.cluster.config import ClusterConfig, ConfigError, RouterConfig, SecurityConfig, WorkerConfig
from tandem.cluster.config_file import build_config
from tandem.cluster.launch import runtime_file
from tandem.cluster.launch.runtime_file import RunningCluster
from tandem.cluster.launch.security import secured
from tandem.cluster.launch.state import Endpoints
from tandem.cluster.types import Role
from tandem.router.api_keys import ApiKeys

KEY = "a-key-of-some-length"
ENDPOINTS = Endpoints(http="127.0.0.1:1", grpc="127.0.0.1:2", registries=("127.0.0.1:3",))


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (SECRET_VARIABLE, "TANDEM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def router(**fields: Any) -> ClusterConfig:
    return ClusterConfig(router=RouterConfig(**fields))


def test_a_cluster_without_a_secret_draws_one_for_all_its_members() -> None:
    config, operator_key = secured(ClusterConfig())
    other, _ = secured(ClusterConfig())
    assert config.security.secret is not None
    assert len(config.security.secret) == 64
    assert config.security.secret != other.security.secret
    members = [config.router.security, *(worker.security for worker in config.workers("127.0.0.1:1"))]
    assert members == [config.security] * 3
    assert operator_key is None, "clients need no key, so neither does the operator"
    assert config.security.secret not in repr(config)


def test_a_secret_that_is_given_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret"
    path.write_text("from the file, long enough\n")
    path.chmod(0o600)
    given = SecurityConfig(secret="given, and long enough")
    assert secured(ClusterConfig(security=given))[0].router.security.secret == given.secret
    filed = secured(ClusterConfig(security=SecurityConfig(secret_file=str(path))))[0].security
    assert (filed.secret, filed.secret_file) == ("from the file, long enough", None), "members need no file"
    monkeypatch.setenv(SECRET_VARIABLE, "from the environment")
    assert secured(ClusterConfig())[0].security.secret == "from the environment"


def test_paths_hold_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Any) -> None:
    cert, key = authority.issue("serve")
    monkeypatch.chdir(Path(cert).parent)
    (Path(cert).parent / "keys").write_text(f"{KEY}\n")
    names = {"tls_cert": Path(cert).name, "tls_key": Path(key).name}
    config, _ = secured(
        ClusterConfig(
            router=RouterConfig(api_keys_file="keys", tls_client_ca="ca.pem", **names),
            security=SecurityConfig(tls_ca="ca.pem", **names),
        )
    )
    found = [config.router.api_keys_file, config.router.tls_cert, config.router.tls_key, config.router.tls_client_ca]
    found += [config.security.tls_cert, config.security.tls_key, config.security.tls_ca]
    monkeypatch.chdir(tmp_path)
    assert all(path is not None and Path(path).is_absolute() and Path(path).exists() for path in found)


def test_the_operator_has_a_key_of_their_own_where_clients_need_one(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n")
    for fields in ({"api_key": f"{KEY},another-of-some-length"}, {"api_keys_file": str(path)}):
        config, operator_key = secured(router(**fields))
        assert operator_key is not None
        keys = ApiKeys.from_config(config.router)
        assert [keys.admit(key) for key in (operator_key, KEY, "wrong")] == [True, True, False]


def test_the_operators_commands_find_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    running = RunningCluster(http="127.0.0.1:1", grpc="127.0.0.1:2", registry="127.0.0.1:3", api_key="drawn")
    monkeypatch.setenv("TANDEM_API_KEY", "first, second")
    assert cli_status.operator_key("http://localhost:1") == "first"
    runtime_file.write(running)
    assert cli_status.operator_key("http://localhost:1") == "drawn"
    assert cli_status.operator_key("http://localhost:9") == "first"
    monkeypatch.delenv("TANDEM_API_KEY")
    assert cli_status.operator_key("http://localhost:9") is None
    assert "drawn" not in repr(running)


def test_an_open_door_beyond_loopback_needs_a_word() -> None:
    with pytest.raises(ConfigError, match=r"^router\.host: '0\.0\.0\.0' is not allowed; .*api_keys_file.*insecure"):
        secured(router(host="0.0.0.0"))
    secured(router(host="0.0.0.0", api_key=KEY))
    config, _ = secured(replace(router(host="0.0.0.0"), insecure=True))
    assert config.router.insecure
    assert config.worker.insecure
    worker = WorkerConfig(worker_id="worker", role=Role.MIXED, host="0.0.0.0")
    secured(ClusterConfig(worker=worker))  # the secret that is drawn keeps strangers out


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (router(api_keys_file="/none"), r"router\.api_keys_file"),
        (router(tls_cert="/none", tls_key="/none"), r"router\.tls_cert"),
        (ClusterConfig(security=SecurityConfig(secret_file="/none")), r"security\.secret_file"),
        (ClusterConfig(security=SecurityConfig(tls_cert="/a", tls_key="/b", tls_ca="/c")), r"security\.tls_cert"),
    ],
)
def test_a_wrong_file_is_named_before_ray_starts(config: ClusterConfig, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: '/\w+' is not allowed; allowed: a readable "):
        secured(config)


@pytest.mark.parametrize("section", ["worker", "router"])
@pytest.mark.parametrize("key", ["security", "insecure"])
def test_what_holds_for_all_members_stands_at_the_top(section: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"{section}:\n  {key}: hidden\n")
    with pytest.raises(ConfigError, match=rf"^{section}\.{key}: '…' is not allowed; allowed: {key} at the top"):
        build_config(path)
    assert build_config(None, {"security.secret": KEY}).security.secret == KEY


@pytest.mark.parametrize(("path", "value"), [("security.secret", 12345678), ("router.api_key", ["12345678"])])
def test_a_secret_of_the_wrong_type_is_not_shown(path: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{path}: '…' is not allowed; allowed: text") as error:
        build_config(None, {path: value})
    assert "12345678" not in str(error.value)


def test_the_welcome_says_what_passes_in_the_clear() -> None:
    def said(config: ClusterConfig) -> list[str]:
        return [line for line in welcome(config, ENDPOINTS).splitlines() if line.startswith("warning")]

    assert said(ClusterConfig()) == []
    (keys, members) = said(router(host="0.0.0.0", api_key=KEY))
    assert "keys and prompts pass in the clear on 0.0.0.0" in keys
    assert "secret and KV pass in the clear on 0.0.0.0" in members
    assert "everybody who reaches 0.0.0.0" in said(replace(router(host="0.0.0.0"), insecure=True))[0]
    pem = {"tls_cert": "c", "tls_key": "k"}
    security = SecurityConfig(tls_ca="a", **pem)
    assert said(replace(router(host="0.0.0.0", api_key=KEY, **pem), security=security)) == []


def test_lines_to_copy_fit_keys_and_certificates() -> None:
    text = welcome(router(api_key=f"{KEY},another", tls_cert="c", tls_key="k"), ENDPOINTS)
    assert "http://" not in text
    assert "--cacert $TANDEM_CA https://127.0.0.1:1/v1" in text
    assert "Bearer ${TANDEM_API_KEY%%,*}" in text
    assert "tls=ClientTLS.from_environment()" in text
    assert "  SSL_CERT_FILE=$TANDEM_CA " in text
    assert KEY not in text
    assert "Bearer ${TANDEM_API_KEY}" in welcome(router(api_keys_file="keys"), ENDPOINTS)
