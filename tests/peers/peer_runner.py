"""The inner end of a comparison: one engine in a process of its own, told by lines of JSON what to run.

Runs inside each peer's environment, so it needs nothing but the standard library. A runner calls `serve` with how to
load its engine. Arguments: one JSON object (`Setup`). Then, line by line on standard input, `{"batch", "prompt",
"steps", "seed", "limit_s"}`; the answers go to the standard output that the process was started with, and whatever a
library prints goes to standard error.

A measurement: `batch` random prompts of `prompt` tokens at once; `prefill` lasts until each has its first token;
then, after one decode step that does not count, `steps` steps in which each sequence gets one token.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FIRST_TOKEN_ID = 100
"""Ids below may be control tokens."""


@dataclass(frozen=True)
class Setup:
    """What to load, and within what."""

    model: str
    """The folder or file that this engine reads."""
    form: str
    """`bf16`, `fp32`, `w8a8`, `q8_0`, …, for the runner."""
    cores: tuple[int, ...]
    max_seqs: int
    max_len: int
    """Positions of the longest sequence."""
    step_tokens: int
    """Token budget of a step, where the engine has one."""


class Engine(ABC):
    """One engine with a model loaded; one set of sequences at a time."""

    vocab_size: int
    versions: dict[str, str]

    @abstractmethod
    def begin(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Takes prompts; computes nothing yet. Not timed."""

    @abstractmethod
    def step(self) -> int:
        """One step of the engine, as its own loop would do it, sampling included; how many sequences have a token."""

    @abstractmethod
    def end(self) -> None:
        """Drops the sequences. Not timed."""


def serve(load: Callable[[Setup], Engine]) -> None:
    """Loads the engine and answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    setup = Setup(**json.loads(sys.argv[1]))
    start_s = time.perf_counter()
    try:
        engine = load(setup)
    except Exception as error:  # whatever a peer raises is this peer's reason, and the others go on
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}) + "\n")
        raise
    ready = {"ready_s": time.perf_counter() - start_s, "rss_bytes": resident_bytes(), "versions": engine.versions}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        try:
            answer = measure(engine, **json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(repr(error), file=sys.stderr, flush=True)
        answers.write(json.dumps({**answer, "rss_bytes": resident_bytes()}) + "\n")


def measure(engine: Engine, *, batch: int, prompt: int, steps: int, seed: int, limit_s: float) -> dict[str, Any]:
    """One measurement; seconds of wall and of processor time. Stops between two steps when `limit_s` are over."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(FIRST_TOKEN_ID, engine.vocab_size) for _ in range(prompt)] for _ in range(batch)]
    until = time.perf_counter() + limit_s
    found: dict[str, Any] = {"decode_s": [], "decode_cpu_s": []}
    engine.begin(prompts, max_tokens=batch + steps + 64)
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        while engine.step() < batch:
            if time.perf_counter() > until:
                return {"error": f"prefill was not over after {limit_s:g} s"}
        found |= {"prefill_s": time.perf_counter() - wall, "prefill_cpu_s": time.process_time() - cpu}
        engine.step()
        for _ in range(steps):
            if time.perf_counter() > until and found["decode_s"]:
                break
            wall, cpu = time.perf_counter(), time.process_time()
            engine.step()
            found["decode_s"].append(time.perf_counter() - wall)
            found["decode_cpu_s"].append(time.process_time() - cpu)
        return found
    finally:
        engine.end()


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16: where it does not, what stays unquantized beside int8 is better off
    in float32 (vLLM's bfloat16 linears fall back to torch's product, token by token).
    """
    with open("/proc/cpuinfo", encoding="utf-8") as text:
        flags = next((line for line in text if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resident_bytes() -> int:
    """Of this process."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
