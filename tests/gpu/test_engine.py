"""The engine on a real GPU: what the interpreter cannot show. Widths are those of real models, layers are few.

Run by `make test-gpu`; skipped where there is no GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import engine_rig
from random_engine import LIKELY, SEEDED, files, make, prompts, row, step
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.plan import StepPlan
from tandem.cluster.latency.memory import DoesNotFit
from tandem.cluster.types import SampledToken


@pytest.fixture(scope="module")
def captured() -> Iterator[CudaDevice]:
    device = make()
    yield device
    device.close()


def apart(ours: SampledToken, theirs: SampledToken) -> float:
    """The largest difference of logprobs that both name."""
    known = dict(theirs.top)
    return max(abs(value - known[token_id]) for token_id, value in ours.top if token_id in known)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_float32_is_the_cpus(kernels: str) -> None:
    """A prompt in chunks beside decode rows, then decode, at a real width."""
    common = {"dtype": "float32", "block_size": 16, "kv_cache_bytes": 2**27}
    ours = CudaDevice(files(), kernels=kernels, max_batched_tokens=512, max_running=8, **common)
    theirs = CpuDevice(files(), kernels="torch", threads=8, **common)
    (prompt,) = prompts(1, 300)
    blocks = list(range(40, 60))
    plans = [
        [row("a", 0, prompt[:200], blocks)],
        [row("b", 0, [5], [1]), row("a", 200, prompt[200:], blocks)],
        [row("b", 1, [6], [1]), row("a", 300, [9], blocks), row("c", 0, [7], [2])],
    ]
    for rows in plans:
        for mine, expected in zip(step(ours, *rows).rows, step(theirs, *rows).rows, strict=True):
            assert mine.tokens[0].token_id == expected.tokens[0].token_id
            assert apart(mine.tokens[0], expected.tokens[0]) < 2e-3
    ours.close()


def test_captured_steps_draw_what_launched_ones_do(captured: CudaDevice) -> None:
    """Every padded size up to the largest, whose padding rows touch nothing."""
    eager = make(enforce_eager=True)
    for device in (captured, eager):
        device.kv.tensor.normal_(generator=torch.Generator("cuda").manual_seed(0))
    torch.cuda.synchronize()
    for count in (1, 2, 3, 5, 8, 13, 32):
        rows = [
            row(str(r), 17 * r + 1, [r + 3], [40 * r + i for i in range(2 + 17 * r // 16)], sample)
            for r, sample in zip(range(count), (LIKELY, SEEDED) * count, strict=False)
        ]
        before = captured.kv.tensor.clone()
        torch.cuda.synchronize()  # the engine's stream waits for no other
        mine, expected = step(captured, *rows), step(eager, *rows)
        for token, other in zip(mine.rows, expected.rows, strict=True):
            assert token.tokens[0].token_id == other.tokens[0].token_id, f"{count} rows"
            assert token.tokens[0].logprob == pytest.approx(other.tokens[0].logprob, abs=0.02)
        changed = (captured.kv.tensor != before).any(dim=(1, 2, 3, 5)).nonzero().tolist()
        slots = {(r.block_ids[r.start // 16], r.start % 16) for r in rows}
        assert {tuple(place) for place in changed} <= slots
    eager.close()


def test_the_host_never_waits_in_a_step(captured: CudaDevice) -> None:
    (prompt,) = prompts(1, 200)
    decode = [row(str(r), 20, [r + 1], [2 * r, 2 * r + 1], SEEDED) for r in range(9)]
    mixed = [*decode, row("p", 0, prompt, list(range(30, 43)))]
    for rows in (decode, mixed):
        step(captured, *rows)  # what is made once is made
        torch.cuda.set_sync_debug_mode("error")
        try:
            captured.launch(StepPlan(0, tuple(rows)))
            captured.launch(StepPlan(1, tuple(rows)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert captured.collect().rows == captured.collect().rows


def test_whole_runs_with_two_plans_under_way_draw_what_one_at_a_time_does(captured: CudaDevice) -> None:
    given, limits = prompts(12, 150), {"budget": 512, "running": 8, "longest": 512}
    ahead = engine_rig.serve_all(captured, given, 20, **limits)
    try:
        captured.looks_ahead, captured.plans_ahead = False, 1
        alone = engine_rig.serve_all(captured, given, 20, **limits)
    finally:
        captured.looks_ahead, captured.plans_ahead = True, 2
    same = sum(ahead.tokens[name] == alone.tokens[name] for name in alone.tokens)
    assert same >= 10  # batches differ between the two, and with them how 16-bit sums are rounded


def test_a_row_whose_logits_are_no_numbers_fails_alone(captured: CudaDevice) -> None:
    captured.kv.tensor[6].fill_(math.nan)
    torch.cuda.synchronize()  # the engine's stream waits for no other
    output = step(captured, row("bad", 1, [1], [6]), row("good", 0, [2], [7]))
    assert output.rows[0] == ("bad", (), "logits: NaN in the row")
    assert math.isfinite(output.rows[1].tokens[0].logprob or math.nan)
    captured.kv.tensor[6].zero_()
    torch.cuda.synchronize()


@pytest.mark.alone
def test_kv_takes_what_is_left_of_the_workers_share() -> None:
    """And no more: what PyTorch and we hold stays within it."""
    torch.cuda.empty_cache()
    before, total = torch.cuda.mem_get_info()
    part = round(8 * 2**30 / total + (total - before) / total, 3)
    device = make(kv_cache_bytes=0, gpu_memory_utilization=part)
    free, _ = torch.cuda.mem_get_info()
    assert device.num_blocks > 1000
    assert total - free <= total * part + 2**29
    assert len(step(device, row("a", 0, [1, 2, 3], [device.num_blocks - 1])).rows[0].tokens) == 1
    device.close()
    with pytest.raises(DoesNotFit, match=r"does not fit: .* for KV"):
        make(kv_cache_bytes=0, gpu_memory_utilization=round(2**30 / total, 4))
