"""The configuration's file: YAML in, overrides over it, and what is wrong with it named where it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tandem.cluster.config import ClusterConfig, ConfigError, EngineConfig, check_served, from_dict, to_dict
from tandem.cluster.config_file import build_config, load_config
from tandem.cluster.config_schema import parse_bytes
from tandem.cluster.types import SLO, Role


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        model: dummy:tiny
        engine: {device: paced, kv_cache_bytes: 64MiB, cpus: [0, 1]}
        prefill: {workers: 2, engine: {max_batched_tokens: 2048}}
        decode: 3
        router:
          http_port: 9000
          slo: {ttft_s: 0.2, tpot_s: 0.05}
        drain_timeout_s: 5
        """,
    )
    config = load_config(path)
    assert config.router.model == config.engine.model == "dummy:tiny"
    assert (config.prefill, config.decode, config.mixed) == (2, 3, 0)
    assert config.engine.kv_cache_bytes == 64 * 2**20
    assert config.engine.cpus == (0, 1)
    assert config.engine_of(Role.PREFILL).max_batched_tokens == 2048
    assert config.engine_of(Role.PREFILL).device == "paced"
    assert config.engine_of(Role.DECODE) is config.engine
    assert config.router.slo == SLO(ttft_s=0.2, tpot_s=0.05)


def test_the_plan_of_a_cluster_is_its_routers(tmp_path: Path) -> None:
    text = """
plan: {predicted_attainment: 0.93, rate: 8, ttft_ms: {p50: 120.5, p90: 300}, predicted_by_class: {gold: 0.9}}
"""
    config = load_config(write(tmp_path, text), {"plan.goodput_per_gpu": 2.5})
    plan = config.router.plan
    assert plan is not None
    assert (plan.predicted_attainment, plan.rate, plan.goodput_per_gpu) == (0.93, 8, 2.5)
    assert (plan.ttft_ms.p90, plan.ttft_ms.p99, plan.tpot_ms.p50) == (300, None, None)
    assert plan.predicted_by_class == {"gold": 0.9}
    assert from_dict(ClusterConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert build_config().router.plan is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan: {predicted_attainment: 1.2}", "plan.predicted_attainment: 1.2 is not allowed"),
        ("plan: {ttft_ms: {p95: 1}}", "plan.ttft_ms.p95"),
        ("plan: {rate: 0}", "plan.rate: 0 is not allowed"),
        ("plan: {predicted_by_class: {GOLD: 0.5}}", "plan.predicted_by_class: 'GOLD' is not allowed"),
        ("plan: [1]", "plan: "),
        ("router: {plan: {rate: 1}}", "router.plan: .*allowed: plan at the top"),
    ],
)
def test_a_bad_plan_is_named_as_it_was_written(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_what_cannot_be_served_yet_is_refused_where_it_stands(tmp_path: Path) -> None:
    paced = load_config(write(tmp_path, "engine: {device: paced}\nprefill: {engine: {tensor_parallel: 4}}\n"))
    assert paced.engine_of(Role.PREFILL).tensor_parallel == 4
    ranks = load_config(write(tmp_path, "prefill: {engine: {tensor_parallel: 3, pipeline_stages: 2}}\n"))
    assert ranks.engine_of(Role.PREFILL).num_ranks == 6
    with pytest.raises(ConfigError, match=r"prefill\.engine\.kernels: 'compiled' .*auto, torch, reference .*3 ranks"):
        load_config(write(tmp_path, "prefill: {engine: {tensor_parallel: 3, kernels: compiled}}\n"))
    with pytest.raises(ConfigError, match=r"prefill\.engine\.quantization: 'w8a8' .*none for a worker of 2 ranks"):
        load_config(write(tmp_path, "prefill: {engine: {pipeline_stages: 2, quantization: w8a8}}\n"))
    deep = load_config(write(tmp_path, "engine: {device: paced}\ndecode: {engine: {pipeline_stages: 2}}\n"))
    with pytest.raises(ConfigError, match=r"decode\.engine\.pipeline_stages: 2 .*cannot serve pipelines"):
        check_served(deep)


def test_a_step_profile_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text("{}")
    text = "engine: {device: paced, paced_profile: elsewhere.json}\nprefill: {engine: {paced_profile: steps.json}}\n"
    config = load_config(write(tmp_path, text))
    assert config.engine_of(Role.PREFILL).paced_profile == str(tmp_path / "steps.json")
    assert config.engine_of(Role.DECODE).paced_profile == "elsewhere.json"


def test_kv_scales_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "scales.json").write_text("{}")
    config = load_config(write(tmp_path, "engine: {device: cuda, kv_cache_dtype: int8, kv_scales: scales.json}\n"))
    assert config.engine.kv_scales == str(tmp_path / "scales.json")


def test_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == ClusterConfig()


def test_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, "engine: {device: cpu, threads: 2}\nprefill: {workers: 2, engine: {threads: 4}}\n")
    config = load_config(path, {"engine.device": "paced", "prefill": 3, "router.http_port": 0, "model": "m"})
    assert config.engine == EngineConfig(model="m", device="paced", threads=2)
    assert config.prefill == 3
    assert config.engine_of(Role.PREFILL).threads == 4
    assert config.router.http_port == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enigne: {}", r"enigne: .*did you mean engine\?"),
        ("engine: {blocksize: 1}", r"engine\.blocksize: .*did you mean block_size\?"),
        ("router: {slo: {ttft: 1}}", r"router\.slo\.ttft: .*did you mean ttft_s\?"),
        ("prefill: {worker: 1}", r"prefill\.worker: .*did you mean workers\?"),
        ("prefill: {engine: {thread: 1}}", r"prefill\.engine\.thread: .*did you mean threads\?"),
        ("worker: {worker_id: x}", r"worker\.worker_id"),
        ("worker: {lease: 3}", r"worker\.lease: .*did you mean lease_s\?"),
        ("zzz: 1", r"zzz: .*one of address, decode"),
        ("prefill_engine: {}", r"prefill_engine"),
        ("engine: {threads: 1, threads: 2}", r"^threads: is given twice \(line 1\); allowed: each key once"),
        ("engine: 3", r"engine: 3 .*a section"),
        ("engine: {kv_cache_bytes: lots}", r"engine\.kv_cache_bytes: 'lots' .*512MiB"),
        ("engine: {kv_cache_bytes: -1}", r"engine\.kv_cache_bytes: -1 .*at least 0"),
        ("prefill: {engine: {threads: 0}}", r"prefill\.engine\.threads: 0"),
        ("engine: {threads: 0}\nprefill: {engine: {block_size: 8}}", r"^engine\.threads: 0"),
        ("router: {slo: {ttft_s: 0}}", r"router\.slo\.ttft_s: 0"),
        ("- a", r"configuration: \['a'\] .*a section"),
        ("engine: [", r"config: .*valid YAML"),
        ("engine: !!python/object/apply:os.getcwd []", r"config: .*valid YAML"),
        ("prefill: {workers: many}", r"prefill: 'many' .*a whole number"),
        ("prefill: {workers: 1, engine: {model: other}}", r"^prefill\.engine\.model: 'other' .*the router's model"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["laptop.yaml", "opt-13b-4xa100.yaml"])
def test_a_question_for_a_plan_is_no_clusters_file(name: str, repository: Path) -> None:
    with pytest.raises(ConfigError, match=r"tandem plan --config FILE --output plan\.yaml makes one"):
        load_config(repository / "deploy" / "plans" / name)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="a readable YAML file"):
        load_config("/nonexistent/cluster.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 2**20), ("1.5 GB", 1_500_000_000), ("42", 42), ("7b", 7), ("2kib", 2048), ("1TiB", 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1 XB", "1e9"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_what_is_not_given_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"^router\.tls_key: is missing; allowed: a PEM file, as tls_cert is given$"):
        build_config(None, {"router.tls_cert": "cert.pem"})


def test_a_problem_that_is_not_the_value_stays_under_a_prefix() -> None:
    error = ConfigError("threads", None, "once", problem="is given twice").under("engine")
    assert str(error) == "engine.threads: is given twice; allowed: once"
