"""Bias, bans and penalties on the device are the reference's to the bit, and leave no trace behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tandem.kernels.gpu.penalties import penalize, restore
from tandem.kernels.gpu_plans.draws import Penalties
from tandem.kernels.penalties import penalize_reference

TILE = 32


def asked(lists: list[tuple[int, float, dict[int, float], dict[int, float]]], device: torch.device) -> Penalties:
    """Of rows (row, repetition penalty, added, subtracted)."""
    spans, ids, values = [], [], []
    for _, _, added, subtracted in lists:
        spans.append((len(ids), len(ids) + len(added), len(ids) + len(added) + len(subtracted)))
        for part in (added, subtracted):
            ids += part.keys()
            values += part.values()
    columns = (
        ([row for row, *_ in lists], torch.int32),
        (spans, torch.int32),
        ([repetition for _, repetition, *_ in lists], torch.float32),
        (ids, torch.int32),
        (values, torch.float32),
        ([0.0] * len(ids), torch.float32),
    )
    return Penalties(*(torch.tensor(values, dtype=dtype, device=device) for values, dtype in columns))


def test_rows_are_the_references_and_come_back(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    z = torch.from_numpy((rng.standard_normal((5, 200)) * 5).astype(np.float32))
    z[3, 5] = -torch.inf
    everything = {int(i): float(v) for i, v in zip(rng.permutation(200), rng.standard_normal(200), strict=True)}
    lists = [
        (0, 1.3, {}, everything),
        (2, 1.0, {7: 100.0, 199: -torch.inf}, {}),
        (3, 0.7, {5: 3.0, 6: -2.5, 9: -torch.inf}, {5: 0.1, 9: 0.0, 6: -0.3, 70: 1e-3}),
        (4, 1.0, {}, {}),
    ]
    logits = z.clone().to(device)
    changes = asked(lists, device)
    penalize(logits, changes, TILE)
    expected = z.clone()
    for row, repetition, added, subtracted in lists:
        expected[row] = penalize_reference(z[row], added, subtracted, repetition)
    assert torch.equal(logits.cpu(), expected)
    assert not torch.equal(expected[[0, 2, 3]], z[[0, 2, 3]])
    restore(logits, changes, TILE)
    assert torch.equal(logits.cpu(), z)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_no_distribution_stays(device: torch.device, value: float) -> None:
    z = torch.full((1, 70), value)
    if value != float("-inf"):
        z[0, 1:] = 1.0
    logits = z.clone().to(device)
    changes = asked([(0, 2.0, {0: -torch.inf}, {0: 1.0, 3: 1.0})], device)
    with np.errstate(invalid="ignore"):
        penalize(logits, changes, TILE)
        assert torch.equal(logits.cpu().view(torch.int32), z.view(torch.int32))
        restore(logits, changes, TILE)
    assert torch.equal(logits.cpu().view(torch.int32), z.view(torch.int32))
