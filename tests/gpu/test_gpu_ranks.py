"""Workers of several GPUs: ranks in processes of their own, NCCL between them, decode steps captured with it. Skipped
where there are fewer than two GPUs.

Run by `make test-gpu`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip(f"{torch.cuda.device_count()} GPUs here, ranks want two", allow_module_level=True)

from tandem.cluster.engine.devices.base import Device
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.devices.cuda_ranks import RankedCudaDevice
from tandem.cluster.engine.parallel.messages import GpuSetup
from tandem.cluster.engine.plan import DRAWN, SampleSpec, StepOutput, StepPlan, StepRow
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.types import SamplingParams

CONFIG = dataclasses.replace(
    CONFIGS["llama-3.1-8b"],
    num_layers=4,
    hidden_size=1024,
    num_heads=8,
    num_kv_heads=4,
    intermediate_size=2816,
    vocab_size=8191,
    max_model_len=2048,
)
"""Widths of real models, drawn in seconds; a vocabulary that ranks cannot halve."""
LIKELY = SamplingParams(temperature=0.0, top_logprobs=20)
GREEDY = SamplingParams(temperature=0.0)
SPLITS = [(2, 1), (1, 2)] + [(2, 2)] * (torch.cuda.device_count() >= 4)
GPU = GpuSetup(device="cuda", kv_cache_bytes=2**28, max_batched_tokens=512, max_running=8)
FILES = ModelFiles(name="random", kind="dummy", path=None, config=CONFIG)
BLOCK_SIZE = 16
BLOCKS = 40
"""Of a sequence."""


@pytest.fixture(scope="module", params=SPLITS, ids=[f"TP {tensor} PP {stages}" for tensor, stages in SPLITS])
def ranked(request: pytest.FixtureRequest) -> Iterator[RankedCudaDevice]:
    tensor, stages = request.param
    device = RankedCudaDevice(
        FILES, GPU, dtype="float32", block_size=BLOCK_SIZE, tensor_parallel=tensor, pipeline_stages=stages
    )
    yield device
    device.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[CudaDevice]:
    device = CudaDevice(FILES, dtype="float32", block_size=BLOCK_SIZE, **dataclasses.asdict(GPU))
    yield device
    device.close()


def row(place: int, start: int, tokens: list[int], sample: SamplingParams | None = LIKELY) -> StepRow:
    blocks = range(place * BLOCKS, (place + 1) * BLOCKS)
    spec = None if sample is None else SampleSpec(sample, 0, tokens, [])
    return StepRow(f"row {place}", start, tokens, blocks, spec)


def step(device: Device, *rows: StepRow) -> StepOutput:
    plan = StepPlan(0, rows)
    device.launch(plan)
    output = device.collect()
    output.check_answers(plan)
    return output


def ids(place: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(place)
    drawn: list[int] = torch.randint(1, CONFIG.vocab_size, (count,), generator=generator).tolist()
    return drawn


def test_prompts_mixed_steps_and_captured_steps_have_one_gpus_numbers(
    ranked: RankedCudaDevice, alone: CudaDevice
) -> None:
    """Float32 without TF32: products are summed in another order, nothing else differs."""
    plans = [
        [row(0, 0, ids(0, 300), None), row(1, 0, ids(1, 17))],
        [row(1, 17, [5]), row(0, 300, ids(2, 200))],
        [row(0, 500, [7]), row(1, 18, [9])],
        [row(1, 19, [3])],
    ]
    for rows in plans:
        ours, theirs = step(ranked, *rows), step(alone, *rows)
        for mine, other in zip(ours.rows, theirs.rows, strict=True):
            for token, expected in zip(mine.tokens, other.tokens, strict=True):
                assert token.token_id == expected.token_id
                found = torch.tensor([value for _, value in token.top])
                torch.testing.assert_close(
                    found, torch.tensor([value for _, value in expected.top]), atol=1e-3, rtol=0.0
                )
    for block in (0, 3, BLOCKS):
        mine, other = (
            torch.frombuffer(bytearray(device.kv.read_block(block)), dtype=torch.float32) for device in (ranked, alone)
        )
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


def test_two_plans_at_a_time_draw_the_same_tokens(ranked: RankedCudaDevice) -> None:
    """One sequence whose next token is still being drawn, or in a pipeline two sequences in turn."""
    places = [2] if ranked.looks_ahead else [2, 3]
    expected = {}
    for place in places:
        found = [step(ranked, row(place, 0, ids(place, 20), GREEDY)).rows[0].tokens[0].token_id]
        for at in range(20, 30):
            found.append(step(ranked, row(place, at, found[-1:], GREEDY)).rows[0].tokens[0].token_id)
        expected[place] = found
    again: dict[int, list[int]] = {place: [] for place in places}
    for place in places:
        ranked.launch(StepPlan(place, (row(place, 0, ids(place, 20), GREEDY),)))
    for at in range(20, 30):
        for place in places:
            if ranked.looks_ahead:
                ranked.launch(StepPlan(at, (row(place, at, [DRAWN], GREEDY),)))
            again[place].append(ranked.collect().rows[0].tokens[0].token_id)
            if not ranked.looks_ahead:
                ranked.launch(StepPlan(at, (row(place, at, again[place][-1:], GREEDY),)))
    for place in places:
        again[place].append(ranked.collect().rows[0].tokens[0].token_id)
    assert again == expected


def test_kv_memory_is_what_the_smallest_rank_has_room_for() -> None:
    device = RankedCudaDevice(
        FILES,
        dataclasses.replace(GPU, kv_cache_bytes=0, gpu_memory_utilization=0.2),
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        tensor_parallel=2,
        pipeline_stages=1,
    )
    try:
        assert device.num_blocks > 1000
        assert len(step(device, row(0, 0, ids(0, 100))).rows[0].tokens) == 1
    finally:
        device.close()
