"""Engines of narrow weights on a real GPU, against 16-bit ones. Apart from the other engines' tests: each kind compiles
and times many ways to compute a product.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

from random_engine import make, prompts, row, step


@pytest.mark.parametrize(("quantization", "tolerance"), [("w8a8", 0.3), ("w4a16", 1.5)])
def test_narrow_weights(quantization: str, tolerance: float) -> None:
    limits = {"max_running": 4, "max_batched_tokens": 512}
    plain = make(enforce_eager=True, **limits)
    device = make(quantization=quantization, **limits)
    (prompt,) = prompts(1, 100)
    rows = (row("a", 0, prompt, list(range(100, 107))),)
    wide, narrow = step(plain, *rows), step(device, *rows)
    known = dict(wide.rows[0].tokens[0].top)
    shared = [abs(value - known[i]) for i, value in narrow.rows[0].tokens[0].top if i in known]
    assert len(shared) >= 3
    assert max(shared) < tolerance
    assert len(step(device, row("a", 100, [5], list(range(100, 107)))).rows[0].tokens) == 1
    device.close()
    plain.close()
