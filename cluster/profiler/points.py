"""What `tandem profile` measures: kinds of steps, and how they lie in KV memory. Pure.

A point is one step: decode rows of some context, or a chunk of a prompt behind what is cached, or both. Every decode
row and the prompt have KV of their own, `Places`, as long as any point wants it, and the token at a position of it is
always the same: so that a step may be repeated, and in any order, and finds the KV it expects.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..engine.plan import SampleSpec, StepPlan, StepRow
from ..types import SamplingParams

MAX_NUMBER = 2**20
MIN_POINTS = 6
"""With a prompt, and with decode rows: what a fit needs, and points to leave out of it."""
_GREEDY = SamplingParams(temperature=0.0)
_PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class Point:
    """`batch` decode rows of `context` tokens of KV each, and a chunk of `length` tokens behind `start` cached ones."""

    batch: int = 0
    context: int = 0
    length: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.context, self.length, self.start) < 0 or self.batch + self.length == 0:
            raise ValueError(f"point: {self} is not allowed; allowed: a step that computes a token")
        if bool(self.batch) != bool(self.context) or (self.length == 1 and self.start):
            raise ValueError(f"point: {self} is not allowed; allowed: rows with a context, chunks of 2 tokens and more")

    @property
    def name(self) -> str:
        """For people, and as a key: one for each point."""
        decode = f"decode {self.batch} x {self.context}" if self.batch else ""
        behind = f" behind {self.start}" if self.start else ""
        return " + ".join(part for part in (decode, f"prefill {self.length}{behind}" if self.length else "") if part)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What `StepCosts.step_time_s` takes: prompt tokens, squares, decode rows, context with their own tokens."""
        end = self.start + self.length
        return self.length, end * end - self.start * self.start, self.batch, self.batch * (self.context + 1)

    @property
    def longest(self) -> int:
        """Positions of its longest sequence."""
        return max(self.context + 1 if self.batch else 0, self.start + self.length)

    @property
    def tokens(self) -> int:
        """Computed by the step."""
        return self.batch + self.length


def point_of(sizes: tuple[int, int, int, int]) -> Point:
    """The point of these sizes (`Point.sizes`), all of whose rows have the same context. ValueError: there is none."""
    length, squares, batch, context = sizes
    start = (squares - length * length) // (2 * length) if length else 0
    found = Point(batch, context // batch - 1 if batch else 0, length, start)
    if found.sizes != sizes:
        raise ValueError(f"sizes: {sizes} are not those of a point; allowed: equal rows, a chunk behind a prefix")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which points. ValueError names a list that holds something else than numbers of its range."""

    lengths: tuple[int, ...] = (16, 64, 128, 256, 512)
    """Prompts in one step, alone and from their start."""
    starts: tuple[int, ...] = (512, 1536)
    """Cached tokens before a chunk of `chunk_lengths`."""
    chunk_lengths: tuple[int, ...] = (64, 256, 512)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (64, 512, 1024)
    mixed_batches: tuple[int, ...] = (4, 16)
    mixed_contexts: tuple[int, ...] = (256, 1024)
    mixed_lengths: tuple[int, ...] = (64, 256)

    def __post_init__(self) -> None:
        for name in self.__slots__:
            values = getattr(self, name)
            low = 2 if name in ("chunk_lengths", "mixed_lengths") else 1
            if len(set(values)) != len(values) or any(not low <= value <= MAX_NUMBER for value in values):
                allowed = f"different numbers from {low} to {MAX_NUMBER}"
                raise ValueError(f"{name}: {list(values)} is not allowed; allowed: {allowed}")

    def points(self) -> tuple[Point, ...]:
        """Every point, small ones first within their kind."""
        alone = [Point(length=length) for length in self.lengths]
        behind = [Point(length=length, start=start) for start in self.starts for length in self.chunk_lengths]
        decode = [Point(batch, context) for context in self.contexts for batch in self.batches]
        mixed = [
            Point(batch, context, length)
            for length in self.mixed_lengths
            for context in self.mixed_contexts
            for batch in self.mixed_batches
        ]
        return (*alone, *behind, *decode, *mixed)


def fitting(
    points: Sequence[Point], *, max_model_len: int, kv_tokens: int, block_size: int
) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """(points that the model's context and the KV memory have room for, names of the others): the largest are left out
    first.
    """
    kept = [point for point in points if point.longest <= max_model_len]
    kept.sort(key=lambda point: (point.batch * point.context + point.start + point.length, point.name))
    while kept and Places(kept, block_size).blocks * block_size > kv_tokens:
        kept.pop()
    fits = tuple(point for point in points if point in kept)
    return fits, tuple(point.name for point in points if point not in kept)


def check_enough(points: Iterable[Point], why: str = "") -> None:
    """ValueError where a fit would have too little to go by; `why` says what may have taken the others."""
    kept = list(points)
    for what, count in (
        ("a prompt", sum(point.length > 0 for point in kept)),
        ("decode rows", sum(point.batch > 0 for point in kept)),
    ):
        if count < MIN_POINTS:
            raise ValueError(
                f"points: {count} with {what} are too few; allowed: at least {MIN_POINTS}{'; ' if why else ''}{why}"
            )


class Places:
    """Where each sequence's KV lies, and its tokens; for all points together."""

    def __init__(self, points: Sequence[Point], block_size: int, *, vocab_size: int = 2, seed: int = 0) -> None:
        if not points:
            raise ValueError("points: none is left; allowed: lengths and contexts that the model and its KV hold")
        self._vocab_size, self._seed = vocab_size, seed
        self._tokens: dict[str, list[int]] = {}
        self._blocks: dict[str, range] = {}
        self.blocks = 0
        """All of them."""
        rows = max(point.batch for point in points)
        longest = [max(point.context + 1 for point in points if point.batch > row) for row in range(rows)]
        prompt = max(point.start + point.length for point in points)
        for name, positions in [(f"row {row}", longest[row]) for row in range(rows)] + [(_PROMPT, prompt)]:
            first, self.blocks = self.blocks, self.blocks + -(-positions // block_size)
            self._blocks[name] = range(first, self.blocks)
        self.block_size = block_size

    @property
    def sequences(self) -> list[tuple[range, list[int]]]:
        """(blocks, tokens of all their slots) of every sequence."""
        return [(blocks, self._tokens_of(name)) for name, blocks in self._blocks.items()]

    def plan(self, point: Point, plan_id: int) -> StepPlan:
        """The point's step."""
        rows = [self._row(f"row {row}", point.context, 1) for row in range(point.batch)]
        if point.length:
            rows.append(self._row(_PROMPT, point.start, point.length))
        return StepPlan(plan_id, tuple(rows))

    def _row(self, name: str, start: int, length: int) -> StepRow:
        tokens = tuple(self._tokens_of(name)[start : start + length])
        blocks = tuple(self._blocks[name][: -(-(start + length) // self.block_size)])
        return StepRow(name, start, tokens, blocks, SampleSpec(_GREEDY, 0, (), ()))

    def _tokens_of(self, name: str) -> list[int]:
        tokens = self._tokens.get(name)
        if tokens is None:
            draw = random.Random(f"{self._seed} {name}")
            slots = len(self._blocks[name]) * self.block_size
            tokens = self._tokens[name] = [draw.randrange(self._vocab_size) for _ in range(slots)]
        return tokens
