"""The engine's benchmark, dry: its tables are made without a GPU, its whole runs draw what the CPU's engine does."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[4] / "gpu"))

import bench_engine
import engine_rig
from measure import Bounds
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS

pytestmark = pytest.mark.usefixtures("few_multiprocessors")


def test_a_dry_run_fills_every_table(where: str) -> None:
    if where != "cpu":
        pytest.skip("a GPU measures: make bench-gpu")
    made = list(bench_engine.lines(torch.device(where), Bounds(copy_bytes_per_s=1e9, products_per_s=1e9)))
    assert [line.title for line in made] == [
        bench_engine.DECODE,
        bench_engine.PREFILL,
        bench_engine.DECODE,
        bench_engine.WHOLE,
        bench_engine.WHOLE,
    ]
    assert all(len(line.heads) == len(line.cells) for line in made)
    assert (made[0].cells[-1], made[2].cells[-1]) == ("", "KV in float8_e4m3")
    assert made[3].cells[:4] == ("tandem", "2", "5", "2")


def test_the_scheduler_with_two_plans_under_way_draws_the_cpus_tokens(where: str) -> None:
    """Chunked prompts beside rows that look ahead, to the last token."""
    config = dataclasses.replace(CONFIGS["tiny-llama"], num_layers=1, vocab_size=300, max_model_len=64)
    files = ModelFiles(name="tiny", kind="dummy", path=None, config=config)
    common = {"dtype": "float32", "block_size": 4, "kv_cache_bytes": 2**17}
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]
    limits = {"budget": 4, "running": 4, "longest": 32}
    theirs = engine_rig.serve_all(CpuDevice(files, kernels="torch", **common), prompts, 4, **limits)
    device = CudaDevice(files, max_batched_tokens=4, max_running=4, max_model_len=32, device=where, **common)
    assert engine_rig.serve_all(device, prompts, 4, **limits).tokens == theirs.tokens
    device.close()


def test_bounds_count_what_a_step_must_read_and_compute() -> None:
    llama = CONFIGS["llama-3.1-8b"]
    assert engine_rig.kv_token_bytes(llama) == 128 * 2**10
    embedded = 2 * llama.vocab_size * llama.hidden_size
    assert engine_rig.products(llama) + embedded == pytest.approx(8.03e9, rel=0.001)  # its published parameters
    attention = 4 * 2048 * 2049 // 2 * 4096 * 32
    expected = 2 * engine_rig.products(llama) * 2048 + attention + 2 * llama.vocab_size * 4096
    assert engine_rig.prefill_operations(llama, 2048) == expected
