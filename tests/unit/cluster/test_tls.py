"""PEM files are checked when they are read, and the setting that is at fault is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from tandem.cluster.config import ConfigError, RouterConfig, SecurityConfig
from tandem.cluster.tls import ClientTLS, load_ca, load_identity


def test_a_pair_that_belongs_together_is_read(authority: Any) -> None:
    cert, key = authority.issue("pair")
    identity = load_identity(cert, key)
    assert identity.cert == Path(cert).read_bytes()
    assert identity.key == Path(key).read_bytes()
    assert "PRIVATE" not in repr(identity)
    assert load_ca(authority.ca, "tls_ca") == Path(authority.ca).read_bytes()


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("none", "good.key", r"^tls_cert: '.*none' is not allowed; allowed: a readable PEM file \(No such file"),
        ("good.pem", "none", r"^tls_key: '.*none' is not allowed; allowed: a readable PEM file \(No such file"),
        ("folder", "good.key", r"^tls_cert: .* a readable PEM file \(Is a directory"),
        ("empty", "good.key", r"^tls_cert: .* a PEM file with certificates"),
        ("good.key", "good.key", r"^tls_cert: .* a PEM file with certificates"),
        ("good.pem", "good.pem", r"^tls_key: .* the private key of the certificate in tls_cert, not encrypted"),
        ("good.pem", "other.key", r"^tls_key: .* the private key of .* \(key values mismatch\)"),
        ("good.pem", "locked.key", r"^tls_key: .* not encrypted"),
    ],
)
def test_a_wrong_file_is_named(authority: Any, tmp_path: Path, cert: str, key: str, message: str) -> None:
    for name in ("good", "other"):
        for path, kind in zip(authority.issue(name), ("pem", "key"), strict=True):
            (tmp_path / f"{name}.{kind}").write_bytes(Path(path).read_bytes())
    unlocked = serialization.load_pem_private_key((tmp_path / "good.key").read_bytes(), None)
    locked = unlocked.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    (tmp_path / "locked.key").write_bytes(locked)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        load_identity(str(tmp_path / cert), str(tmp_path / key))


def test_an_authority_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("none")
    with pytest.raises(ConfigError, match=r"^tls_ca: .* a PEM file with certificates"):
        load_ca(str(tmp_path / "ca"), "tls_ca")


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"tls_cert": "c"}, "tls_key"),
        ({"tls_key": "k"}, "tls_cert"),
        ({"tls_client_ca": "a"}, "tls_cert"),
    ],
)
def test_half_of_a_routers_pair_is_refused(fields: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{missing}: is missing; allowed: a PEM file, as "):
        RouterConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"tls_cert": "c", "tls_key": "k"}, "tls_ca"),
        ({"tls_cert": "c", "tls_ca": "a"}, "tls_key"),
        ({"tls_key": "k", "tls_ca": "a"}, "tls_cert"),
        ({"tls_ca": "a"}, "tls_cert"),
        ({"tls_server_name": "tandem"}, "tls_cert"),
    ],
)
def test_members_need_all_three_files(fields: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{missing}: is missing; allowed: a PEM file, as "):
        SecurityConfig(**fields)


def test_a_client_takes_its_files_from_the_environment(authority: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = authority.issue("client")
    monkeypatch.setenv("TANDEM_CA", authority.ca)
    monkeypatch.setenv("TANDEM_CLIENT_CERT", cert)
    with pytest.raises(ConfigError, match=r"^client_key: is missing"):
        ClientTLS.from_environment()
    monkeypatch.setenv("TANDEM_CLIENT_KEY", key)
    assert ClientTLS.from_environment() == ClientTLS(ca=authority.ca, cert=cert, key=key)
    assert ClientTLS.from_environment("other").ca == "other"
    assert ClientTLS.from_environment().context_for("http://127.0.0.1") is None
    context = ClientTLS.from_environment().context_for("https://127.0.0.1")
    assert context is not None
    assert context.cert_store_stats()["x509_ca"] == 1, "nobody else is trusted"
