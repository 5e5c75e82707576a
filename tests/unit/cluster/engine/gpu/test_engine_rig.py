"""The engine's benchmark, dry: its tables are made without a GPU, its whole runs draw what the CPU's engine does."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[4] / "gpu"))

import bench_engine
import engine_rig
import transformers_rival
from measure import Bounds, Line
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS

pytestmark = pytest.mark.usefixtures("few_multiprocessors")


BOUNDS = Bounds(copy_bytes_per_s=1e9, products_per_s=1e9)


def told(where: str) -> list[Line]:
    """All lines of the benchmark; a step that fails tells none."""
    made: list[Line] = []
    for step in bench_engine.lines(torch.device(where), BOUNDS):
        with contextlib.suppress(torch.OutOfMemoryError):
            step(made.append)
    return made


def test_a_dry_run_fills_every_table(where: str) -> None:
    if where != "cpu":
        pytest.skip("a GPU measures: make bench-gpu")
    made = told(where)
    assert [line.title for line in made] == [
        bench_engine.DECODE,
        bench_engine.PREFILL,
        bench_engine.DECODE,
        bench_engine.WHOLE,
        bench_engine.WHOLE,
        bench_engine.WHOLE,
    ]
    assert all(len(line.heads) == len(line.cells) for line in made)
    assert (made[0].cells[-1], made[2].cells[-1]) == ("", "KV in float8_e4m3")
    assert made[3].cells[:4] == ("tandem", "2", "5", "2")


def test_what_does_not_fit_costs_its_own_lines(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where != "cpu":
        pytest.skip("a GPU measures: make bench-gpu")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("not now")

    monkeypatch.setattr(bench_engine, "_rig", full)
    monkeypatch.setattr(transformers_rival, "is_here", lambda: False)
    made = told(where)
    assert [line.cells[0] for line in made] == ["tandem", *(f"transformers, {way}" for way in WAYS)]
    assert [line.cells[-1] for line in made] == ["", "not installed here", "not installed here"]


WAYS = {"continuous batching": transformers_rival.continuous, "generate": transformers_rival.static}


@pytest.mark.skipif(not transformers_rival.is_here(), reason="transformers is not here")
def test_transformers_computes_our_model_and_leaves_none_of_it_behind() -> None:
    sizes = bench_engine.TINY
    rig = engine_rig.Rig(sizes.config, torch.device("cpu"), kv_tokens=64, limits=sizes.limits)
    prompts = [[1, 2, 3, 4, 5]] * 2
    first = int(rig.prefill(5)().argmax())
    model = transformers_rival.model_of(rig)
    for run in WAYS.values():
        ran, attention = run(model, prompts, 3)
        assert [ids[0] for ids in ran.tokens.values()] == [first, first]
        assert {len(ids) for ids in ran.tokens.values()} == {3}
        assert "sdpa" in attention or "flash" in attention
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_run_that_lost_tokens_is_none() -> None:
    ran = engine_rig.Ran({"0": [1, 2], "1": [1]}, 1.0)
    with pytest.raises(RuntimeError, match="1 of 2 sequences do not have 2 tokens"):
        ran.of_length(2)

    class Ended:
        """A manager whose thread died of the second request."""

        def __init__(self, error: str | None) -> None:
            self.results = [
                SimpleNamespace(request_id="a", error=error, generated_tokens=[1], is_finished=lambda: True)
            ]

        def add_requests(self, **_: object) -> list[str]:
            return ["a", "b"]

        def get_result(self, timeout: float) -> object:
            return self.results.pop() if self.results else None

        def is_running(self) -> bool:
            return False

    with pytest.raises(RuntimeError, match="its thread has ended: 1 of 2 requests are done"):
        transformers_rival._served(Ended(None), [[1], [2]], 1)
    with pytest.raises(RuntimeError, match="a request failed: no memory"):
        transformers_rival._served(Ended("no memory"), [[1], [2]], 1)


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
