"""PEM files, read and checked when a process starts, so that a wrong one is named then and not at the first handshake.

Everything raises `ConfigError` with the name of the setting that is at fault.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from .config_schema import ConfigError

MAX_PEM_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate (with the chain above it) and its private key, both PEM."""

    cert: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTLS:
    """What a client of a router trusts and shows: PEM files. Nothing: what the system trusts, and no certificate."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("client_cert", "client_key") if self.key is None else ("client_key", "client_cert")
            raise ConfigError(missing, None, f"a PEM file, as {given} is given")

    @classmethod
    def from_environment(cls, ca: str | None = None) -> ClientTLS:
        """What TANDEM_CA, TANDEM_CLIENT_CERT and TANDEM_CLIENT_KEY say; `ca` wins. Raises ConfigError."""
        cert, key = (os.environ.get(f"TANDEM_CLIENT_{name}") or None for name in ("CERT", "KEY"))
        return cls(ca=ca or os.environ.get("TANDEM_CA") or None, cert=cert, key=key)

    def load(self) -> tuple[bytes | None, Identity | None]:
        """The certificates that are trusted, and what is shown. Raises ConfigError. Blocks: reads files."""
        ca = None if self.ca is None else load_ca(self.ca, "ca")
        if self.cert is None or self.key is None:
            return ca, None
        return ca, load_identity(self.cert, self.key, cert_field="client_cert", key_field="client_key")

    def context(self) -> ssl.SSLContext:
        """For https. Raises ConfigError. Blocks: reads files."""
        ca, identity = self.load()
        context = ssl.create_default_context(cadata=None if ca is None else ca.decode("ascii", "ignore"))
        if identity is not None:
            assert self.cert is not None
            assert self.key is not None
            context.load_cert_chain(Path(self.cert).expanduser(), Path(self.key).expanduser())
        return context

    def context_for(self, url: str) -> ssl.SSLContext | None:
        """None where the URL is not https."""
        return self.context() if url.lower().startswith("https://") else None


def load_identity(cert: str, key: str, *, cert_field: str = "tls_cert", key_field: str = "tls_key") -> Identity:
    """The two files, which must belong together. Blocks: reads files."""
    identity = Identity(_read(cert, cert_field), _read(key, key_field))
    cert, key = str(Path(cert).expanduser()), str(Path(key).expanduser())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _check_certificates(context, cert, cert_field)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        why = "" if error.reason is None else f" ({error.reason.replace('_', ' ').lower()})"
        allowed = f"a PEM file with the private key of the certificate in {cert_field}, not encrypted{why}"
        raise ConfigError(key_field, key, allowed) from None
    return identity


def load_ca(path: str, name: str) -> bytes:
    """The certificates (PEM) of those who may sign the other side's. Blocks: reads a file."""
    data = _read(path, name)
    _check_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path, name)
    return data


def _read(path: str, name: str) -> bytes:
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(MAX_PEM_BYTES)
    except OSError as error:
        raise ConfigError(name, path, f"a readable PEM file ({error.strerror or error})") from None


def _check_certificates(context: ssl.SSLContext, path: str, name: str) -> None:
    try:
        context.load_verify_locations(cafile=Path(path).expanduser())
    except ssl.SSLError:
        raise ConfigError(name, path, "a PEM file with certificates") from None
