"""The pictures: drawn without a display, refused beforehand where they could not be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tandem.cluster.bench.plots import check_plot, plot_run, plot_sweeps
from tandem.cluster.workload.report import RequestRecord
from tandem.cluster.workload.sweep import SweepPoint, SweepResult, SweepRun


def sweep(label: str, rates: tuple[float, ...]) -> SweepResult:
    runs = {
        rate: SweepRun(seed=0, requests=10, attained=int(10 / rate), late_requests=5, late_attained=4, duration_s=1.0)
        for rate in rates
    }
    points = tuple(SweepPoint(rate=rate, runs=(run, run)) for rate, run in runs.items())
    return SweepResult(label=label, target=0.9, promises_ms={"ttft": 100.0}, points=points)


def words(path: Path) -> str:
    return path.read_text()


def test_sweeps_are_overlaid_under_their_labels(tmp_path: Path) -> None:
    path = tmp_path / "curves.svg"
    plot_sweeps([sweep("split", (1.0, 2.0)), sweep("colocated", (2.0, 4.0))], path, title="both")
    assert "split: none kept" in words(path)
    assert "colocated: none kept" in words(path)


def test_a_run_is_drawn_with_failures_and_one_token_answers(tmp_path: Path) -> None:
    records = [
        RequestRecord(due_s=1.0, sent_s=1.0, first_token_s=1.05, last_token_s=1.2, output_tokens=4),
        RequestRecord(due_s=2.0, sent_s=2.0, first_token_s=2.5, last_token_s=2.5, output_tokens=1),
        RequestRecord(due_s=3.0, sent_s=3.0, error="refused"),
    ]
    path = tmp_path / "run.png"
    plot_run(records, path, promises_ms={"ttft": 100.0, "tpot": 60.0})
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_of_failures_alone_is_drawn_too(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    plot_run([RequestRecord(due_s=3.0, sent_s=3.0, error="refused")], path)
    assert path.stat().st_size > 0


def test_what_cannot_be_drawn_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"allowed: a file that ends in \.png, \.svg, \.pdf"):
        check_plot(tmp_path / "run.txt")
    with pytest.raises(ValueError, match="allowed: a file in a folder that exists"):
        check_plot(tmp_path / "missing" / "run.png")
    check_plot(tmp_path / "run.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install tandem-serve\[plots\]"):
        check_plot(tmp_path / "run.png")
