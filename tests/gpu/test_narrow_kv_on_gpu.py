"""KV in one byte a number on a real GPU, against 16-bit KV: its conversions are the hardware's or written for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from random_engine import LIKELY, make, prompts, row, step
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.kv_scales import KVScales
from tandem.cluster.engine.narrow_kv import NarrowKV
from tandem.cluster.types import SampledToken

LIMITS = {"max_running": 4, "max_batched_tokens": 512}
BLOCKS = list(range(100, 120))


def tokens(device: CudaDevice, blocks: list[int], steps: int = 4) -> list[SampledToken]:
    """Of a prompt in two chunks and some decode steps, whose tokens are given."""
    (prompt,) = prompts(1, 300)
    step(device, row("a", 0, prompt[:200], blocks, None))
    found = [step(device, row("a", 200, prompt[200:], blocks))]
    found += [step(device, row("a", 300 + index, [index + 5], blocks)) for index in range(steps)]
    return [output.rows[0].tokens[0] for output in found]


def apart(ours: list[SampledToken], theirs: list[SampledToken]) -> float:
    """The largest difference of logprobs that both name."""
    pairs = [(value, dict(b.top).get(i)) for a, b in zip(ours, theirs, strict=True) for i, value in a.top]
    shared = [abs(value - known) for value, known in pairs if known is not None]
    assert len(shared) > 10 * len(ours)
    return max(shared)


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.3), ("float8_e4m3", 0.6)])
def test_narrow_kv(dtype: str, tolerance: float) -> None:
    """Launched and captured steps, by Triton and by torch; then another worker goes on with the blocks."""
    plain = make(enforce_eager=True, **LIMITS)
    expected = tokens(plain, BLOCKS)
    largest = plain.kv.tensor[BLOCKS].float().abs().amax(dim=(0, 4, 5)).cpu().numpy()
    plain.close()
    narrow = NarrowKV.by(dtype, KVScales(largest=largest).scales(dtype))
    device, other = (make(narrow_kv=narrow, **LIMITS) for _ in range(2))
    assert device.num_blocks == 2 * plain.num_blocks
    found = tokens(device, BLOCKS)
    assert apart(found, expected) < tolerance
    moved = [bytes(block) for block in device.kv.read_blocks(BLOCKS[:19])]
    other.kv.write_blocks(range(5, 24), moved)
    last = row("a", 303, [8], list(range(5, 24)), LIKELY)
    assert step(other, last).rows[0].tokens[0] == found[-1]
    device.close()
    other.close()
    by_torch = make(narrow_kv=narrow, kernels="torch", **LIMITS)
    assert apart(tokens(by_torch, BLOCKS), found) < tolerance / 2
    by_torch.close()
