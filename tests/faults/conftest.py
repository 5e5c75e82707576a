"""Faults on real processes: the workers under test, and the modules of this folder."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the folder's own modules

from scenes import Rig


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for a module: channels to the workers live on it."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def rig(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Workers whose leases, waits and credits outlast every test: what is freed is freed by the protocol."""
    rig = Rig(tmp_path_factory.mktemp("rig"), lease_s=120.0, pull_wait_s=120.0, credit_ttl_s=120.0)
    yield rig
    runner.run(rig.close())


@pytest.fixture(scope="module")
def short_rig(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Workers whose leases, waits and credits end in 0.6 s."""
    rig = Rig(tmp_path_factory.mktemp("short"), lease_s=0.6, pull_wait_s=0.6, credit_ttl_s=0.6)
    yield rig
    runner.run(rig.close())
