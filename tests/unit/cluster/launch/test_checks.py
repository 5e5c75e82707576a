"""What the driver settles before Ray starts: settings that the model or this machine cannot fulfill."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tandem.cluster.bench.validate_subjects import config_subject
from tandem.cluster.config import ClusterConfig, ConfigError, EngineConfig, RouterConfig, WorkerConfig
from tandem.cluster.config_file import build_config
from tandem.cluster.engine.kv_scales import KVScales
from tandem.cluster.latency.profile import StepProfile
from tandem.cluster.launch import runtime_file
from tandem.cluster.launch.checks import check_engines, check_memory, check_ports, pin_config
from tandem.cluster.launch.members import WorkerMember
from tandem.cluster.launch.state import LaunchError
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role, StepTimeCoefficients

MODEL = resolve_model("dummy:tiny-llama").config
BLOCK_BYTES = MODEL.num_layers * 2 * MODEL.num_kv_heads * MODEL.head_dim * 2 * 16


def config(**engine: Any) -> ClusterConfig:
    return build_config(None, {"model": "dummy:tiny-llama", **{f"engine.{name}": engine[name] for name in engine}})


def test_a_context_that_the_model_does_not_have_is_refused() -> None:
    own = MODEL.max_model_len
    check_engines(config(max_model_len=own), MODEL)
    with pytest.raises(ConfigError, match=rf"^engine\.max_model_len: {own + 1} .*; allowed: at most .* {own}$"):
        check_engines(config(max_model_len=own + 1), MODEL)


def test_kv_memory_holds_at_least_one_block() -> None:
    check_engines(config(kv_cache_bytes=BLOCK_BYTES), MODEL)
    with pytest.raises(ConfigError, match=rf"^engine\.kv_cache_bytes: 5 .*; allowed: at least .* {BLOCK_BYTES} bytes$"):
        check_engines(config(kv_cache_bytes=5), MODEL)


def test_a_gpu_that_is_not_there_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cluster.launch.checks.has_gpu_driver", lambda: False)
    with pytest.raises(ConfigError, match=r"^engine\.device: 'cuda' .*; allowed: cpu, paced: .* NVIDIA's driver$"):
        check_engines(config(device="cuda"), MODEL)
    monkeypatch.setattr("tandem.cluster.launch.checks.has_gpu_driver", lambda: True)
    check_engines(config(device="cuda"), MODEL)


def test_a_pool_with_its_own_engine_is_named() -> None:
    shared = config()
    small = replace(shared, decode_engine=replace(shared.engine, kv_cache_bytes=5))
    with pytest.raises(ConfigError, match=r"^decode\.engine\.kv_cache_bytes: 5 "):
        check_engines(small, MODEL)
    check_engines(replace(small, prefill=0, decode=0, mixed=1), MODEL)


def test_a_transport_that_the_memory_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cluster.launch.checks.has_gpu_driver", lambda: True)
    shared = config()
    for transport in ("auto", "grpc", "mapped", "gloo"):
        check_engines(replace(shared, worker=replace(shared.worker, transport=transport)), MODEL)
    with pytest.raises(
        ConfigError, match=r"^worker\.transport: 'cuda_ipc' .*auto, grpc, mapped or gloo: .*in host memory"
    ):
        check_engines(replace(shared, worker=replace(shared.worker, transport="cuda_ipc")), MODEL)
    on_gpu = config(device="cuda")
    for transport in ("cuda_ipc", "nccl"):
        check_engines(replace(on_gpu, worker=replace(on_gpu.worker, transport=transport)), MODEL)
    with pytest.raises(
        ConfigError, match=r"^worker\.transport: 'mapped' .*auto, grpc, cuda_ipc or nccl: .*in GPU memory"
    ):
        check_engines(replace(on_gpu, worker=replace(on_gpu.worker, transport="mapped")), MODEL)
    on_two = config(device="cuda", tensor_parallel=MODEL.num_kv_heads)
    check_engines(replace(on_two, worker=replace(on_two.worker, transport="nccl")), MODEL)
    with pytest.raises(ConfigError, match=r"^worker\.transport: 'cuda_ipc' .*auto, grpc or nccl for a worker of"):
        check_engines(replace(on_two, worker=replace(on_two.worker, transport="cuda_ipc")), MODEL)
    with pytest.raises(ConfigError, match=r"^engine\.tensor_parallel: 7 "):
        check_engines(config(device="cuda", tensor_parallel=7), MODEL)
    ranks = replace(shared, engine=replace(shared.engine, pipeline_stages=2))
    check_engines(replace(ranks, worker=replace(ranks.worker, transport="gloo")), MODEL)
    with pytest.raises(ConfigError, match=r"^worker\.transport: 'mapped' .*auto, grpc or gloo for a worker of 2 ranks"):
        check_engines(replace(ranks, worker=replace(ranks.worker, transport="mapped")), MODEL)


def test_kv_that_the_machine_has_no_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cluster.launch.checks.total_bytes", lambda: 8 * 2**30)
    fits = replace(config(kv_cache_bytes=2**31), prefill=1, decode=3)
    check_memory(fits)
    with pytest.raises(
        ConfigError, match=r"^engine\.kv_cache_bytes: 2147483648 .*5 workers would be 10\.0 GiB.* 8\.0 GiB"
    ):
        check_memory(replace(fits, decode=4))
    own = replace(fits, decode=1, decode_engine=replace(fits.engine, kv_cache_bytes=2**33))
    with pytest.raises(
        ConfigError, match=r"^decode\.engine\.kv_cache_bytes: 8589934592 .*2 workers would be 10\.0 GiB"
    ):
        check_memory(own)
    check_memory(replace(own, decode_engine=replace(own.engine, device="paced", kv_cache_bytes=2**40)))
    monkeypatch.setattr("tandem.cluster.launch.checks.total_bytes", lambda: 0)
    check_memory(own)


def test_pools_that_could_not_hand_kv_to_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.cluster.launch.checks.has_gpu_driver", lambda: True)
    files = [tmp_path / name for name in ("a.json", "same.json", "other.json")]
    for path, largest in zip(files, (1.0, 1.0, 2.0), strict=True):
        shape = (MODEL.num_layers, 2, MODEL.num_kv_heads)
        KVScales(largest=np.full(shape, largest, np.float32), model=path.name).save(path)
    one, same, other = map(str, files)
    shared = config(device="cuda", kv_cache_dtype="fp8", kv_scales=one)
    for change in ({}, {"kv_scales": same}, {"max_batched_tokens": 64}):
        check_engines(replace(shared, decode_engine=replace(shared.engine, **change)), MODEL)
    for change in (
        {"kv_scales": other},
        {"kv_scales": None},
        {"kv_cache_dtype": "int8"},
        {"dtype": "float32"},
        {"quantization": "w8a8"},
    ):
        unlike = replace(shared, decode_engine=replace(shared.engine, **change))
        with pytest.raises(ConfigError, match=rf"^decode\.engine\.{next(iter(change))}: .*of prefill workers"):
            check_engines(unlike, MODEL)
        check_engines(replace(unlike, prefill=0, decode=0, mixed=1), MODEL)


def test_a_paced_pipeline_is_read_and_not_served(tmp_path: Path) -> None:
    """Its file can be simulated; who would start it is told what to do."""
    shared = config(device="paced")
    deep = replace(shared, mixed=1, mixed_engine=replace(shared.engine, pipeline_stages=2))
    with pytest.raises(ConfigError, match=r"^mixed\.engine\.pipeline_stages: 2 .*--max-pp 1.*simulate --cluster"):
        check_engines(deep, MODEL)
    check_engines(replace(deep, mixed=0), MODEL)
    with pytest.raises(ConfigError, match=r"^mixed\.engine\.pipeline_stages: 2 "):
        config_subject(replace(deep, prefill=0, decode=0), "deep", time_scale=1.0, folder=tmp_path)


def test_ranks_that_the_model_cannot_be_split_over_are_refused() -> None:
    shared = config()
    check_engines(replace(shared, prefill_engine=replace(shared.engine, tensor_parallel=2, pipeline_stages=2)), MODEL)
    for field, wrong, allowed in (
        ("tensor_parallel", 3, "one of 1, 2, 4 for"),
        ("pipeline_stages", 3, "1 to .* 2 layers"),
    ):
        split = replace(shared, prefill_engine=replace(shared.engine, **{field: wrong}))
        with pytest.raises(ConfigError, match=rf"^prefill\.engine\.{field}: 3 .*; allowed: {allowed}"):
            check_engines(split, MODEL)


def test_kv_memory_for_less_than_the_asked_context_is_said() -> None:
    engine = EngineConfig(model="dummy:tiny-llama", device="paced", kv_cache_bytes=2 * BLOCK_BYTES, max_model_len=40)
    said = {}
    for longest in (40, 32):
        own = replace(engine, max_model_len=longest)
        worker = WorkerMember(WorkerConfig(worker_id="decode-0", role=Role.DECODE, engine=own))
        worker.start(30.0)
        said[longest] = worker.warning()
        worker.stop()
    assert said == {40: "its KV memory holds 32 tokens, so that contexts end there, not at 40", 32: ""}


def test_a_step_profile_is_read_before_ray_starts_and_its_path_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers run in other folders, and a file that cannot be read would show as workers that die."""
    monkeypatch.chdir(tmp_path)
    own = config(device="paced", paced_profile="steps.json")
    for text in (None, "{}", "not JSON"):
        if text is not None:
            Path("steps.json").write_text(text)
        with pytest.raises(ConfigError, match=r"^engine\.paced_profile: 'steps.json' is not allowed; allowed: the"):
            check_engines(own, MODEL)
    StepProfile.linear(StepTimeCoefficients(step_s=0.01)).save("steps.json")
    check_engines(own, MODEL)
    pinned = pin_config(replace(own, decode_engine=own.engine))
    assert pinned.decode_engine is not None
    assert pinned.engine.paced_profile == pinned.decode_engine.paced_profile == str(tmp_path / "steps.json")
    assert pin_config(config()).engine.paced_profile is None


def test_kv_scales_are_read_before_ray_starts_and_their_path_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tandem.cluster.launch.checks.has_gpu_driver", lambda: True)
    own = config(device="cuda", kv_cache_dtype="int8", kv_scales="scales.json", kv_cache_bytes=BLOCK_BYTES // 2)
    with pytest.raises(ConfigError, match=r"^engine\.kv_scales: 'scales.json' is not allowed; allowed: a file of `tan"):
        check_engines(own, MODEL)
    largest = np.ones((MODEL.num_layers, 2, MODEL.num_kv_heads), np.float32)
    KVScales(largest=largest[:1]).save(Path("scales.json"))
    with pytest.raises(ConfigError, match=rf"layers: 1 of them, allowed: a list of {MODEL.num_layers}"):
        check_engines(own, MODEL)
    KVScales(largest=largest).save(Path("scales.json"))
    check_engines(own, MODEL)  # a block, too, is half as large
    assert pin_config(own).engine.kv_scales == str(tmp_path / "scales.json")


def test_pools_that_hold_kv_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.cluster.launch.checks.has_gpu_driver", lambda: True)
    shared = config(device="cuda")
    other = replace(shared, decode_engine=replace(shared.engine, kv_cache_dtype="fp8"))
    with pytest.raises(ConfigError, match=r"^decode\.engine\.kv_cache_dtype: 'fp8' .*; allowed: auto, as of prefill"):
        check_engines(other, MODEL)
    check_engines(replace(other, prefill_engine=other.decode_engine), MODEL)


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def test_every_port_that_is_taken_is_named_with_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_file, "running", tuple)
    with listening() as http, listening() as grpc:
        ports = {"http_port": http.getsockname()[1], "grpc_port": grpc.getsockname()[1], "registry_port": 0}
        with pytest.raises(LaunchError) as refused:
            check_ports(RouterConfig(**ports))
    assert str(refused.value) == (
        f"router.http_port: 127.0.0.1:{ports['http_port']}, router.grpc_port: 127.0.0.1:{ports['grpc_port']} cannot be "
        "used (Address already in use); any free one: --http-port 0 --grpc-port 0"
    )


def test_who_has_the_ports_is_said_where_it_is_this_users_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as http:
        port = http.getsockname()[1]
        own = runtime_file.RunningCluster(http=f"127.0.0.1:{port}", grpc="h:1", registry="h:2", pid=77)
        monkeypatch.setattr(runtime_file, "running", lambda: (own,))
        with pytest.raises(LaunchError, match=r"in use\); this user's running cluster has them \(pid 77\); any free"):
            check_ports(RouterConfig(http_port=port, grpc_port=0, registry_port=0))
