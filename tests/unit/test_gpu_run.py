"""The command for a GPU machine: what fails, hangs or breaks the device costs its own part, and what came is told."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
    rows = lambda cases, bounds, ours: ((case.what, case.who) for case in cases)  # noqa: E731
    fake = SimpleNamespace(HEADS=("what", "who"), rows=rows, Case=object)
    monkeypatch.setitem(sys.modules, "measure", fake)
    return load(repository, "bench", monkeypatch)


def case(what: str, who: str, late: int = 0) -> SimpleNamespace:
    return SimpleNamespace(what=what, who=who, late=late)


def line(cell: str) -> SimpleNamespace:
    return SimpleNamespace(title="whole", heads=("a",), cells=(cell,))


Tell = Callable[[SimpleNamespace], None]


def test_what_fails_does_not_keep_the_next_from_being_measured(
    bench: ModuleType, run: ModuleType, tmp_path: Path
) -> None:
    def broken() -> list[SimpleNamespace]:
        raise AssertionError("0.5 is not 0.6")

    def cases(device: torch.device) -> Iterator[Callable[[], list[SimpleNamespace]]]:
        yield lambda: [case("sum", "ours"), case("sum", "compiled", late=2), case("sum", "theirs")]
        yield broken
        yield lambda: [case("product", "ours")]

    def no_room(tell: Tell) -> None:
        tell(line("1"))
        raise torch.OutOfMemoryError("no room")

    def lines(device: torch.device, bounds: object) -> Iterator[Callable[[Tell], None]]:
        yield no_room
        yield lambda tell: tell(line("2"))
        raise ValueError("no such model")

    path = tmp_path / "lines.json"
    report = bench.Report("fake", path)
    module = SimpleNamespace(cases=cases, lines=lines)
    bench.run_file(module, "fake", torch.device("cpu"), None, report, time.monotonic() + 60)
    told = run.read_lines(path)
    assert [line["cells"] for line in told if "cells" in line] == [
        ["sum", "ours"], ["sum", "theirs"], ["product", "ours"], ["1"], ["2"]
    ]  # fmt: skip
    failures = [line["failure"] for line in told if "failure" in line]
    assert failures[0].endswith("AssertionError: 0.5 is not 0.6")
    assert failures[1].endswith("OutOfMemoryError: no room")
    assert failures[2].endswith("ValueError: no such model")
    assert report.failures == 3

    late = bench.Report("late", path)
    bench.run_file(module, "late", torch.device("cpu"), None, late, time.monotonic() - 1)
    assert run.read_lines(path)[-1] == {"file": "late", "cut": "out of time, the rest is left out"}


def test_what_is_late_comes_last_and_what_was_under_way_at_the_limit_is_told(
    bench: ModuleType, run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now_s[0])

    def takes_long(tell: Tell) -> None:
        now_s[0] += 100
        tell(line("whole run"))

    def module(*steps: Callable[[Tell], None]) -> SimpleNamespace:
        made = [case("sum", "compiled", late=2), case("sum", "ours"), case("sum", "library", late=1)]
        return SimpleNamespace(cases=lambda device: [lambda: made], lines=lambda device, bounds: steps)

    def told(name: str, *steps: Callable[[Tell], None]) -> list[list[str]]:
        path = tmp_path / f"{name}.json"
        bench.run_file(module(*steps), name, torch.device("cpu"), None, bench.Report(name, path), 50.0)
        return [entry.get("cells", ["cut"]) for entry in run.read_lines(path)]

    quick = told("quick", lambda tell: tell(line("whole run")))
    assert quick == [["sum", "ours"], ["whole run"], ["sum", "library"], ["sum", "compiled"]]
    assert told("slow", takes_long) == [["sum", "ours"], ["whole run"], ["cut"]]


def test_a_process_that_hangs_or_fails_is_told(run: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    hung = run.run([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], {}, log, 1.5)
    assert hung == "not done after 2 s"
    assert run.last_lines(log) == "begun"
    assert run.run([sys.executable, "-c", "raise SystemExit(3)"], {}, log, 20) == "exit status 3"
    assert run.run([sys.executable, "-c", "raise SystemExit(5)"], {}, log, 20) is None


HANGS = """
import os, signal, subprocess, sys, time
def cases(device):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(os.environ["BEGUN"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}\\n")
    time.sleep(600)
    yield
"""


def test_who_ends_the_command_ends_what_it_started(repository: Path, tmp_path: Path) -> None:
    folder, begun = tmp_path / "benches", tmp_path / "begun"
    folder.mkdir()
    for name in ("hangs", "later"):
        (folder / f"bench_{name}.py").write_text(HANGS)
    command = [sys.executable, str(repository / "tests/gpu/run.py"), "bench", "--dry-run"]
    command += [f"--folder={folder}", f"--out={tmp_path / 'out'}"]
    ran = subprocess.Popen(command, env=os.environ | {"BEGUN": str(begun)}, stdout=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + 60
        while not begun.exists() or not begun.read_text().endswith("\n"):
            assert time.monotonic() < until_s, "the benchmark has not begun"
            time.sleep(0.05)
        ran.send_signal(signal.SIGTERM)
        assert ran.wait(60) == 1
    finally:
        ran.kill()
        ran.wait()
    pids = [int(pid) for pid in begun.read_text().split()]
    assert not [pid for pid in pids if runs(pid)]
    told = json.loads((tmp_path / "out" / "bench.json").read_text())["outcomes"]
    assert [outcome["name"] for outcome in told] == ["hangs", "later"]
    assert all("when the command was ended" in outcome["cut"][0] for outcome in told)


def runs(pid: int) -> bool:
    """Whether a process is there, and is more than an entry that nobody has waited for."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_compiles_beside_the_tests_is_waited_for_until_a_time(
    run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "rivals.py"
    program.write_text(
        "import os, time\nprint(os.nice(0), os.environ['MAX_JOBS'], flush=True)\n"
        "time.sleep(float(os.environ['S']))\nprint('compiled', flush=True)\n"
    )

    def told(sleep_s: float, limit_s: float) -> str:
        variables = dict(os.environ) | {"S": str(sleep_s)}
        with run.compiling(program, variables, tmp_path / "log", time.monotonic() + limit_s):
            pass
        return capsys.readouterr().out

    assert told(0, 60) == "rivals:\n19 4\ncompiled\n"
    assert told(600, 2) == "rivals:\n19 4\n"


def test_results_are_written_for_people(run: ModuleType, tmp_path: Path) -> None:
    outcome = run.Outcome("tests/x.py", 3.4, passed=1, skipped=1, failures=["c: assert 1 == 2"])
    lines = tmp_path / "lines.json"
    entry = {"file": "rows", "title": "rows", "heads": ["what", "µs"], "cells": ["a | b", "1.5"]}
    lines.write_text(json.dumps(entry) + "\n" + '{"file": "rows", "ti')
    measured = [run.Outcome("gemm", failures=["out"], cut=["the rest"])]
    told = run.markdown("H100\n", [outcome], measured, run.read_lines(lines))
    assert "| tests/x.py | 1 | 1 | 1 |  | 3 |" in told
    assert "## rows\n| what | µs |\n|---|---|\n| a \\| b | 1.5 |" in told
    assert told.endswith(
        "## What failed\n- tests/x.py: c: assert 1 == 2\n- gemm: out\n"
        "## What was cut for want of time\n- gemm: the rest\n"
    )


TESTS = """
import os, pytest
def test_a(): pass
def test_b(): pytest.skip("no")
def test_c(): assert 1 == 2, "unequal"
@pytest.fixture
def broken():
    yield
    raise ValueError("boom")
def test_d(broken): pass
@pytest.mark.alone
def test_alone(): pass
def test_e(): LAST
def test_f(): pass
"""


@pytest.fixture
def ran(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Any]:
    """Runs a file of tests whose last but one does something."""

    def go(last: str, seconds: float) -> Any:
        path = tmp_path / "test_some.py"
        path.write_text(TESTS.replace("LAST", last))
        (tmp_path / "conftest.py").write_text((run.HERE / "conftest.py").read_text())
        here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        monkeypatch.setattr(run, "ROOT", tmp_path)
        variables = here | {"PYTHONPATH": str(run.HERE)}
        return run.run_tests(path, "not alone", variables, tmp_path, time.monotonic() + seconds)

    return go


def test_each_test_is_told_as_it_ends(ran: Callable[[str, float], Any]) -> None:
    outcome = ran("pass", 60)
    assert (outcome.passed, outcome.skipped, outcome.cut) == (3, 1, [])
    assert [failure.partition("\n")[0] for failure in outcome.failures] == [
        "test_c: AssertionError: unequal assert 1 == 2",
        "test_d: ValueError: boom",
    ]


def test_what_had_ended_before_a_crash_counts(ran: Callable[[str, float], Any]) -> None:
    outcome = ran("os._exit(7)", 60)
    assert (outcome.passed, outcome.skipped, outcome.cut) == (1, 1, [])
    assert outcome.failures[-1] == "exit status 7, in test_e; 2 of 6 tests have not ended"


def test_what_there_was_no_time_for_is_cut_and_told(ran: Callable[[str, float], Any]) -> None:
    outcome = ran("pass", -1)
    assert (outcome.passed, outcome.failures, outcome.cut) == (0, [], ["not begun"])


def test_a_file_that_is_killed_at_its_limit_keeps_what_it_found(run: ModuleType) -> None:
    outcome = run.Outcome("tests/x.py")
    told = [
        {"collected": ["x::a", "x::b", "x::c"]},
        {"begun": "x::a"},
        {"test": "x::a", "outcome": "passed", "message": ""},
        {"begun": "x::b"},
    ]
    run.count_tests(told, "not done after 66 s", outcome)
    assert (outcome.passed, outcome.failures) == (1, [])
    assert outcome.cut == ["not done after 66 s, in b: 2 of 3 tests have not ended"]
    silent = run.Outcome("tests/y.py")
    run.count_tests([], "not done after 66 s", silent)
    assert silent.cut == ["not done after 66 s: its tests have not been collected"]


class _Graph:
    """A capture that something broke."""

    def __init__(self) -> None:
        self.under_way = False

    def capture_begin(self, **options: Any) -> None:
        self.under_way = True

    def capture_end(self) -> None:
        self.under_way = False
        raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None: ...


@pytest.fixture
def measure(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    streams: list[object] = []

    @contextlib.contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "streams_in_use", streams, raising=False)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(device_index=0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    for name in ("synchronize", "empty_cache", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)
    return load(repository, "measure", monkeypatch)


def test_a_broken_capture_leaves_nothing_behind(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda device, pool, name=name: told.append((name, device, pool)), raising=False
        )
    calls = []

    def run() -> None:
        calls.append(len(torch.cuda.streams_in_use))  # type: ignore[attr-defined]
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    assert measure._captured(run) is run
    assert calls == [0, 1]  # as it is, then captured
    assert torch.cuda.streams_in_use == []  # type: ignore[attr-defined]
    assert told == [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))]


def test_what_waits_for_the_device_is_not_captured(measure: ModuleType) -> None:
    calls = []

    def run() -> None:
        calls.append(1)
        raise RuntimeError("called a synchronizing CUDA operation")

    assert measure._captured(run) is run
    assert calls == [1]


def test_what_another_library_refuses_costs_its_own_line(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def refuses() -> None:
        made.append("theirs")
        raise NotImplementedError("no such kernel\non this device")

    def makes() -> Callable[[], None]:
        made.append("others")
        return lambda: made.append("ran")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runs = (("tandem", list), ("theirs", measure.library(lambda: refuses)), ("others", measure.library(makes)))
    cases = [measure.Case(what="sum", who=who, run=run, moved_bytes=8) for who, run in runs]
    bounds, ours = measure.Bounds(copy_bytes_per_s=1.0, products_per_s=1.0), dict[str, float]()
    lines = measure.rows(cases, bounds, ours)
    assert next(lines)[1] == "tandem"
    assert made == []  # what others make first, for minutes at worst, holds up no line of ours
    rest = list(lines)
    assert [line[1] for line in rest] == ["theirs", "others"]
    assert rest[0] == ("sum", "theirs", "left out", *[""] * 5, "NotImplementedError: no such kernel")
    assert rest[1][7].endswith("x")
    assert made == ["theirs", "others", "ran"]
    later = [measure.Case(what="sum", who="late", run=list, moved_bytes=8, beside_bytes=80)]
    (told,) = measure.rows(later, bounds, ours)
    assert told[7].endswith("x")
    assert told[8].endswith("% of a decode step")


def test_files_are_found_and_what_matters_most_runs_first(run: ModuleType, repository: Path) -> None:
    found = [str(path.relative_to(repository)) for path in run.test_files(["penalties", "test_graphs"])]
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
