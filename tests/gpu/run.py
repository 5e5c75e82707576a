"""Everything that wants a GPU, in minutes: `make test-gpu bench-gpu`, or this file by itself.

`run.py [tests] [bench]`: both by default, in nine minutes on a machine that has compiled nothing yet. Every file of
tests and of benchmarks runs in a process of its own (a fault on the device ends only what shares a process with it),
tests several at a time (beside them a library that is compared with is compiled, where it is there), benchmarks one
after another; what fails or hangs does not keep the rest from running, and what
is killed for want of time has left all that it had found. What came of it stands in the folder `--out` (`$OUT` where
that is set, else `gpu-results`) as it comes: `tests.json`, `lines.json`, `bench.json`, and `results-*.md`, tables for
people with device, versions, command and date, and what was cut. Exit status 1 where anything failed or was cut. One
file with all the minutes: `run.py bench --only engine --bench-minutes 8`.

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
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WHOLE = "tests/gpu"
"""What only a GPU shows: its files begin first. Tests in them that are marked `alone` look at the device's memory as a
whole: they run when all others have ended."""
TOGETHER_SHARE = 0.8
"""Of the tests' minutes, for those that are not alone: at first everything is compiled, on all processors at once."""
TEST_FOLDERS = (WHOLE, "tests/unit/kernels/gpu", "tests/unit/cluster/engine/gpu")
COMPILES = HERE / "flashinfer_rival.py"
COMPILING = {"MAX_JOBS": "4"}
LAST = ("test_cubin",)
"""Of files of tests: it compiles everything, for devices that are not here too."""
TEST_MINUTES, BENCH_MINUTES = 4.1, 4.9
WEIGHTS = {"engine": 7.0, "attention": 3.0, "gemm": 2.0, "transfer": 1.5, "rows": 1.5}
"""Of the benchmarks' minutes, in the order in which they run; others take 1 and come behind."""
_LAST_LINES = 15
NOT_DONE = "not done after"
_under_way: set[subprocess.Popen[bytes]] = set()
_ended = threading.Event()


@dataclass(slots=True)
class Outcome:
    """What came of one process."""

    name: str
    seconds: float = 0.0
    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    """A line each; empty: all is well."""
    cut: list[str] = field(default_factory=list)
    """What there was no time for, a line each."""


def environment(link: Path) -> dict[str, str]:
    """With the package `tandem` on the path, whatever the folder above is called, and what `make gpu-deps` got."""
    paths = [str(link), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "gpu-deps")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run(command: Sequence[str], variables: dict[str, str], log: Path, timeout_s: float) -> str | None:
    """Runs a process; what is wrong with how it ended, None: nothing (pytest's 5: no test was there). Ends what it
    started where it takes too long, or where this command is ended.
    """
    begin_s = time.monotonic()
    with log.open("wb") as file:
        # A group of its own, but of this session: whoever ends the session, unasked, ends it too.
        process = subprocess.Popen(
            command,
            env=variables,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        _under_way.add(process)
        try:
            status = None if _ended.is_set() else process.wait(max(timeout_s, 1.0))
        except subprocess.TimeoutExpired:
            return f"{NOT_DONE} {timeout_s:.0f} s"
        finally:
            kill_group(process)
            process.wait()
            _under_way.discard(process)
    if _ended.is_set():
        return f"{NOT_DONE} {time.monotonic() - begin_s:.0f} s, when the command was ended"
    return None if status in (0, 5) else f"exit status {status}"


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """A process, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end(*_: object) -> None:
    """This command is to end: so do the processes under way, and those to come as they begin; then what they had found
    is told as ever.
    """
    _ended.set()
    for process in list(_under_way):
        kill_group(process)


def last_lines(log: Path) -> str:
    """The end of a process's output."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def test_files(words: Sequence[str]) -> list[Path]:
    """Those whose names have one of the words, all without words."""
    found = [path for folder in TEST_FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]
    found.sort(key=lambda path: path.stem in LAST)
    return [path for path in found if not words or any(word in path.stem for word in words)]


def run_tests(path: Path, which: str, variables: dict[str, str], folder: Path, until_s: float) -> Outcome:
    """One file's tests; `which`: as pytest's `-m`."""
    outcome = Outcome(str(path.relative_to(ROOT)) + (" (alone)" if which == "alone" else ""))
    begin_s = time.monotonic()
    if begin_s > until_s:
        outcome.cut.append("not begun")
        return outcome
    name = f"{path.parent.name}-{path.stem}-{which.replace(' ', '-')}"
    told, log = folder / f"{name}.json", folder / f"{name}.log"
    told.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(HERE / "pytest.ini"), f"--confcutdir={path.parent}"]
    command += ["-p", "outcomes", "-m", which, str(path)]
    own = {"TANDEM_GPU_OUTCOMES": str(told), "OMP_NUM_THREADS": "2"}  # others compute references beside it
    problem = run(command, variables | own, log, until_s - begin_s)
    outcome.seconds = time.monotonic() - begin_s
    count_tests(read_lines(told), problem, outcome)
    if problem is not None and not outcome.failures and not outcome.cut:
        outcome.failures.append(f"{problem}: {last_lines(log)}")
    return outcome


def count_tests(told: Sequence[dict[str, Any]], problem: str | None, outcome: Outcome) -> None:
    """What `outcomes` wrote of a file's tests, all of them or those before `problem`."""
    ended: dict[str, str] = {}
    for entry in told:
        if "outcome" in entry:
            name = entry["test"].rpartition("::")[2]
            ended[entry["test"]] = entry["outcome"]
            if entry["outcome"] == "failed":
                outcome.failures.append(f"{name}: {entry['message']}")
    outcome.passed = sum(came == "passed" for came in ended.values())
    outcome.skipped = sum(came == "skipped" for came in ended.values())
    collected = [name for entry in told for name in entry.get("collected", ())]
    begun = [entry["begun"] for entry in told if "begun" in entry]
    left = [name.rpartition("::")[2] for name in collected if name not in ended]
    if problem is None:
        return
    at = f", in {begun[-1].rpartition('::')[2]}" if begun and begun[-1] not in ended else ""
    rest = f"{len(left)} of {len(collected)} tests have not ended"
    if problem.startswith(NOT_DONE):
        outcome.cut.append(f"{problem}{at}: {rest if told else 'its tests have not been collected'}")
    elif at:
        outcome.failures.append(f"{problem}{at}; {rest}")


def tests(options: argparse.Namespace, variables: dict[str, str]) -> Iterator[Outcome]:
    """All files, several at a time, then what wants the device alone; as they end."""
    begin_s, seconds = time.monotonic(), 60 * options.test_minutes
    together_s = begin_s + TOGETHER_SHARE * seconds
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    paths = test_files(options.only)
    with contextlib.ExitStack() as beside:
        if not options.only:
            beside.enter_context(compiling(COMPILES, variables, logs / "rivals.log", together_s))
        with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
            given = (variables, logs, together_s)
            under_way = [pool.submit(run_tests, path, "not alone", *given) for path in paths]
            for done in concurrent.futures.as_completed(under_way):
                yield printed(done.result())
    for path in paths:
        if path.parent == ROOT / WHOLE and "mark.alone" in path.read_text():
            yield printed(run_tests(path, "alone", variables, logs, begin_s + seconds))


@contextlib.contextmanager
def compiling(program: Path, variables: dict[str, str], log: Path, until_s: float) -> Iterator[None]:
    """Runs a program beside what is within, on what that leaves of the processors; waits for it, until a time."""
    command = ["nice", "-n", "19", sys.executable, str(program)]
    thread = threading.Thread(
        target=lambda: run(command, variables | COMPILING, log, until_s - time.monotonic()), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if told := last_lines(log):
        print(f"{program.stem}:\n{told}", flush=True)


def printed(outcome: Outcome) -> Outcome:
    """Told at once."""
    print(f"{outcome.name}: {outcome.passed} passed, {outcome.skipped} skipped, {outcome.seconds:.0f} s", flush=True)
    for kind, lines in (("FAILED", outcome.failures), ("CUT", outcome.cut)):
        for line in lines:
            print(f"  {kind} {line}", flush=True)
    return outcome


def bench_names(folder: Path, words: Sequence[str]) -> list[str]:
    """Of files of benchmarks, in the order in which they run."""
    names = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    order = [*WEIGHTS, *(name for name in names if name not in WEIGHTS)]
    return [name for name in order if name in names and (not words or any(word in name for word in words))]


def bench(options: argparse.Namespace, variables: dict[str, str]) -> Iterator[Outcome]:
    """All files, one after another, each with its share of what time is left; as they end."""
    until_s = time.monotonic() + 60 * options.bench_minutes
    names = bench_names(options.folder, options.only)
    lines, bounds = options.out / "lines.json", options.out / "bounds.json"
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lines.unlink(missing_ok=True)
    bounds.unlink(missing_ok=True)
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
        outcome.cut = [line["cut"] for line in mine if "cut" in line]
        if problem is not None and problem.startswith(NOT_DONE):
            outcome.cut.append(f"{problem}: {last_lines(log)}")
        elif problem is not None and not outcome.failures:
            outcome.failures.append(f"{problem}: {last_lines(log)}")
        print(log.read_text(errors="replace"), flush=True)
        yield outcome


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What benchmarks wrote; a last line that was cut off by a timeout is passed over."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write_json(path: Path, outcomes: Sequence[Outcome]) -> None:
    path.write_text(json.dumps({"outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")


def markdown(head: str, tested: Sequence[Outcome], measured: Sequence[Outcome], lines: Sequence[dict[str, Any]]) -> str:
    """Tables for people."""
    parts = [head]
    if tested:
        rows = [
            (o.name, str(o.passed), str(o.skipped), str(len(o.failures)), "yes" if o.cut else "", f"{o.seconds:.0f}")
            for o in tested
        ]
        parts += ["## Tests", *table(("file", "passed", "skipped", "failed", "cut", "seconds"), rows)]
    titles = list(dict.fromkeys((line["file"], line["title"]) for line in lines if "cells" in line))
    for name, title in titles:
        mine = [line for line in lines if line["file"] == name and line.get("title") == title]
        parts += [f"## {title}", *table(mine[0]["heads"], [line["cells"] for line in mine])]
    told = (*tested, *measured)
    for title, entries in (
        ("## What failed", [f"- {o.name}: {failure}" for o in told for failure in o.failures]),
        ("## What was cut for want of time", [f"- {o.name}: {cut}" for o in told for cut in o.cut]),
    ):
        parts += [title, *entries] if entries else []
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
    parser.add_argument("--test-minutes", type=float, default=TEST_MINUTES, help="end all tests after this long")
    parser.add_argument("--bench-minutes", type=float, default=BENCH_MINUTES, help="measure nothing after this long")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="files of tests at a time")
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    command = " ".join(["tests/gpu/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    report = options.out / f"results-{'-'.join(options.what)}.md"
    tested: list[Outcome] = []
    measured: list[Outcome] = []
    with tempfile.TemporaryDirectory() as link:
        (Path(link) / "tandem").symlink_to(ROOT)
        variables = environment(Path(link))
        machine = head(variables, command)

        def tell() -> None:
            told = markdown(machine, tested, measured, read_lines(options.out / "lines.json") if measured else ())
            report.write_text(told)

        tell()
        for what, outcomes, begin in (("tests", tested, tests), ("bench", measured, bench)):
            for outcome in begin(options, variables) if what in options.what else ():
                outcomes.append(outcome)
                outcomes.sort(key=lambda one: one.name if what == "tests" else "")
                write_json(options.out / f"{what}.json", outcomes)
                tell()
    print(f"\n{report.read_text()}\n{options.out}")
    return 1 if any(outcome.failures or outcome.cut for outcome in (*tested, *measured)) else 0


if __name__ == "__main__":
    sys.exit(main())
