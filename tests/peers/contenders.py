"""Who is compared: engine by engine and form by form, each a process of its own that `run` talks to line by line."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_runner import Setup
from peer_venvs import PeerUnavailable, PeerVenv

HERE = Path(__file__).parent
LOAD_TIMEOUT_S = 900.0
"""Ours compiles its kernels where the cache has none of this version, vLLM its graphs."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine in one form."""

    engine: str
    """`tandem`, `vllm`, `llama` or `transformers`."""
    form: str
    against: str
    """The form of ours that its ratio is taken to."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{'llama.cpp' if self.engine == 'llama' else self.engine} {self.form}"


CONTENDERS = (
    Contender("tandem", "bf16", "bf16"),
    Contender("tandem", "w8a8", "w8a8"),
    Contender("vllm", "bf16", "bf16"),
    Contender("vllm", "fp32", "bf16"),
    Contender("vllm", "fp32-compiled", "bf16"),
    Contender("vllm", "w8a8", "w8a8"),
    Contender("llama", "bf16", "bf16"),
    Contender("llama", "q8_0", "w8a8"),
    Contender("llama", "q4_0", "w8a8"),
    Contender("transformers", "bf16", "bf16"),
    Contender("transformers", "fp32", "bf16"),
)


def environment(contender: Contender, venv: PeerVenv | None, cores: Sequence[int]) -> dict[str, str]:
    """What the process gets: one thread for each core, and what gives vLLM its best (its own OpenMP, bound threads)."""
    found = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    found |= {name: str(len(cores)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    found |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if contender.engine == "vllm" and venv is not None:
        found |= vllm_environment(venv, cores)
    return found


def vllm_environment(venv: PeerVenv, cores: Sequence[int]) -> dict[str, str]:
    """vLLM's own advice for a CPU: Intel's OpenMP preloaded, its threads bound to cores."""
    openmp = venv.folder / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_NO_USAGE_STATS": "1", **preload}


class Running:
    """One contender's process. Raises PeerUnavailable where it does not load, dies or does not answer."""

    def __init__(self, contender: Contender, setup: Setup, venv: PeerVenv | None, log: Path) -> None:
        self.contender = contender
        python = Path(sys.executable) if venv is None else venv.python
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), str(HERE / f"run_{contender.engine}.py"), json.dumps(asdict(setup))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(contender, venv, setup.cores),
                preexec_fn=lambda: os.sched_setaffinity(0, setup.cores),
                start_new_session=True,
            )
        started = time.monotonic()
        try:
            self.ready = self._answer(LOAD_TIMEOUT_S)
        except BaseException:
            self.close(at_once=True)
            raise
        self.ready["process_ready_s"] = time.monotonic() - started

    def measure(self, *, batch: int, prompt: int, steps: int, seed: int, limit_s: float) -> dict[str, Any]:
        """One measurement; see `peer_runner.measure`. A single step may overrun `limit_s`, but not threefold."""
        assert self._process.stdin is not None
        question = {"batch": batch, "prompt": prompt, "steps": steps, "seed": seed, "limit_s": limit_s}
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerUnavailable(f"{self.contender.name}: {error.strerror}; {self._last_line()}") from None
        return self._answer(3 * limit_s)

    def close(self, *, at_once: bool = False) -> None:
        """Ends the process, which has ten seconds for it."""
        if at_once:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                self._process.kill()
                raise PeerUnavailable(f"{self.contender.name}: no answer within {timeout_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerUnavailable(f"{self.contender.name}: ended; {self._last_line()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer and "rss_bytes" not in answer:
            raise PeerUnavailable(f"{self.contender.name}: {answer['error']}")
        return answer

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"
