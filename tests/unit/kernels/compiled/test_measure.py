from __future__ import annotations

import pytest
from tandem.kernels.compiled import measure
from tandem.kernels.compiled.packed import KINDS


def test_speeds_are_told_beside_what_the_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SWEPT_BYTES", 1 << 20)
    bounds = measure.measure_bounds(repeats=1)
    assert bounds.read_gb_s > 0
    assert set(bounds.gflop_s) == set(KINDS)
    speeds = [speed for kind in KINDS for speed in measure.measure_linear(kind, 40, 64, (1, 9), bounds, repeats=1)]
    assert [(speed.kind, speed.rows) for speed in speeds] == [(kind, rows) for kind in KINDS for rows in (1, 9)]
    for speed in speeds:
        assert speed.gflop_s == pytest.approx(2 * speed.rows * 40 * 64 / speed.seconds / 1e9)
        assert speed.share > 0
    lines = measure.table(speeds, bounds).splitlines()
    assert len(lines) == 2 + len(speeds)
    assert "40x64" in lines[2]
