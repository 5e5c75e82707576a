"""The command for a GPU machine: what fails, hangs or breaks the device costs its own part, and what came is told."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


def load(repository: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of tests/gpu, which is no package."""
    path = repository / "tests" / "gpu" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(repository, "run", monkeypatch)


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fake = SimpleNamespace(HEADS=("what", "who"), rows=lambda cases, bounds: iter(cases), Case=object)
    monkeypatch.setitem(sys.modules, "measure", fake)
    return load(repository, "bench", monkeypatch)


def test_what_fails_does_not_keep_the_next_from_being_measured(
    bench: ModuleType, run: ModuleType, tmp_path: Path
) -> None:
    def broken() -> list[tuple[str, str]]:
        raise AssertionError("0.5 is not 0.6")

    def cases(device: torch.device) -> Iterator[Callable[[], list[tuple[str, str]]]]:
        yield lambda: [("sum", "ours"), ("sum", "theirs")]
        yield broken
        yield lambda: [("product", "ours")]

    def lines(device: torch.device, bounds: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(title="whole", heads=("a",), cells=("1",))
        raise ValueError("no such model")

    path = tmp_path / "lines.json"
    report = bench.Report("fake", path)
    module = SimpleNamespace(cases=cases, lines=lines)
    bench.run_file(module, "fake", torch.device("cpu"), None, report, time.monotonic() + 60)
    told = run.read_lines(path)
    assert [line["cells"] for line in told if "cells" in line] == [
        ["sum", "ours"], ["sum", "theirs"], ["product", "ours"], ["1"]
    ]  # fmt: skip
    failures = [line["failure"] for line in told if "failure" in line]
    assert failures[0].endswith("AssertionError: 0.5 is not 0.6")
    assert failures[1].endswith("ValueError: no such model")
    assert report.failures == 2

    late = bench.Report("late", path)
    bench.run_file(module, "late", torch.device("cpu"), None, late, time.monotonic() - 1)
    assert run.read_lines(path)[-1] == {"file": "late", "failure": "out of time, the rest is left out"}


def test_a_process_that_hangs_or_fails_is_told(run: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hung = run.run([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], {}, log, 1.5)
    assert hung == "not done after 2 s"
    assert run.last_lines(log) == "begun"
    assert run.run([sys.executable, "-c", "raise SystemExit(3)"], {}, log, 20) == "exit status 3"
    assert run.run([sys.executable, "-c", "raise SystemExit(5)"], {}, log, 20) is None


def test_results_are_counted_and_written_for_people(run: ModuleType, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><skipped/></testcase>"
        "<testcase name='c'><failure message='assert 1 ==\n 2'/></testcase>"
        "<testcase name='d'><error message='boom'/></testcase></testsuite></testsuites>"
    )
    outcome = run.Outcome("tests/x.py", 3.4)
    run.read_junit(junit, outcome)
    assert (outcome.passed, outcome.skipped) == (1, 1)
    assert outcome.failures == ["c: assert 1 == 2", "d: boom"]
    lines = tmp_path / "lines.json"
    entry = {"file": "rows", "title": "rows", "heads": ["what", "µs"], "cells": ["a | b", "1.5"]}
    lines.write_text(json.dumps(entry) + "\n" + '{"file": "rows", "ti')
    told = run.markdown("H100\n", [outcome], [run.Outcome("gemm", failures=["out"])], run.read_lines(lines))
    assert "| tests/x.py | 1 | 1 | 2 | 3 |" in told
    assert "## rows\n| what | µs |\n|---|---|\n| a \\| b | 1.5 |" in told
    assert told.endswith("## What failed\n- tests/x.py: c: assert 1 == 2\n- tests/x.py: d: boom\n- gemm: out\n")


def test_files_are_found_and_what_matters_most_runs_first(run: ModuleType, repository: Path) -> None:
    found = [str(path.relative_to(repository)) for path in run.test_files(["penalties", "graphs"])]
    assert found == ["tests/unit/kernels/gpu/test_penalties.py", "tests/unit/cluster/engine/gpu/test_graphs.py"]
    assert set(run.TEST_FOLDERS) <= {str(path.parent.relative_to(repository)) for path in run.test_files([])} | {
        "tests/gpu"
    }
    names = run.bench_names(repository / "tests" / "gpu", [])
    assert names[0] == next(name for name in run.WEIGHTS if name in names)
    assert sorted(names) == sorted(
        path.stem.removeprefix("bench_") for path in (repository / "tests" / "gpu").glob("bench_*.py")
    )
    with pytest.raises(SystemExit):
        run.parsed(["tests", "--only", "no-such-file"])
    with pytest.raises(SystemExit):
        run.parsed(["everything"])
