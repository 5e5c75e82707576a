"""What a worker holds, and what it says when the model does not fit."""

from __future__ import annotations

import pytest
from tandem.cluster.latency.hardware import load_hardware
from tandem.cluster.latency.memory import DoesNotFit, activation_bytes, worker_memory
from tandem.cluster.latency.model_facts import model_facts

A100 = load_hardware("a100-80g")
OPT_13B = model_facts("opt-13b")


def test_kv_is_what_the_rest_leaves() -> None:
    memory = worker_memory(OPT_13B, A100, utilization=0.9, block_size=16)
    assert memory.usable_bytes == int(80 * 2**30 * 0.9) - 900 * 2**20
    assert memory.weight_bytes == OPT_13B.parameters * 2
    assert memory.kv_bytes == memory.usable_bytes - memory.weight_bytes - memory.activation_bytes
    assert memory.block_bytes == 16 * OPT_13B.kv_bytes_per_token()
    assert memory.blocks == memory.kv_bytes // memory.block_bytes
    assert memory.tokens == 16 * memory.blocks


def test_a_step_needs_its_widest_intermediate_and_its_logits() -> None:
    feed_forward = 1000 * (2 * 5120 + 2 * 4 * 5120) * 2
    assert activation_bytes(OPT_13B, 1, 1000, 10) == feed_forward + 2 * 10 * 50272 * 4
    assert activation_bytes(OPT_13B, 4, 1000, 10) < activation_bytes(OPT_13B, 1, 1000, 10)
    assert activation_bytes(OPT_13B, 1, 5, 10) < activation_bytes(OPT_13B, 1, 10, 10)


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        DoesNotFit,
        match=r"opt-66b in bfloat16 with tensor_parallel 1, pipeline_stages 1 does not fit: 80.00 GiB of a100-80g "
        r"x 0.9 - 0.88 GiB reserved - 122\.\d+ GiB weights - .* activations .* = -\d+\.\d+ GiB for KV, 0 blocks",
    ):
        worker_memory(model_facts("opt-66b"), A100)
    assert worker_memory(model_facts("opt-66b"), A100, 4).blocks > 0
    assert worker_memory(model_facts("opt-66b"), A100, 2, 2).blocks > 0


def test_a_context_that_must_fit_is_asked_for() -> None:
    held = worker_memory(OPT_13B, A100).tokens
    assert worker_memory(OPT_13B, A100, min_tokens=held).tokens == held
    with pytest.raises(DoesNotFit, match=rf"needed: KV of {held + 1} tokens"):
        worker_memory(OPT_13B, A100, min_tokens=held + 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"utilization": 0.0}, "utilization: 0.0 is not allowed; allowed: above 0, at most 1"),
        ({"utilization": 1.5}, "utilization: 1.5"),
        ({"block_size": 0}, "block_size: 0 is not allowed; allowed: at least 1"),
        ({"max_batched_tokens": 0}, "max_batched_tokens: 0"),
        ({"max_rows": -1}, "max_rows: -1"),
        ({"tensor_parallel": 7}, "tensor_parallel: 7"),
    ],
)
def test_numbers_out_of_range_are_named(options: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        worker_memory(OPT_13B, A100, **options)
