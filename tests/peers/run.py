"""Ours beside what a user would pick instead: the same grid on each engine, taking turns, in one run.

    make peers                                            # all of them, one and two threads
    .venv/bin/python tests/peers/run.py --only tandem,vllm --threads 2 --rounds 5 --save-result peers.json
    .venv/bin/python tests/peers/run.py … --save-result peers.json --resume      # goes on after an interruption

Environments and converted models are made outside the repository the first time (`peer_venvs`, `peer_models`); every
engine runs in a process of its own on the same cores with as many threads, loads once, and then they are measured cell
by cell, one after the other, in as many rounds as asked: what disturbs the machine disturbs all of them. Prompts are
random token ids, new for each measurement. Tables show medians over rounds, with the lowest and highest. A peer that
cannot be had, and a cell that takes too long, stand in the output with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # a script of its own, not part of a package

import peer_models
from contenders import CONTENDERS, HERE, LOAD_TIMEOUT_S, Contender, Running
from peer_report import Cell, Results, render
from peer_runner import Setup
from peer_venvs import PeerUnavailable, PeerVenv, default_root, prepare

GRID = (Cell(1, 64), Cell(8, 64), Cell(32, 64), Cell(1, 1024), Cell(8, 1024))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; 0 if ours was measured."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    options = parse(argv)
    root: Path = options.root
    chosen = [c for c in CONTENDERS if not options.only or c.engine in options.only or c.name in options.only]
    results = kept(options)
    deadline = time.monotonic() + options.minutes * 60
    for threads in options.threads:
        cores = tuple(sorted(os.sched_getaffinity(0)))[:threads]
        if len(cores) < threads:
            print(f"{threads} threads: only {len(cores)} cores are allowed here")
            continue
        running: list[Running] = []
        try:
            start(
                running,
                [c for c in chosen if missing(c.name, options, threads, results)],
                options,
                root,
                cores,
                results,
            )
            alternate(running, options, threads, results, deadline)
        finally:
            for one in running:
                one.close()
        print(render(results, threads), flush=True)
    if options.save_result:
        save(options, results)
        print(f"saved {options.save_result}")
    return 0 if any(name.startswith("tandem") for name, *_ in results.times) else 1


def kept(options: argparse.Namespace) -> Results:
    """What an interrupted run has measured, with `--resume`; else nothing."""
    if not (options.resume and options.save_result and Path(options.save_result).exists()):
        return Results(steps=options.steps)
    found = Results.from_json(json.loads(Path(options.save_result).read_text(encoding="utf-8")))
    if found.steps != options.steps:
        raise SystemExit(f"--steps: {options.steps} is not allowed; allowed with --resume: {found.steps}, as before")
    return found


def save(options: argparse.Namespace, results: Results) -> None:
    """Writes all that was measured so far, whole or not at all."""
    facts = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "argv": sys.argv[1:]}
    target = Path(options.save_result)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(json.dumps(facts | results.as_json(), indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


def missing(name: str, options: argparse.Namespace, threads: int, results: Results) -> bool:
    """Whether a contender has a cell left to measure in some round."""
    return any(
        is_missing(name, cell, turn, options, threads, results)
        for cell in options.grid
        for turn in range(options.rounds)
    )


def is_missing(name: str, cell: Cell, turn: int, options: argparse.Namespace, threads: int, results: Results) -> bool:
    """Whether a cell is to be measured in a round: not left out, not slow, not measured before an interruption."""
    if results.is_skipped(name, threads, cell) or (results.took_s(name, threads, cell) or 0.0) > options.repeat_seconds:
        return False
    return len(results.times.get((name, threads, cell), [])) <= turn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="an alias or a GGUF file, of a llama model")
    parser.add_argument("--only", type=names, default=(), help="engines or contenders, e.g. tandem,'vllm fp32'")
    parser.add_argument("--threads", type=numbers, default=(1, 2))
    parser.add_argument("--grid", type=grid, default=GRID, help="batch x prompt, e.g. 1x64,8x1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="decode steps of a measurement")
    parser.add_argument("--step-tokens", type=int, default=2048, help="token budget of a step, for all that have one")
    parser.add_argument("--cell-seconds", type=float, default=100.0, help="what takes longer is left out, and named")
    parser.add_argument("--repeat-seconds", type=float, default=25.0, help="what takes longer is measured once")
    parser.add_argument("--minutes", type=float, default=60.0, help="no new round begins after this")
    parser.add_argument("--root", type=Path, default=default_root(), help="where environments and models are kept")
    parser.add_argument("--save-result", metavar="FILE", help="written after every cell")
    parser.add_argument("--resume", action="store_true", help="what the saved result has is not measured again")
    return parser.parse_args(argv)


def names(text: str) -> tuple[str, ...]:
    """Comma-separated, each an engine or a contender."""
    found = tuple(part.strip() for part in text.split(","))
    allowed = {c.engine for c in CONTENDERS} | {c.name for c in CONTENDERS}
    for name in found:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} is not allowed; allowed: {', '.join(sorted(allowed))}")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Comma-separated counts of at least 1."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: counts of at least 1")
    return found


def grid(text: str) -> tuple[Cell, ...]:
    """`BxP`, comma-separated."""
    return tuple(Cell(*map(int, part.split("x"))) for part in text.split(","))


def start(
    running: list[Running],
    chosen: Sequence[Contender],
    options: argparse.Namespace,
    root: Path,
    cores: tuple[int, ...],
    results: Results,
) -> None:
    """Adds the processes of all that can run; the others' reasons go to `results`."""
    for contender in chosen:
        print(f"loading {contender.name}, {len(cores)} threads", flush=True)
        try:
            venv = None if contender.engine == "tandem" else prepare(contender.engine, root)
            setup = Setup(
                model=model_for(contender, options.model, root, venv),
                form=contender.form,
                cores=cores,
                max_seqs=max(cell.batch for cell in options.grid),
                max_len=max(cell.prompt + cell.batch for cell in options.grid) + options.steps + 64,
                step_tokens=options.step_tokens,
            )
            log = root / f"{contender.name.replace(' ', '-')}.log"
            one = Running(contender, setup, venv, log)
            running.append(one)
            # What an engine compiles or allocates at its first steps is not what it does all day.
            one.measure(batch=1, prompt=64, steps=2, seed=0, limit_s=LOAD_TIMEOUT_S)
        except (PeerUnavailable, ValueError) as error:
            print(f"  cannot run: {error}", flush=True)
            results.unavailable(contender.name, len(cores), str(error))
            continue
        results.ready(contender.name, len(cores), one.ready)


def model_for(contender: Contender, model: str, root: Path, venv: PeerVenv | None) -> str:
    """The file or folder that a contender reads, made where it is not there yet."""
    folder = root / "models"
    if contender.engine != "llama":
        # Ours quantizes by itself from the same bfloat16 weights.
        return str(peer_models.folder(model, folder, int8=contender.engine == "vllm" and contender.form == "w8a8"))
    assert venv is not None
    target = folder / f"{Path(model).stem}.{contender.form}.gguf"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        source = str(peer_models.gguf_file(model))
        partial = target.with_suffix(".partial")
        command = [str(venv.python), str(HERE / "quantize_llama.py"), source, str(partial), contender.form]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise PeerUnavailable(f"{contender.name}: {done.stderr.strip().splitlines()[-1:]}")
        partial.rename(target)
    return str(target)


def alternate(
    running: list[Running], options: argparse.Namespace, threads: int, results: Results, deadline: float
) -> None:
    """Round by round and cell by cell, all contenders in turn."""
    dead = {one.contender.name for one in running if (one.contender.name, threads) in results.reasons}
    for turn in range(options.rounds):
        for number, cell in enumerate(options.grid):
            for one in running:
                name = one.contender.name
                if name in dead or not is_missing(name, cell, turn, options, threads, results):
                    continue
                if time.monotonic() > deadline:
                    print(f"  {options.minutes:g} minutes are over: round {turn + 1} stays incomplete", flush=True)
                    return
                slow = results.forecast_s(name, threads, cell)
                if slow is not None and slow > options.cell_seconds:
                    results.skip(name, threads, cell, f"would take about {slow:.0f} s")
                    continue
                seed = 1000 * turn + 10 * number + threads  # the same prompts for all, never the same twice
                print(f"  round {turn + 1}  {cell.text:>9}  {name}", flush=True)
                try:
                    answer = one.measure(
                        batch=cell.batch,
                        prompt=cell.prompt,
                        steps=options.steps,
                        seed=seed,
                        limit_s=options.cell_seconds,
                    )
                except PeerUnavailable as error:
                    dead.add(name)
                    results.unavailable(name, threads, str(error))
                    continue
                store(results, name, threads, cell, answer)
                if options.save_result:
                    save(options, results)


def store(results: Results, name: str, threads: int, cell: Cell, answer: dict[str, Any]) -> None:
    """An answer is a measurement, or why there is none."""
    if "error" in answer:
        results.skip(name, threads, cell, answer["error"])
    else:
        results.add(name, threads, cell, answer)


if __name__ == "__main__":
    sys.exit(main())
