"""PEM files, read and checked when a process starts, so that a wrong one is named then and not at the first handshake.

Everything raises `ConfigError` with the name of the setting that is at fault.
"""

from __future__ import annotations

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
