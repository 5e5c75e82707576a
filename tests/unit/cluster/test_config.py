"""Every range and type of the configuration, what its parts ask of each other, and the way back to plain values."""

import dataclasses
import json
from typing import Any

import pytest
from tandem.cluster.config import (
    ClusterConfig,
    ConfigError,
    EngineConfig,
    RouterConfig,
    SecurityConfig,
    WorkerConfig,
    from_dict,
    to_dict,
)
from tandem.cluster.config_file import build_config
from tandem.cluster.config_schema import nearest
from tandem.cluster.types import SLO, Role
from tandem.kernels.dispatch import ON_GPU

BAD_ENGINE = [
    ("model", ""),
    ("model", 3),
    ("device", "tpu"),
    ("dtype", "float16"),
    ("block_size", 0),
    ("block_size", 1025),
    ("block_size", 16.0),
    ("block_size", True),
    ("kv_cache_bytes", -1),
    ("gpu_memory_utilization", 0.0),
    ("gpu_memory_utilization", 1.1),
    ("enforce_eager", 1),
    ("enforce_eager", True),
    ("max_model_len", 0),
    ("max_batched_tokens", 0),
    ("max_running", 0),
    ("max_waiting", 0),
    ("prefix_cache", 1),
    ("prefix_cache", "yes"),
    ("tensor_parallel", 0),
    ("tensor_parallel", 1025),
    ("pipeline_stages", 0),
    ("threads", 0),
    ("cpus", [1]),
    ("cpus", (-1,)),
    ("cpus", ("0",)),
    ("cpus", (1, 1)),
    ("paced_step_s", -0.1),
    ("paced_prefill_token_s", float("nan")),
    ("paced_decode_row_s", float("inf")),
    ("paced_context_token_s", "fast"),
    ("paced_profile", ""),
    ("quantization", "w4a16"),
    ("kv_cache_dtype", "fp4"),
    ("kv_cache_dtype", "fp8"),
    ("kv_scales", ""),
    ("kv_scales", "scales.json"),
    ("kernels", "cuda"),
    ("batching", "static"),
    ("gpus", (0,)),
    ("gpus", (-1,)),
]

ON_A_GPU = [
    ({"kernels": "compiled"}, "kernels: 'compiled' is not allowed; allowed: auto, triton, torch or reference on cuda"),
    ({"kv_cache_dtype": "int8"}, "kv_scales: is missing; allowed: a file with kv_cache_dtype int8: `tandem calibrate`"),
    ({"kv_scales": "a.json"}, "kv_scales: 'a.json' is not allowed; allowed: none with kv_cache_dtype auto, whose KV"),
    ({"gpus": (0, 1, 2), "tensor_parallel": 2}, "gpus: .* allowed: 2, or a multiple of that: one for each rank"),
]

BAD_WORKER = [
    ("kv_mover", "fork"),
    ("worker_id", " "),
    ("role", "prefill"),
    ("engine", None),
    ("host", ""),
    ("port", -1),
    ("port", 65536),
    ("kv_port", 1.5),
    ("routers", "host:1"),
    ("routers", ("",)),
    ("heartbeat_interval_s", 0),
    ("lease_s", 0),
    ("pull_wait_s", -1),
    ("credit_ttl_s", 0),
    ("credit_factor", 0),
    ("checksum", None),
    ("metrics_port", 70000),
    ("transport", "rdma"),
    ("security", {"secret": "s"}),
    ("insecure", 1),
]

BAD_ROUTER = [
    ("processes", 0),
    ("process", 64),
    ("host", "two\nlines"),
    ("http_port", 65536),
    ("grpc_port", 8000),
    ("registry_port", "8002"),
    ("model", ""),
    ("served_model_name", ""),
    ("max_waiting", 0),
    ("max_body_bytes", 10),
    ("max_choices", 0),
    ("max_stop", 0),
    ("default_max_tokens", 0),
    ("request_timeout_s", 0),
    ("heartbeat_timeout_s", 0),
    ("worker_lost_after_s", 0),
    ("local_prefill_threshold_tokens", -1),
    ("max_attempts", 0),
    ("events_path", ""),
    ("slo", {"ttft_s": 1.0}),
    ("slo_classes", {"gold": {"share": 1.0}}),
    ("plan", {"rate": 1.0}),
    ("api_key", ""),
    ("api_keys_file", ""),
    ("tls_cert", ""),
    ("tls_key", 1),
    ("tls_client_ca", ""),
    ("security", {"secret": "s"}),
    ("insecure", "yes"),
    ("unready_wait_s", -1),
]

BAD_CLUSTER = [
    ("prefill", -1),
    ("decode", 1025),
    ("mixed", "1"),
    ("address", ""),
    ("worker_cpus", -0.5),
    ("router_cpus", None),
    ("object_store_bytes", 1024),
    ("drain_timeout_s", -1),
    ("start_timeout_s", 0),
]


@pytest.mark.parametrize(("name", "value"), BAD_ENGINE)
def test_engine_ranges(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{name: value})
    assert caught.value.field.split("[")[0] == name
    assert "allowed:" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), BAD_WORKER)
def test_worker_ranges(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        WorkerConfig(**{"worker_id": "w", "role": Role.MIXED, name: value})
    assert caught.value.field.split("[")[0] == name


@pytest.mark.parametrize(("name", "value"), BAD_ROUTER)
def test_router_ranges(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RouterConfig(**{name: value})
    assert caught.value.field.split(".")[0] == name


@pytest.mark.parametrize(("name", "value"), BAD_CLUSTER)
def test_cluster_ranges(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig(**{name: value})
    assert caught.value.field == name


def test_every_field_has_a_bad_value_above() -> None:
    covered = {EngineConfig: BAD_ENGINE, WorkerConfig: BAD_WORKER, RouterConfig: BAD_ROUTER}
    for cls, cases in covered.items():
        assert {field.name for field in dataclasses.fields(cls)} == {name for name, _ in cases}


@pytest.mark.parametrize(
    ("slo", "field"),
    [
        (SLO(ttft_s=0), "slo.ttft_s"),
        (SLO(tpot_s=-1), "slo.tpot_s"),
    ],
)
def test_slo_is_checked_where_it_is_used(slo: SLO, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RouterConfig(slo=slo)
    assert caught.value.field == field


def test_limits_themselves_are_allowed() -> None:
    EngineConfig(block_size=1, kv_cache_bytes=1, max_batched_tokens=1, paced_step_s=0, cpus=(0, 1))
    RouterConfig(http_port=0, grpc_port=0, registry_port=0, slo=SLO(ttft_s=86400))
    ClusterConfig(prefill=0, decode=0, mixed=1, drain_timeout_s=0)


def test_pools_work_together() -> None:
    with pytest.raises(ConfigError, match=r"decode: 0 .* at least 1 where prefill is 2"):
        ClusterConfig(prefill=2, decode=0)
    with pytest.raises(ConfigError, match=r"prefill: 0 .* at least 1 where decode is 1"):
        ClusterConfig(prefill=0, mixed=1)
    with pytest.raises(ConfigError, match="at least one worker"):
        ClusterConfig(prefill=0, decode=0)


def test_one_model_for_router_and_engines() -> None:
    with pytest.raises(ConfigError, match=r"engine\.model: 'a' .* the router's model, smollm2-135m"):
        ClusterConfig(engine=EngineConfig(model="a"))


def test_workers_are_spelled_out() -> None:
    config = build_config(
        None, {"prefill": 2, "mixed": 1, "decode_engine": None, "worker.metrics_port": 9100, "worker.lease_s": 5}
    )
    workers = config.workers("127.0.0.1:8002")
    assert [worker.worker_id for worker in workers] == ["prefill-0", "prefill-1", "decode-0", "mixed-0"]
    assert [worker.metrics_port for worker in workers] == [9100, 9101, 9102, 9103]
    assert {worker.routers for worker in workers} == {("127.0.0.1:8002",)}
    assert {worker.lease_s for worker in workers} == {5}


def test_a_pools_gpus_are_taken_in_turn() -> None:
    config = build_config(None, {"prefill": 3, "decode": 1, "engine.device": "cuda", "engine.gpus": (1, 3)})
    assert [worker.engine.gpus for worker in config.workers()] == [(1,), (3,), (1,), (1,)]
    assert build_config(None, {"engine.device": "cuda"}).workers()[0].engine.gpus == ()
    wide = build_config(None, {"engine.device": "cuda", "engine.gpus": (0, 1, 4, 5), "engine.tensor_parallel": 2})
    assert [worker.engine.gpus for worker in wide.workers()] == [(0, 1), (0, 1)]
    more = build_config(
        None, {"prefill": 3, "engine.device": "cuda", "engine.gpus": (0, 1, 4, 5), "engine.pipeline_stages": 2}
    )
    assert [worker.engine.gpus for worker in more.workers()] == [(0, 1), (4, 5), (0, 1), (0, 1)]


def test_router_processes_are_spelled_out() -> None:
    router = RouterConfig(processes=3, registry_port=9000)
    assert router.registry_ports == (9000, 9001, 9002)
    assert [each.process for each in router.each_process()] == [0, 1, 2]
    assert {each.registry_ports for each in router.each_process()} == {router.registry_ports}
    workers = ClusterConfig(router=router).workers("a:9000", "a:9001", "a:9002")
    assert {worker.routers for worker in workers} == {("a:9000", "a:9001", "a:9002")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"process": 1}, r"process: 1 .* 0 to 0, as processes is 1"),
        ({"processes": 2, "registry_port": 65535}, r"registry_port: 65535 .* at most 65534"),
        ({"processes": 3, "registry_port": 9000, "http_port": 9002}, r"http_port: 9002 .* 9000, 9001, 9002"),
        ({"processes": 2, "registry_port": 9000, "grpc_port": 9001}, r"grpc_port: 9001 .* 9000, 9001"),
    ],
)
def test_ports_of_several_router_processes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**fields)


def test_a_key_is_not_shown() -> None:
    shown = repr(RouterConfig(api_key="hidden", security=SecurityConfig(secret="hidden")))
    assert "hidden" not in shown


def test_plain_values_and_back() -> None:
    config = build_config(None, {"engine.cpus": [0], "router.events_path": "/tmp/e", "router.slo.ttft_s": 2})
    assert from_dict(ClusterConfig, json.loads(json.dumps(to_dict(config)))) == config
    for worker in config.workers("h:1"):
        assert from_dict(WorkerConfig, json.loads(json.dumps(to_dict(worker)))) == worker


def test_required_and_unknown_in_from_dict() -> None:
    with pytest.raises(ConfigError, match=r"role: is missing; .*required"):
        from_dict(WorkerConfig, {"worker_id": "w"})
    with pytest.raises(ConfigError, match=r"role: 'boss' .*prefill, decode, mixed"):
        from_dict(WorkerConfig, {"worker_id": "w", "role": "boss"})


@pytest.mark.parametrize(
    ("word", "found"),
    [("a100", "a100-80g"), ("cpu-zen3", "cpu-zen4"), ("h20", "h200"), ("zebra", ""), ("tpu", ""), ("hardware", "")],
)
def test_only_what_is_near_is_suggested(word: str, found: str) -> None:
    assert nearest(word, ["a100-80g", "cpu-zen4", "h100", "h200", "l4", "address"]) == found


@pytest.mark.parametrize(("wanted", "message"), ON_A_GPU)
def test_what_a_gpu_does_not_have_is_refused(wanted: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(device="cuda", **wanted)  # type: ignore[arg-type]


def test_what_computes_on_a_gpu_is_ones_choice() -> None:
    for kernels in ON_GPU:
        assert EngineConfig(device="cuda", kernels=kernels).kernels == kernels


def test_kv_memory_that_nobody_names_is_the_devices_own_choice() -> None:
    assert EngineConfig().kv_cache_bytes == EngineConfig(device="paced").kv_cache_bytes == 512 * 2**20
    assert EngineConfig(device="cuda").kv_cache_bytes == 0
    assert EngineConfig(device="cuda", kv_cache_bytes=2**30).kv_cache_bytes == 2**30
    EngineConfig(device="cuda", quantization="w4a16")
