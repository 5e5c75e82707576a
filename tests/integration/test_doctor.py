"""`tandem doctor` and `tandem status` on a running cluster: what went through the split, and what went round it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tandem.cluster import cli_doctor, cli_status
from tandem.cluster.config import EngineConfig, RouterConfig


def test_a_split_that_served_and_one_that_was_gone_round(
    start_split: Callable[..., Any], paced: Callable[..., EngineConfig], wait: Callable[..., None]
) -> None:
    cluster = start_split(paced(), router=RouterConfig(local_prefill_threshold_tokens=8))
    url = f"http://{cluster.router.http_address}"

    def findings() -> dict[str, dict[str, str]]:
        said: list[str] = []
        assert cli_doctor.doctor(url, model="dummy:tiny-llama", as_json=True, say=said.append) == 0, said
        return {finding["about"]: finding for finding in json.loads(said[0])}

    cluster.grpc.generate(token_ids=list(range(1, 100)), max_tokens=5, temperature=0).collect()
    cluster.wait_clean()
    found = findings()
    assert found["split"]["level"] == "ok"
    assert "split 100.0% of 1" in found["split"]["text"]
    assert found["memory"]["level"] == "ok"
    assert all(worker["kv_bytes"] >= 2**17 for worker in cli_status.fetch(url)["workers"])
    assert found["fingerprints"]["level"] == found["ledger"]["level"] == found["handoffs"]["level"] == "ok"
    wait(lambda: "1 by " in findings()["transfers"]["text"], "a heartbeat that tells of the transfer")
    cluster.grpc.generate(token_ids=[1, 2, 3], max_tokens=5, temperature=0).collect()
    assert "1 went round the prefill pool" in findings()["split"]["text"]
    text = cli_status.render(url, cli_status.fetch(url), cli_status.scrape(url))
    assert "0 requests inside" in text
    assert "prefill-0" in text
