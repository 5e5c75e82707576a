"""The prompts of a benchmark run: real ones from files (humaneval, mt_bench, gsm8k) or the package, or random tokens.

A prompt is text, or token ids where its exact length matters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prompts import PROMPTS
from .text_file import numbered_lines, parse_json

_FIELDS = ("prompt", "question", "text", "instruction", "input")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request to send."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    ignore_eos: bool = False


def prompt_requests(
    count: int, max_tokens: int, path: str | Path | None, seed: int, *, ignore_eos: bool = False
) -> tuple[BenchRequest, ...]:
    """`count` real prompts in an order drawn by `seed`, repeated where the file (None: the package) has fewer."""
    prompts = list(PROMPTS if path is None else read_prompts(path))
    random.Random(seed).shuffle(prompts)
    return tuple(
        BenchRequest(prompt=prompts[index % len(prompts)], max_tokens=max_tokens, ignore_eos=ignore_eos)
        for index in range(count)
    )


def random_requests(
    count: int,
    input_tokens: int,
    output_tokens: int,
    vocabulary: Sequence[int],
    seed: int,
    range_ratio: float = 0.0,
) -> tuple[BenchRequest, ...]:
    """`count` prompts of `input_tokens` ids drawn from `vocabulary`, to be answered with `output_tokens`.

    Both lengths are drawn evenly from what is within `range_ratio` of them, as `vllm bench serve` has it.
    """
    for name, value in (("random_input_len", input_tokens), ("random_output_len", output_tokens)):
        if value < 1:
            raise ValueError(f"{name}: {value} is not allowed; allowed: at least 1")
    draw = random.Random(seed)

    def length(middle: int) -> int:
        low, high = math.floor(middle * (1 - range_ratio)), math.ceil(middle * (1 + range_ratio))
        return max(1, draw.randint(low, high))

    return tuple(
        BenchRequest(
            prompt=tuple(draw.choices(vocabulary, k=length(input_tokens))),
            max_tokens=length(output_tokens),
            ignore_eos=True,
        )
        for _ in range(count)
    )


def vocabulary_of(tokenize: Callable[[str], Sequence[int]]) -> tuple[int, ...]:
    """Ordinary token ids of whatever model is served: those of the package's prompts. `tokenize` asks the server."""
    found = {token for prompt in PROMPTS for token in tokenize(prompt)}
    return tuple(sorted(found))


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts of a .jsonl file (gzipped where it ends in .gz): `prompt`, `question`, `turns[0]`, or chat `messages`.

    Raises ValueError naming file and line.
    """
    prompts = tuple(_prompt(text, f"{path}:{number}") for number, text in numbered_lines(path))
    if not prompts:
        raise ValueError(f"dataset_path: {str(path)!r} has no prompts")
    return prompts


def _prompt(line: str, where: str) -> str:
    row = parse_json(line, where)
    found: Any = row if isinstance(row, str) else None
    if isinstance(row, dict):
        found = next((row[name] for name in _FIELDS if isinstance(row.get(name), str)), None)
        messages = row.get("messages")
        entries = messages if isinstance(messages, list) else []
        turns = row.get("turns") or [entry.get("content") for entry in entries if isinstance(entry, dict)]
        if found is None and isinstance(turns, list) and turns:
            found = turns[0]
    if not isinstance(found, str) or not found:
        raise ValueError(f"dataset_path: {where} has no prompt; allowed: one of {', '.join(_FIELDS)}, turns, messages")
    return found
