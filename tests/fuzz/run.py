"""The long run: `make fuzz`, or `python tests/fuzz/run.py [--seconds 60] [--engine atheris|random] [target …]`.

Each target has a process of its own, with a bound on memory and on the time of one input. With atheris installed (the
extra `fuzz`) inputs are guided by coverage, else drawn by mutation. A finding is printed with its traceback, its input
is kept in `--findings`, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INPUT_TIMEOUT_S = 10
MEMORY_BYTES = 4 * 2**30
"""Beyond what the process has when its target is loaded."""


def corpus(name: str) -> list[bytes]:
    """Findings of the past."""
    return [path.read_bytes() for path in sorted((HERE / "corpus" / name).glob("*"))]


class Trial:
    """Runs one target on one input; remembers the input that it was on."""

    def __init__(self, target: Any, findings: Path, name: str) -> None:
        self._target = target
        self._path = findings / f"{name}-{os.getpid()}"
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data = data
        signal.alarm(INPUT_TIMEOUT_S)
        try:
            self._target.run(data)
        except self._target.allowed:
            pass
        except BaseException:
            self._path.write_bytes(data)
            print(f"finding: {self._path}", file=sys.stderr)
            traceback.print_exc()
            os._exit(77)
        finally:
            signal.alarm(0)


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"one input took more than {INPUT_TIMEOUT_S} s")


def bound_memory() -> None:
    """MemoryError, and so a finding, instead of a machine that swaps."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def child(name: str, engine: str, seconds: float, seed: int, findings: Path) -> None:
    """One target in this process; prints how many inputs it was fed."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _too_slow)
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["tandem"], enable_loader_override=False):
            from targets import targets
        target = targets()[name]
        folder = findings / f"{name}-corpus"
        folder.mkdir(exist_ok=True)
        for index, data in enumerate([*target.seeds, *corpus(name)]):
            (folder / f"seed-{index}").write_bytes(data)
        arguments = [f"-max_total_time={max(int(seconds), 1)}", f"-seed={seed + 1}", "-print_final_stats=1"]
        limits = ["-max_len=16384", "-rss_limit_mb=0", "-timeout=60", "-verbosity=0"]
        atheris.Setup([sys.argv[0], str(folder), *arguments, *limits], Trial(target, findings, name))
        atheris.Fuzz()
        return
    from mutate import mutated
    from targets import targets

    target = targets()[name]
    bound_memory()
    trial, draw = Trial(target, findings, name), random.Random(f"{name}/{seed}")
    seeds = [*target.seeds, *corpus(name)]
    end_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        trial(mutated(draw, seeds))
        count += 1
    print(f"stat::number_of_executed_units: {count}", file=sys.stderr)


def fuzz(name: str, options: argparse.Namespace) -> tuple[int, bool]:
    """Inputs tried and whether none was a finding."""
    command = [sys.executable, __file__, "--child", name, "--engine", options.engine, "--seconds", str(options.seconds)]
    command += ["--seed", str(options.seed), "--findings", str(options.findings)]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="tandem-fuzz-", dir=memory if memory.is_dir() else None) as scratch:
        environment = {**os.environ, "TANDEM_FUZZ_SCRATCH": scratch}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.seconds + 300, check=False, env=environment
        )
    count = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    if done.returncode:
        print(done.stderr[-4000:])
    return int(count[1]) if count else 0, done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", "60")), help="each")
    has_atheris = importlib.util.find_spec("atheris") is not None
    parser.add_argument("--engine", choices=("atheris", "random"), default="atheris" if has_atheris else "random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path(".fuzz"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.findings.mkdir(parents=True, exist_ok=True)
    if options.child:
        child(options.child, options.engine, options.seconds, options.seed, options.findings)
        return 0
    from targets import targets

    known = list(targets())
    if unknown := set(options.targets) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    good = True
    for name in options.targets or known:
        count, clean = fuzz(name, options)
        good &= clean
        print(f"{name:<20} {count:>10} inputs, {options.engine}{'' if clean else '  FINDING'}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
