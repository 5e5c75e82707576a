"""An engine of random weights, and steps of one's choice: what the engine's tests on a GPU share. Widths are those of
real models, layers are few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.gpu.weights import DeviceDummyWeights
from tandem.cluster.engine.plan import SampleSpec, StepOutput, StepPlan, StepRow
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.types import SamplingParams

CONFIG = dataclasses.replace(CONFIGS["llama-3.1-8b"], num_layers=2, vocab_size=32_000, max_model_len=4096)
LIKELY = SamplingParams(temperature=0.0, top_logprobs=20)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=7)


def files() -> ModelFiles:
    return ModelFiles(name="random", kind="dummy", path=None, config=CONFIG)


def make(**changes: object) -> CudaDevice:
    """With weights drawn on the GPU, the same each time."""
    options = {
        "dtype": "bfloat16",
        "block_size": 16,
        "kv_cache_bytes": 2**29,
        "max_batched_tokens": 2048,
        "max_running": 32,
        "source": DeviceDummyWeights(CONFIG, torch.device("cuda"), torch.bfloat16),
        **changes,
    }
    return CudaDevice(files(), **options)


def row(
    name: str, start: int, tokens: Sequence[int], blocks: Sequence[int], sample: SamplingParams | None = LIKELY
) -> StepRow:
    return StepRow(name, start, tokens, blocks, None if sample is None else SampleSpec(sample, 0, tokens, []))


def step(device: CudaDevice | CpuDevice, *rows: StepRow) -> StepOutput:
    plan = StepPlan(0, rows)
    device.launch(plan)
    output = device.collect()
    output.check_answers(plan)
    return output


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    ids: list[list[int]] = torch.randint(1, CONFIG.vocab_size, (count, length), generator=generator).tolist()
    return ids
