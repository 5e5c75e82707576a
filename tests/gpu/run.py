"""Everything that wants a GPU, in minutes: `make test-gpu bench-gpu`, or this file by itself.

`run.py [tests] [bench]`: both by default. Every file of tests and of benchmarks runs in a process of its own (a fault
on the device ends only what shares a process with it), tests several at a time, benchmarks one after another; what
fails or hangs does not keep the rest from running. What came of it stands in the folder `--out` (`$OUT` where that is
set, else `gpu-results`) as it comes: `tests.json`, `lines.json`, `bench.json`, and in the end `results-*.md`, tables
for people with device, versions, command and date. Exit status 1 where anything failed. One file with all the minutes:
`run.py bench --only engine --bench-minutes 8`.

Needs torch and triton, and what `make gpu-deps` puts into a folder of the repository for machines that lack it: pytest,
hypothesis, and of Tandem's dependencies those of the engine. Without a GPU, tests are interpreted and nothing is
measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ALONE = "tests/gpu"
"""Tests that look at the device's memory as a whole: one file at a time, ahead of the others."""
_ALONE_SHARE = 0.3
"""Of the time that is left, for each of them."""
TEST_FOLDERS = (ALONE, "tests/unit/kernels/gpu", "tests/unit/cluster/engine/gpu")
TEST_MINUTES, BENCH_MINUTES = 3.7, 4.7
WEIGHTS = {"engine": 6.0, "attention": 3.0, "gemm": 2.0}
"""Of the benchmarks' minutes, in the order in which they run; others take 1 and come behind."""
_LAST_LINES = 15


@dataclass(slots=True)
class Outcome:
    """What came of one process."""

    name: str
    seconds: float = 0.0
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    """A line each; empty: all is well."""


def environment(link: Path) -> dict[str, str]:
    """With the package `tandem` on the path, whatever the folder above is called, and what `make gpu-deps` got."""
    paths = [str(link), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "gpu-deps")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run(command: Sequence[str], variables: dict[str, str], log: Path, timeout_s: float) -> str | None:
    """Runs a process; what is wrong with how it ended, None: nothing (pytest's 5: no test was there). Ends what it
    started where it takes too long.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=variables, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(timeout_s, 1.0))
        except subprocess.TimeoutExpired:
            return f"not done after {timeout_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None if status in (0, 5) else f"exit status {status}"


def last_lines(log: Path) -> str:
    """The end of a process's output."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def test_files(words: Sequence[str]) -> list[Path]:
    """Those whose names have one of the words, all without words."""
    found = [path for folder in TEST_FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]
    return [path for path in found if not words or any(word in path.stem for word in words)]


def run_tests(path: Path, variables: dict[str, str], folder: Path, until_s: float) -> Outcome:
    """One file of tests."""
    name = str(path.relative_to(ROOT))
    outcome, begin_s = Outcome(name), time.monotonic()
    if begin_s > until_s:
        outcome.failures.append("out of time: not begun")
        return outcome
    report, log = folder / f"{path.stem}.xml", folder / f"{path.parent.name}-{path.stem}.log"
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(HERE / "pytest.ini"), f"--confcutdir={path.parent}"]
    problem = run([*command, f"--junitxml={report}", str(path)], variables, log, until_s - begin_s)
    outcome.seconds = time.monotonic() - begin_s
    if report.exists():
        read_junit(report, outcome)
        report.unlink()
    if problem is not None and not outcome.failures:
        outcome.failures.append(f"{problem}: {last_lines(log)}")
    return outcome


def read_junit(report: Path, outcome: Outcome) -> None:
    """Counts a finished run's tests."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [entry for kind in ("failure", "error") for entry in case.findall(kind)]
        if wrong:
            message = " ".join((wrong[0].get("message") or "").split())
            outcome.failures.append(f"{case.get('name')}: {message[:400]}")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1


def tests(options: argparse.Namespace, variables: dict[str, str]) -> list[Outcome]:
    """All files, several at a time but for those that want the device alone; written as they end."""
    until_s = time.monotonic() + 60 * options.test_minutes
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []

    def take(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.passed} passed, {outcome.skipped} skipped, {outcome.seconds:.0f} s")
        for failure in outcome.failures:
            print(f"  FAILED {failure}", flush=True)
        write_json(options.out / "tests.json", outcomes)

    paths = test_files(options.only)
    alone = [path for path in paths if path.parent == ROOT / ALONE]
    for path in alone:
        now_s = time.monotonic()
        take(run_tests(path, variables, logs, now_s + _ALONE_SHARE * (until_s - now_s)))
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        under_way = [pool.submit(run_tests, path, variables, logs, until_s) for path in paths if path not in alone]
        for done in concurrent.futures.as_completed(under_way):
            take(done.result())
    outcomes.sort(key=lambda outcome: outcome.name)
    write_json(options.out / "tests.json", outcomes)
    return outcomes


def bench_names(folder: Path, words: Sequence[str]) -> list[str]:
    """Of files of benchmarks, in the order in which they run."""
    names = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    order = [*WEIGHTS, *(name for name in names if name not in WEIGHTS)]
    return [name for name in order if name in names and (not words or any(word in name for word in words))]


def bench(options: argparse.Namespace, variables: dict[str, str]) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """All files, one after another, each with its share of what time is left; and every line that they wrote."""
    until_s = time.monotonic() + 60 * options.bench_minutes
    names = bench_names(options.folder, options.only)
    lines, bounds = options.out / "lines.json", options.out / "bounds.json"
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lines.unlink(missing_ok=True)
    bounds.unlink(missing_ok=True)
    outcomes = []
    for index, name in enumerate(names):
        weights = [WEIGHTS.get(other, 1.0) for other in names[index:]]
        left_s = until_s - time.monotonic()
        share_s = max(left_s, 0.0) * weights[0] / sum(weights)
        command = [sys.executable, str(HERE / "bench.py"), name, f"--json={lines}", f"--bounds={bounds}"]
        command += [f"--folder={options.folder}", f"--minutes={0.8 * share_s / 60}"]
        command += ["--dry-run"] if options.dry_run else []
        log, begin_s = logs / f"bench-{name}.log", time.monotonic()
        problem = run(command, variables, log, max(share_s, 5.0))
        outcome = Outcome(name, time.monotonic() - begin_s)
        mine = [line for line in read_lines(lines) if line["file"] == name]
        outcome.passed = sum("cells" in line for line in mine)
        outcome.failures = [line["failure"] for line in mine if "failure" in line]
        if problem is not None and not outcome.failures:
            outcome.failures.append(f"{problem}: {last_lines(log)}")
        outcomes.append(outcome)
        print(log.read_text(errors="replace"), flush=True)
    write_json(options.out / "bench.json", outcomes, lines=read_lines(lines))
    return outcomes, read_lines(lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What benchmarks wrote; a last line that was cut off by a timeout is passed over."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write_json(path: Path, outcomes: Sequence[Outcome], **more: Any) -> None:
    path.write_text(json.dumps({"outcomes": [asdict(outcome) for outcome in outcomes], **more}, indent=1) + "\n")


def markdown(head: str, tested: Sequence[Outcome], measured: Sequence[Outcome], lines: Sequence[dict[str, Any]]) -> str:
    """Tables for people."""
    parts = [head]
    if tested:
        rows = [(o.name, str(o.passed), str(o.skipped), str(len(o.failures)), f"{o.seconds:.0f}") for o in tested]
        parts += ["## Tests", *table(("file", "passed", "skipped", "failed", "seconds"), rows)]
    titles = list(dict.fromkeys((line["file"], line["title"]) for line in lines if "cells" in line))
    for name, title in titles:
        mine = [line for line in lines if line["file"] == name and line.get("title") == title]
        parts += [f"## {title}", *table(mine[0]["heads"], [line["cells"] for line in mine])]
    failed = [f"- {o.name}: {failure}" for o in (*tested, *measured) for failure in o.failures]
    if failed:
        parts += ["## What failed", *failed]
    return "\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """In Markdown."""
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def head(variables: dict[str, str], command: str) -> str:
    """Device, versions, command, date."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import measure; print(measure.machine())"
    asked = subprocess.run(
        [sys.executable, "-c", program, str(HERE)], env=variables, capture_output=True, text=True, timeout=120
    )
    machine = asked.stdout.strip() or f"unknown ({asked.stderr.strip().splitlines()[-1:]})"
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return f"{machine}\n\nCommand: `{command}`. {now}.\n"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", help="tests, bench; both where nothing is said")
    parser.add_argument("--only", action="append", default=[], help="files whose names have this word; may be repeated")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"))
    parser.add_argument("--test-minutes", type=float, default=TEST_MINUTES, help="begin no test after this long")
    parser.add_argument("--bench-minutes", type=float, default=BENCH_MINUTES, help="measure nothing after this long")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="files of tests at a time")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the benchmarks' files are")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: benchmarks once, on the host")
    options = parser.parse_args(arguments)
    options.what = options.what or ["tests", "bench"]
    if not set(options.what) <= {"tests", "bench"}:
        parser.error(f"what: {options.what} is not allowed; allowed: tests, bench")
    if options.only and not test_files(options.only) + bench_names(options.folder, options.only):
        parser.error(f"--only: no file of tests or benchmarks has {' or '.join(options.only)} in its name")
    options.out = options.out.resolve()
    options.folder = options.folder.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = parsed(arguments)
    what = options.what
    with tempfile.TemporaryDirectory() as link:
        (Path(link) / "tandem").symlink_to(ROOT)
        variables = environment(Path(link))
        tested = tests(options, variables) if "tests" in what else []
        measured, lines = bench(options, variables) if "bench" in what else ([], [])
        command = " ".join(["tests/gpu/run.py", *(sys.argv[1:] if arguments is None else arguments)])
        told = markdown(head(variables, command), tested, measured, lines)
    (options.out / f"results-{'-'.join(what)}.md").write_text(told)
    print(f"\n{told}\n{options.out}")
    return 1 if any(outcome.failures for outcome in (*tested, *measured)) else 0


if __name__ == "__main__":
    sys.exit(main())
