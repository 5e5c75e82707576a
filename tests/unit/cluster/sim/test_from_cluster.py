"""What `tandem serve` would start, in virtual time: workers, router and promises of a cluster's file."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.cluster.config_file import load_config
from tandem.cluster.config_schema import ConfigError
from tandem.cluster.latency.profile import StepProfile
from tandem.cluster.sim.compose import cluster_spec
from tandem.cluster.sim.from_cluster import cluster_values
from tandem.cluster.sim.scenario import read_scenario
from tandem.cluster.types import Role, StepTimeCoefficients

PLAN = """
model: dummy:opt-13b
engine: {device: paced, block_size: 32, max_model_len: 1024}
prefill:
  workers: 2
  engine: {paced_profile: p.json, tensor_parallel: 2, kv_cache_bytes: 4GiB, max_batched_tokens: 700}
decode: {workers: 1, engine: {paced_profile: d.json, kv_cache_bytes: 8GiB, max_running: 99, max_waiting: 17}}
router:
  max_waiting: 333
  slo_classes: {chat: {ttft_s: 0.25, tpot_s: 0.1, share: 0.7}, bulk: {}}
plan: {rate: 5.5}
"""


def test_a_plan_is_simulated_as_it_would_be_served(tmp_path: Path) -> None:
    profiles = [StepProfile.linear(StepTimeCoefficients(step_s=seconds)) for seconds in (0.1, 0.2)]
    for name, profile in zip(("p", "d"), profiles, strict=True):
        profile.save(tmp_path / f"{name}.json")
    (tmp_path / "plan.yaml").write_text(PLAN)
    scenario = read_scenario(None, cluster_values(load_config(tmp_path / "plan.yaml")) | {"hardware": "h100"})
    spec = cluster_spec(scenario)
    prefill, _, decode = spec.workers
    assert [one.role for one in spec.workers] == [Role.PREFILL, Role.PREFILL, Role.DECODE]
    assert (prefill.costs, decode.costs) == tuple(profiles)
    assert (prefill.max_batched_tokens, decode.max_running, decode.max_waiting) == (700, 99, 17)
    assert (prefill.block_size, prefill.max_model_len) == (32, 1024)
    assert (prefill.num_blocks, decode.num_blocks) == (2**32 // prefill.block_bytes, 2**33 // prefill.block_bytes)
    assert (spec.router.max_waiting, scenario.rate) == (333, 5.5)
    chat, bulk = spec.router.promises["chat"], spec.router.promises["bulk"]
    assert (chat.ttft_s, chat.tpot_s, chat.share, bulk.ttft_s) == (0.25, 0.1, 0.7, None)
    assert {name: kind.share for name, kind in scenario.workload.classes.items()} == {"chat": 0.5, "bulk": 0.5}


def test_a_cpu_cluster_takes_the_steps_of_this_kind_of_machine(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "model: smollm2-135m\nprefill: 1\ndecode: 1\nengine: {max_model_len: 2048}\n"
    )
    spec = cluster_spec(read_scenario(None, cluster_values(load_config(tmp_path / "cluster.yaml"))))
    assert [one.worker_id for one in spec.workers] == ["prefill-0", "decode-0"]
    assert spec.workers[0].num_blocks == 2**29 // spec.workers[0].block_bytes
    assert spec.router.promises["interactive"].ttft_s == 10.0


def test_paced_workers_without_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("engine: {device: paced}\n")
    with pytest.raises(ConfigError, match=r"prefill\.engine\.paced_profile: is missing; allowed: a file"):
        cluster_values(load_config(tmp_path / "cluster.yaml"))


@pytest.mark.parametrize(("narrow", "times"), [("auto", 1), ("fp8", 2), ("int8", 2)])
def test_narrow_kv_holds_twice_the_tokens(tmp_path: Path, narrow: str, times: int) -> None:
    scales = "" if narrow == "auto" else ", kv_scales: unread.json"
    (tmp_path / "cluster.yaml").write_text(
        f"model: llama-3.1-8b\nengine: {{device: cuda, kv_cache_bytes: 16GiB, kv_cache_dtype: {narrow}{scales}}}\n"
    )
    values = cluster_values(load_config(tmp_path / "cluster.yaml"))
    spec = cluster_spec(read_scenario(None, values | {"hardware": "h100", "rate": 1.0}))
    assert spec.workers[0].num_blocks == times * 2**34 // (16 * 131072)


def test_pools_that_hold_kv_otherwise_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("engine: {device: cuda}\ndecode: {engine: {kv_cache_dtype: fp8}}\n")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: \['auto', 'fp8'\] is not allowed; allowed: one for all"):
        cluster_values(load_config(tmp_path / "cluster.yaml"))


def test_narrow_kv_is_not_told_by_a_profile(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "engine: {device: cuda, kv_cache_dtype: fp8}\nplan: {problem: {profile: measured.json}}\n"
    )
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_dtype: 'fp8' is not allowed; allowed: auto with a prof"):
        cluster_values(load_config(tmp_path / "cluster.yaml"))
