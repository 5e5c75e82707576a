"""No option of a scenario is parsed and then read by nobody: each one changes what is simulated, and none is left out
here.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.latency.profile import StepProfile
from tandem.cluster.sim.cluster import ClusterSpec
from tandem.cluster.sim.compose import cluster_spec
from tandem.cluster.sim.device_spec import DeviceSpec
from tandem.cluster.sim.scenario import FailureSection, PoolSection, RouterSection, read_scenario
from tandem.cluster.types import StepTimeCoefficients

ROUTER: dict[str, Any] = {
    "max_waiting": 7,
    "refuse": False,
    "overhead_s": 0.5,
    "rpc_s": 0.25,
    "local_prefill_threshold_tokens": 64,
    "heartbeat_s": 0.125,
    "heartbeat_timeout_s": 3.0,
    "worker_lost_after_s": 30.0,
    "unready_wait_s": 5.0,
    "max_attempts": 2,
    "request_timeout_s": 60.0,
}
POOL: dict[str, Any] = {
    "workers": 2,
    "tensor_parallel": 2,
    "pipeline_stages": 2,
    "node": "elsewhere",
    "max_batched_tokens": 512,
    "max_running": 16,
    "max_waiting": 7,
    "batching": "prompts_alone",
    "kv_cache_bytes": "8GiB",
    "profile": "steps.json",
}
FAILURE: dict[str, Any] = {"worker": "prefill-0", "at_s": 2.0, "back_s": 3.0, "silent": True}
DEVICE: dict[str, Any] = {
    "model": "opt-6.7b",
    "dtype": "float32",
    "kv_dtype": "float32",
    "hardware": "h100",
    "profile": "steps.json",
    "gpus_per_node": 1,
    "intra_node": "25Gbps",
    "inter_node": "3GB/s",
    "memory_bytes": "60GiB",
    "utilization": 0.8,
    "block_size": 32,
    "max_model_len": 1024,
    "prefix_cache": False,
}


def simulated(**options: Any) -> ClusterSpec:
    """What is simulated; costs by what a step of 1000 prompt tokens and eight answers takes, so that they compare."""
    base = {"model": "opt-13b", "hardware": "a100-80g", "prefill.workers": 1, "decode.workers": 1}
    spec = cluster_spec(read_scenario(None, base | options))
    return replace(
        spec,
        workers=tuple(
            replace(one, costs=one.costs.step_time_s(1000, 10**6, 8, 8000))  # type: ignore[arg-type]
            for one in spec.workers
        ),
    )


@pytest.fixture(autouse=True)
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StepProfile.linear(StepTimeCoefficients(step_s=0.5)).save(tmp_path / "steps.json")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("section", "options", "prefix"),
    [(RouterSection, ROUTER, "router."), (PoolSection, POOL, "decode."), (DeviceSpec, DEVICE, "")],
    ids=["router", "pool", "device"],
)
def test_every_option_of_a_section_changes_what_is_simulated(
    section: type, options: dict[str, Any], prefix: str
) -> None:
    assert options.keys() == {option.name for option in fields(section)}
    base = simulated()
    assert base == simulated()
    unread = [name for name, value in options.items() if simulated(**{prefix + name: value}) == base]
    assert unread == []


def test_every_option_of_a_failure_changes_what_is_simulated() -> None:
    assert FAILURE.keys() == {option.name for option in fields(FailureSection)}
    least = {"worker": "decode-0", "at_s": 1.0}
    base = simulated(failures=[least])
    assert base != simulated()
    assert [name for name, value in FAILURE.items() if simulated(failures=[least | {name: value}]) == base] == []


def test_the_size_of_all_steps_and_the_queues_of_both_pools_are_the_scenarios() -> None:
    spec = simulated(**{"max_batched_tokens": 1024, "prefill.max_waiting": 9, "decode.max_waiting": 8})
    assert [(one.max_batched_tokens, one.max_waiting) for one in spec.workers] == [(1024, 9), (1024, 8)]
