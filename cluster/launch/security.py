"""What `tandem serve` settles about strangers before anything listens: one secret for all members, paths that hold in
every process, a key for the operator's own commands where clients need keys, and no open door beyond loopback.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

from ...router.api_keys import ApiKeys
from ..auth import MemberCredentials, check_clients, resolve_secret
from ..config import ClusterConfig, ConfigError
from ..tls import load_ca, load_identity


def secured(config: ClusterConfig) -> tuple[ClusterConfig, str | None]:
    """The cluster's configuration with all of it filled in, and the operator's key (None where clients need no key).

    A cluster that is given no secret draws one, so that another user of this machine cannot call its members either.
    Raises ConfigError, also for files of a local cluster that cannot be used. Blocks: reads files.
    """
    security = replace(
        config.security,
        secret=resolve_secret(config.security) or secrets.token_hex(32),
        secret_file=None,
        tls_cert=_absolute(config.security.tls_cert),
        tls_key=_absolute(config.security.tls_key),
        tls_ca=_absolute(config.security.tls_ca),
    )
    router = replace(
        config.router,
        api_keys_file=_absolute(config.router.api_keys_file),
        tls_cert=_absolute(config.router.tls_cert),
        tls_key=_absolute(config.router.tls_key),
        tls_client_ca=_absolute(config.router.tls_client_ca),
        security=security,
        insecure=config.insecure or config.router.insecure,
    )
    check_clients(router, under="router")
    operator_key = None
    if router.api_keys or router.api_keys_file is not None:
        operator_key = secrets.token_hex(32)
        router = replace(router, api_key=",".join((*router.api_keys, operator_key)))
    worker = replace(config.worker, security=security, insecure=config.insecure or config.worker.insecure)
    secure = replace(config, security=security, router=router, worker=worker)
    if config.address is None:  # elsewhere the files are on the members' own machines
        _read_files(secure)
    return secure, operator_key


def _read_files(config: ClusterConfig) -> None:
    """Raises the error that a member would raise, before Ray is started for it."""
    MemberCredentials.load(config.security)
    router = config.router
    try:
        ApiKeys.from_config(router)
        if router.tls_cert is not None and router.tls_key is not None:
            load_identity(router.tls_cert, router.tls_key)
        if router.tls_client_ca is not None:
            load_ca(router.tls_client_ca, "tls_client_ca")
    except ConfigError as error:
        raise error.under("router") from None


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())
