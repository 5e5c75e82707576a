"""What one rank answers, that workers of several are held against."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.plan import SampleSpec, StepPlan, StepRow
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import SamplingParams

_BLOCK_SIZE = 16


def greedy_of_one_rank(model: str, prompt: Sequence[int], output: int) -> list[int]:
    """The first `output` tokens, computed by torch in float32, without a scheduler or a worker."""
    files = resolve_model(model)
    device = CpuDevice(files, dtype="float32", kernels="torch", block_size=_BLOCK_SIZE, kv_cache_bytes=4 * 2**20)
    blocks = list(range(-(-(len(prompt) + output) // _BLOCK_SIZE)))
    tokens, start = list(prompt), 0
    for step in range(output):
        sample = SampleSpec(SamplingParams(temperature=0.0), step, prompt, tokens[len(prompt) :])
        device.launch(StepPlan(step, (StepRow("s", start, tokens[start:], blocks, sample),)))
        (row,) = device.collect().rows
        start = len(tokens)
        tokens.append(row.tokens[0].token_id)
    device.close()
    return tokens[len(prompt) :]
