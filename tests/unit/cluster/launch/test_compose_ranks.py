"""What a worker whose KV goes from rank to rank is refused for."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from tandem.cluster.auth import OPEN, MemberCredentials, MemberTLS
from tandem.cluster.config import ConfigError, WorkerConfig
from tandem.cluster.launch.compose_ranks import join_ranks
from tandem.cluster.tls import Identity
from tandem.cluster.types import Role

NO_DEVICE = cast("Any", None)


def config(**fields: Any) -> WorkerConfig:
    return WorkerConfig(worker_id="w", role=Role.DECODE, **fields)


def test_ranks_do_not_meet_where_members_use_tls() -> None:
    """What goes from rank to rank is not encrypted."""
    credentials = MemberCredentials(tls=MemberTLS(identity=Identity(cert=b"", key=b""), ca=b""))
    with pytest.raises(ConfigError, match=r"^transport: 'gloo' .*auto, grpc or mapped where members use TLS"):
        asyncio.run(join_ranks(config(transport="gloo"), "127.0.0.1", NO_DEVICE, credentials))


def test_no_process_moves_what_the_ranks_move() -> None:
    with pytest.raises(ConfigError, match=r"^kv_mover: 'process' .*auto or thread with transport gloo"):
        config(transport="gloo", kv_mover="process")


def test_other_transports_need_no_ranks() -> None:
    assert asyncio.run(join_ranks(config(), "127.0.0.1", NO_DEVICE, OPEN)) is None
