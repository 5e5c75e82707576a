"""A worker's own metrics: open on loopback, and beyond it for those who show the cluster's secret."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter
from tandem.cluster.auth import OPEN, MemberCredentials
from tandem.cluster.config import ConfigError, SecurityConfig, WorkerConfig
from tandem.cluster.launch import worker_metrics
from tandem.cluster.launch.worker_metrics import WorkerMetricsServer
from tandem.cluster.types import Role

SECRET = "the secret of this cluster"
MEMBER = MemberCredentials.load(SecurityConfig(secret=SECRET))
ANSWER_S = 20.0


def scrape(port: int, shown: str | None) -> tuple[int, str]:
    headers = {} if shown is None else {"Authorization": shown}
    question = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    try:
        with urllib.request.urlopen(question, timeout=ANSWER_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def answers(credentials: MemberCredentials, *shown: str | None, insecure: bool = False) -> list[tuple[int, bool]]:
    """Status of each scrape, and whether it told anything."""
    registry = CollectorRegistry()
    Counter("steps", "of the engine", registry=registry)
    config = WorkerConfig(worker_id="w", role=Role.MIXED, metrics_port=0, insecure=insecure)
    server = WorkerMetricsServer(config, registry, credentials)
    try:
        return [(status, "steps_total" in text) for status, text in (scrape(server.port, key) for key in shown)]
    finally:
        server.stop()


def test_on_loopback_anybody_may_scrape() -> None:
    assert answers(MEMBER, None, "Bearer wrong") == [(200, True)] * 2


def test_beyond_it_a_scraper_shows_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_metrics, "is_loopback", lambda host: False)
    shown = (None, "Bearer wrong", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}", f"bearer  {SECRET}")
    assert answers(MEMBER, *shown) == [(401, False)] * 4 + [(200, True)] * 2
    assert answers(OPEN, None, insecure=True) == [(200, True)]
    with pytest.raises(ConfigError, match=r"^metrics_port: 0 is not allowed; .* the metrics are read beyond loopback"):
        answers(OPEN, None)
