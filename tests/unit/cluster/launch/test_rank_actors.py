"""Ranks on other nodes: where they reach their leader, and when they may not stand there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem.cluster.config import ConfigError, EngineConfig, SecurityConfig, WorkerConfig
from tandem.cluster.launch.rank_actors import leader_host
from tandem.cluster.types import Role

NEAR = "10.0.0.1"
CONFIG = WorkerConfig(worker_id="decode-0", role=Role.DECODE, engine=EngineConfig(pipeline_stages=2), host="0.0.0.0")


def test_ranks_of_one_node_need_no_address() -> None:
    loopback = replace(CONFIG, host="127.0.0.1")
    assert leader_host(loopback, remote=False, node_host=NEAR) == "127.0.0.1"
    tls = SecurityConfig(tls_cert="c", tls_key="k", tls_ca="a")
    assert leader_host(replace(loopback, security=tls), remote=False, node_host=NEAR) == "127.0.0.1"


def test_ranks_of_other_nodes_reach_the_leaders_node() -> None:
    assert leader_host(CONFIG, remote=True, node_host=NEAR) == NEAR
    assert leader_host(replace(CONFIG, host="10.1.0.1"), remote=True, node_host=NEAR) == "10.1.0.1"


def test_a_worker_on_loopback_has_no_ranks_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"host: '127\.0\.0\.1' .* an address that the nodes of this worker's other"):
        leader_host(replace(CONFIG, host="127.0.0.1"), remote=True, node_host=NEAR)


def test_what_cannot_be_encrypted_is_refused_where_members_encrypt() -> None:
    tls = SecurityConfig(tls_cert="c", tls_key="k", tls_ca="a")
    with pytest.raises(ConfigError, match=r"security\.tls_cert: 'c' .* ranks stand on several nodes"):
        leader_host(replace(CONFIG, security=tls), remote=True, node_host=NEAR)
