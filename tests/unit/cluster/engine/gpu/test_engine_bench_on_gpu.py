"""`bench engine` measures the GPU's device as it measures any other."""

from __future__ import annotations

import dataclasses

import pytest
from tandem.cluster.bench.engine import EngineBenchOptions, cells, run_engine_bench, with_room
from tandem.cluster.bench.engine_bounds_gpu import measure_gpu_bounds
from tandem.cluster.bench.engine_cost import step_weight_bytes
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.devices.kv_memory import kv_layout
from tandem.cluster.engine.gpu.narrow import narrow_kv
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS

MODEL = dataclasses.replace(CONFIGS["tiny-llama"], num_layers=1, vocab_size=300, max_model_len=64)
OPTIONS = EngineBenchOptions(
    batch_sizes=(2,), contexts=(5,), prompt_lens=(6,), chunk_sizes=(4,), mixed=True, warmups=0, repeats=1
)


@pytest.mark.parametrize("option", ["auto", "fp8"])
@pytest.mark.usefixtures("few_multiprocessors")
def test_all_kinds_of_rows(where: str, option: str) -> None:
    config = EngineConfig(device="cuda", dtype="float32", block_size=4, kv_cache_dtype=option)
    files = ModelFiles(name="tiny", kind="dummy", path=None, config=MODEL)
    block_bytes = kv_layout(MODEL, config.kv_dtype, 4).block_bytes
    config = with_room(config, cells(OPTIONS), block_bytes)
    assert (config.max_running, config.max_batched_tokens) == (3, 6)
    device = CudaDevice(
        files,
        dtype=config.dtype,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_bytes,
        max_batched_tokens=config.max_batched_tokens,
        max_running=config.max_running,
        device=where,
        narrow_kv=narrow_kv(config, files),
    )
    try:
        found = run_engine_bench(
            config, MODEL, OPTIONS, device, bounds_of=lambda: measure_gpu_bounds(where, read_bytes=2**20, matrix=64)
        )
    finally:
        device.close()
    assert [(row.cell.kind, row.steps) for row in found.rows] == [("decode", 1), ("prefill", 2), ("mixed", 1)]
    assert all(row.memory_share > 0 and row.arithmetic_share > 0 for row in found.rows)
    kv_bytes = 12 * block_bytes // config.block_size  # of two contexts of six tokens
    assert found.rows[0].cost.read_bytes == step_weight_bytes(MODEL, "float32") + kv_bytes
    assert min(found.bounds.read_bytes, found.bounds.float32_flops, found.bounds.bfloat16_flops) > 0
