"""Faults on real processes: the workers under test, and the modules of this folder."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the folder's own modules

from scenes import Rig
from tandem.cluster.config import SecurityConfig
from whole_cluster import Cluster

LATE = "reached at the second try"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for a module: channels to the workers live on it."""
    with asyncio.Runner() as runner:
        yield runner


def _lanes(runner: asyncio.Runner, factory: pytest.TempPathFactory, count: int, **worker: Any) -> Iterator[list[Rig]]:
    security = SecurityConfig(secret="the secret of these workers")
    lanes = [Rig(factory.mktemp("lane"), security=security, **worker) for _ in range(count)]
    yield lanes
    for rig in lanes:
        runner.run(rig.close())


@pytest.fixture(scope="module")
def lanes(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rig]]:
    """Pairs of workers whose leases, waits and credits outlast every test: what is freed is freed by the protocol."""
    yield from _lanes(runner, tmp_path_factory, 3, lease_s=120.0, pull_wait_s=120.0, credit_ttl_s=120.0)


@pytest.fixture(scope="module")
def short_lanes(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rig]]:
    """Pairs of workers whose leases, waits and credits end in 0.6 s."""
    yield from _lanes(runner, tmp_path_factory, 2, lease_s=0.6, pull_wait_s=0.6, credit_ttl_s=0.6)


@pytest.fixture(scope="module")
def mapped_lanes(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rig]]:
    """Pairs of workers that read each other's memory."""
    grants = {"lease_s": 120.0, "pull_wait_s": 120.0, "credit_ttl_s": 120.0}
    yield from _lanes(runner, tmp_path_factory, 2, transport="mapped", **grants)


@pytest.fixture(scope="module")
def moved_lanes(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rig]]:
    """Pairs of workers whose KV moves in processes of its own."""
    grants = {"lease_s": 120.0, "pull_wait_s": 120.0, "credit_ttl_s": 120.0}
    yield from _lanes(runner, tmp_path_factory, 2, kv_mover="process", **grants)


@pytest.fixture(scope="module")
def gloo_lanes(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rig]]:
    """A pair of workers whose KV goes from rank to rank."""
    grants = {"lease_s": 120.0, "pull_wait_s": 120.0, "credit_ttl_s": 120.0}
    yield from _lanes(runner, tmp_path_factory, 1, transport="gloo", **grants)


@pytest.fixture
def start(runner: asyncio.Runner, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Clusters that end with the test."""
    clusters: list[Cluster] = []

    def make(**router: Any) -> Cluster:
        clusters.append(Cluster(runner, tmp_path, **router))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def rig(runner: asyncio.Runner, lanes: list[Rig]) -> Rig:
    """Two workers whose leases outlast every test, and a scripted router."""
    runner.run(lanes[0].heal())
    return lanes[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Takes along, from whichever process ran it, what the summary tells."""
    try:
        return (yield)
    finally:
        cells = sys.modules.get("cells")
        while cells is not None and cells.REACHED_LATE:
            item.user_properties.append((LATE, cells.REACHED_LATE.pop()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much was tried, for whoever reports it."""
    cells = sys.modules.get("cells")
    if cells is not None:
        terminalreporter.write_line(cells.summary())
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, what in report.user_properties if getattr(report, "when", "") == "call" else ():
                if name == LATE:
                    terminalreporter.write_line(f"{LATE}: {what}")
