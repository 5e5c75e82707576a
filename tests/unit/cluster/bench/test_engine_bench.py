from dataclasses import replace

import pytest
from tandem.cluster.bench.engine import (
    Cell,
    EngineBenchOptions,
    blocks_needed,
    cell_cost,
    cells,
    check_device,
    run_engine_bench,
    shares,
)
from tandem.cluster.bench.engine_bounds import Bounds
from tandem.cluster.bench.engine_cost import StepCost
from tandem.cluster.bench.engine_show import HEAD, header, row_line
from tandem.cluster.config import ConfigError, EngineConfig
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.models.reference import resolve_model

BOUNDS = Bounds(read_bytes=100.0, float32_flops=50.0, bfloat16_flops=1.0, int8_ops=200.0)
OPTIONS = EngineBenchOptions(
    batch_sizes=(1, 3), contexts=(20,), prompt_lens=(8, 24), chunk_sizes=(8, 16), mixed=True, warmups=1, repeats=3
)


def test_prompts_that_one_chunk_holds_come_once():
    assert cells(OPTIONS) == (
        Cell(1, 20),
        Cell(3, 20),
        Cell(prompt=8, chunk=8),
        Cell(prompt=24, chunk=8),
        Cell(prompt=24, chunk=16),
        Cell(1, 20, 8, 8),
        Cell(1, 20, 16, 16),
        Cell(3, 20, 8, 8),
        Cell(3, 20, 16, 16),
    )
    assert blocks_needed(cells(OPTIONS), 4) == 3 * 6 + 4


def test_shares_take_int8_linears_at_the_int8_rate_but_those_of_queries_keys_and_values():
    cost = StepCost(read_bytes=50, linear_flops=100, qkv_flops=50, attention_flops=25)
    assert shares(cost, 5.0, BOUNDS, int8=False) == (0.1, 0.7)
    assert shares(cost, 5.0, BOUNDS, int8=True) == (0.1, 0.4)


def test_a_chunked_prompt_reads_the_weights_once_per_chunk():
    model = resolve_model("dummy:tiny-llama").config
    one = cell_cost(Cell(prompt=24, chunk=24), model, weight_bytes=1000, kv_token_bytes=1)
    three = cell_cost(Cell(prompt=24, chunk=8), model, weight_bytes=1000, kv_token_bytes=1)
    assert one.read_bytes == 1000 + 24
    assert three.read_bytes == 3000 + 8 + 16 + 24
    assert (one.linear_flops, one.qkv_flops) == (three.linear_flops, three.qkv_flops)
    assert one.attention_flops == three.attention_flops


def test_what_computes_nothing_or_does_not_fit_is_refused():
    model = resolve_model("dummy:tiny-llama").config
    with pytest.raises(ConfigError, match="device: 'paced' is not allowed; allowed: cpu or cuda: the paced device"):
        check_device(EngineConfig(device="paced"), model, [Cell(1, 1)])
    with pytest.raises(ConfigError, match="quantization: 'w4a16' is not allowed; allowed: w8a8 or none"):
        check_device(EngineConfig(device="cuda", quantization="w4a16"), model, [Cell(1, 1)])
    with pytest.raises(ConfigError, match=f"context: {model.max_model_len + 1} is not allowed"):
        check_device(EngineConfig(), model, [Cell(1, model.max_model_len)])
    with pytest.raises(ValueError, match="batch_sizes: no row is left"):
        cells(EngineBenchOptions(batch_sizes=(), prompt_lens=()))
    with pytest.raises(ValueError, match=r"chunk_sizes: \[0\] is not allowed"):
        EngineBenchOptions(chunk_sizes=(0,))


def test_all_rows_of_a_small_model():
    files = resolve_model("dummy:tiny-llama")
    config = EngineConfig(model="dummy:tiny-llama", block_size=4, kernels="torch", kv_cache_bytes=2**20)
    device = CpuDevice(files, dtype=config.dtype, block_size=4, kv_cache_bytes=2**20, kernels="torch")
    fast = Bounds(1e12, 1e12, 1e12, 0.0)
    bounds = iter([replace(fast, read_bytes=2e12), fast])

    seen = []
    try:
        result = run_engine_bench(config, files.config, OPTIONS, device, seen.append, bounds_of=lambda: next(bounds))
    finally:
        device.close()
    assert [row.cell for row in result.rows] == [row.cell for row in seen] == list(cells(OPTIONS))
    assert list(bounds) == [], "before and after"
    assert result.bounds == replace(fast, read_bytes=2e12)  # the higher of before and after
    assert [row.steps for row in result.rows] == [1, 1, 1, 3, 2, 1, 1, 1, 1]
    assert all(len(row.times_s) == 3 and min(row.times_s) > 0 for row in result.rows)
    assert len(result.events) == 4 * sum(row.steps for row in result.rows)  # one warmup, three that count
    shown = result.as_json()["rows"][4]
    assert (shown["kind"], shown["prompt"], shown["chunk"], shown["steps"]) == ("prefill", 24, 16, 2)
    assert shown["tokens_per_s"] == pytest.approx(24e3 / shown["median_ms"])
    assert all(len(row_line(row)) == len(HEAD) for row in result.rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "bfloat16"),
        ({"quantization": "w8a8"}, "w8a8 (bfloat16 KV)"),
        ({"kv_cache_dtype": "fp8"}, "bfloat16 (fp8 KV)"),
        ({"quantization": "w8a8", "kv_cache_dtype": "fp8"}, "w8a8 (fp8 KV)"),
    ],
)
def test_the_header_says_in_what_precision(changes, said):
    machine = {"machine": "m", "cores": 1, "instructions": "i"}
    line = header(EngineConfig(device="cuda", **changes), ("triton", "why"), machine)
    assert line == f"smollm2-135m, {said}, one GPU, triton kernels (why); m, 1 cores, i"
