"""The arithmetic of a worker's part of a GPU, and what is said where a model does not fit into it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.engine.gpu import memory, sizing
from tandem.cluster.engine.gpu.inputs import Limits
from tandem.cluster.engine.gpu.memory import (
    GRAPH_OVERHEAD_BYTES,
    KV,
    LOADING,
    DeviceShare,
    StepMemory,
    fitting,
    graph_bytes,
    kv_room,
)
from tandem.cluster.engine.parallel.messages import RankLost
from tandem.cluster.latency.memory import DoesNotFit
from tandem.kvtransfer.cuda_ipc.driver import CudaError
from tandem.kvtransfer.layout import KVGroup, KVLayout

GIB = 2**30
BLOCK = 2 * 2**20  # Llama-3.1-8B: 16 tokens of 128 KiB


def share(utilization: float = 0.9, total: int = 80 * GIB, free: int = 80 * GIB) -> DeviceShare:
    return DeviceShare(name="H100", total_bytes=total, free_bytes=free, utilization=utilization)


def taken(weights: int = 15 * GIB, activations: int = 2 * GIB, graphs: int = GIB // 2) -> StepMemory:
    return StepMemory(
        weight_bytes=weights,
        activation_bytes=activations,
        graph_bytes=graphs,
        max_batched_tokens=8192,
        reserved_bytes=GIB,
    )


def test_what_is_left_is_kv() -> None:
    room = kv_room(share(), taken(), model="llama-3.1-8b", block_bytes=BLOCK, block_size=16)
    assert room.blocks == int(53.5 * GIB) // BLOCK
    assert room.kv_bytes == room.blocks * BLOCK
    assert room.arithmetic == (
        "80.00 GiB of H100 x 0.9 - 1.00 GiB reserved - 15.00 GiB weights - 2.00 GiB activations (8192 tokens) - "
        "0.50 GiB graphs = 53.50 GiB for KV, 27392 blocks of 16 tokens"
    )


def test_two_workers_share_one_gpu() -> None:
    """Each counts what it takes itself; together they stay below the whole."""
    halves = [kv_room(share(0.45), taken(), model="m", block_bytes=BLOCK, block_size=16) for _ in range(2)]
    assert sum(half.kv_bytes for half in halves) + 2 * int(18.5 * GIB) <= 0.9 * 80 * GIB
    share(0.45, free=50 * GIB).check_free()
    share(0.5, free=40 * GIB - GIB // 2).check_free()  # beside another half; its own context is there already
    with pytest.raises(DoesNotFit) as caught:
        share(0.9, free=42 * GIB).check_free()
    assert str(caught.value) == (
        "gpu_memory_utilization: 0.9 of 80.00 GiB of H100 is 72.00 GiB, but 42.00 GiB are free: others hold 38.00 GiB; "
        "allowed: at most 0.53, or stop them"
    )


@given(st.integers(1, 80 * GIB), st.floats(0.01, 1.0), st.integers(0, 80 * GIB), st.integers(1, 4 * GIB))
def test_never_more_than_the_part_and_not_a_block_less(
    total: int, utilization: float, weights: int, block: int
) -> None:
    part = int(total * utilization)
    used = GIB + weights + 2 * GIB + GIB // 2
    try:
        room = kv_room(share(utilization, total), taken(weights), model="m", block_bytes=block, block_size=16)
    except DoesNotFit:
        assert used + block > part
    else:
        assert room.blocks >= 1
        assert used + room.kv_bytes <= part < used + room.kv_bytes + block


def test_what_does_not_fit_says_the_sum_and_what_would_help() -> None:
    with pytest.raises(DoesNotFit) as caught:
        kv_room(share(), taken(weights=131 * GIB), model="llama-3.1-70b", block_bytes=BLOCK, block_size=16)
    assert str(caught.value) == (
        "llama-3.1-70b does not fit: 80.00 GiB of H100 x 0.9 - 1.00 GiB reserved - 131.00 GiB weights - 2.00 GiB "
        "activations (8192 tokens) - 0.50 GiB graphs = -62.50 GiB for KV, 0 blocks of 16 tokens; needed: KV of 16 "
        "tokens, 0.00 GiB. More room: a higher gpu_memory_utilization (0.9 now), fewer max_batched_tokens (8192), a "
        "quantization, or more ranks (tensor_parallel, pipeline_stages)"
    )
    with pytest.raises(DoesNotFit, match=r"needed: KV of 1000000 tokens, 122\.07 GiB"):
        kv_room(share(), taken(), model="m", block_bytes=BLOCK, block_size=16, min_tokens=1_000_000)


def test_weights_that_leave_no_block_of_kv_are_refused_before_they_are_read() -> None:
    gpu = torch.device("cuda")
    facts = {"model": "llama-3.1-70b", "blocks": 64, "block_bytes": BLOCK}
    room = int(0.9 * 80 * GIB) - memory.RESERVED_BYTES
    sizing.check_model(gpu, share(), weight_bytes=room - BLOCK, **facts)
    for weights in (room - BLOCK + 1, 131 * GIB):
        with pytest.raises(DoesNotFit) as caught:
            sizing.check_model(gpu, share(), weight_bytes=weights, **facts)
    assert str(caught.value) == (
        "llama-3.1-70b does not fit: 80.00 GiB of H100 x 0.9 - 0.88 GiB reserved - 131.00 GiB weights = -59.88 GiB for "
        "KV and activations. More room: a higher gpu_memory_utilization (0.9 now), a quantization, or more ranks "
        "(tensor_parallel, pipeline_stages)"
    )


def test_kv_that_is_asked_for_is_to_be_free_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "device_share", lambda device, utilization: share(utilization, free=30 * GIB))
    gpu = torch.device("cuda")
    facts = {"model": "llama-3.1-8b", "weight_bytes": 15 * GIB, "block_bytes": BLOCK}
    sizing.check_model(gpu, None, blocks=15 * 512, **facts)
    with pytest.raises(DoesNotFit) as caught:
        sizing.check_model(gpu, None, blocks=20 * 512, **facts)
    assert str(caught.value) == (
        "llama-3.1-8b does not fit: 30.00 GiB free of 80.00 GiB of H100 - 15.00 GiB weights - 20.00 GiB KV "
        "(kv_cache_bytes) = -5.00 GiB for activations. More room: fewer kv_cache_bytes (0: what fits), a quantization, "
        "or more ranks (tensor_parallel, pipeline_stages)"
    )
    sizing.check_model(torch.device("cpu"), None, blocks=20 * 512, **facts)


@pytest.mark.parametrize(
    ("phase", "error", "told"),
    [
        (
            LOADING,
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 "
                "GiB is free. Of the allocated memory 77.00 GiB is allocated by PyTorch.\nSee documentation"
            ),
            "ran out loading weights: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
            "capacity of 79.10 GiB of which 1.00 GiB is free. More room: a quantization, or more ranks (",
        ),
        (
            KV,
            CudaError("cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2)"),
            "taking KV memory: cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2). More room: fewer kv_cache_bytes or a lower "
            "gpu_memory_utilization, ",
        ),
    ],
)
def test_memory_that_runs_out_says_what_would_help(phase: memory.Phase, error: RuntimeError, told: str) -> None:
    with pytest.raises(DoesNotFit) as caught, fitting("m", phase):
        raise error
    assert str(caught.value).startswith("m does not fit: the GPU's memory ran out ")
    assert told in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("illegal memory access"), RankLost("rank 1: CUDA out of memory")])
def test_what_is_no_want_of_memory_here_is_told_as_it_is(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as caught, fitting("m", LOADING):
        raise error
    assert caught.value is error


def test_graphs_share_one_pool() -> None:
    assert graph_bytes(GIB, 0) == 0
    assert graph_bytes(GIB, 35) == GIB + 35 * GRAPH_OVERHEAD_BYTES


def test_steps_that_sample_more_rows_than_are_captured_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    taken_bytes = {64: 8, 4: 4, 32: 2}  # by rows that sample, or of a prompt by its tokens

    def peak(device: torch.device, run: Callable[[], int]) -> int:
        return taken_bytes[run()] * GIB

    monkeypatch.setattr(sizing, "held_bytes", lambda device: 10 * GIB)
    monkeypatch.setattr(sizing, "step_peak_bytes", peak)
    group = KVGroup(name="layers", num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32")
    room = sizing.measure_room(
        torch.device("cpu"),
        share(1.0),
        KVLayout(block_size=16, groups=(group,)),
        Limits(rows=4, tokens=32, table_width=8),
        model="m",
        most_sampled=64,
        temporary_bytes=GIB,
        graphs=1,
        run=lambda plan: sum(len(row.token_ids) for row in plan.rows),
    )
    assert "9.00 GiB weights - 8.00 GiB activations (32 tokens) - 4.00 GiB graphs" in room.arithmetic
