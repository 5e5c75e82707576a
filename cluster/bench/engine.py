"""One engine alone, without network or scheduler: step times over grids, beside what the machine could do at best.

Decode rows: `batch` sequences, each with `context` tokens of KV, one token each, one step. Prefill rows: one prompt in
chunks; its time is that of all its steps. Mixed rows: a decode batch and one chunk in one step. KV of contexts is not
computed but written (random values: zeros would flatter no one, but not a number could hide anywhere).

Each row says which share of two bounds it reaches, both measured in the same run (`engine_bounds`), from what its steps
must read and compute at least (`engine_cost`): memory, bytes / time / read rate; arithmetic, time that the operations
take at the product rates / time. In W8A8 linears count at the int8 rate, attention and the products that make q, k and
v at the float rate.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from ..config import ConfigError, EngineConfig
from ..engine.devices.base import Device
from ..engine.plan import SampleSpec, StepPlan, StepRow
from ..models.config import ModelConfig
from ..types import SamplingParams
from ..workload.chrome_trace import TraceEvent
from .engine_bounds import Bounds, measure_bounds
from .engine_bounds_gpu import measure_gpu_bounds
from .engine_cost import RowShape, StepCost, step_cost, step_weight_bytes
from .engine_step import fill_kv, timed_step

MAX_TRACE_EVENTS = 100_000
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBenchOptions:
    """The grids, and how long to look."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (64, 1024)
    prompt_lens: tuple[int, ...] = (64, 256, 1024)
    chunk_sizes: tuple[int, ...] = (512,)
    mixed: bool = False
    """Also a chunk of each size beside each decode batch."""
    warmups: int = 2
    repeats: int = 10
    """Measurements of a row; at least three even where `row_seconds` are over."""
    row_seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "contexts", "prompt_lens", "chunk_sizes"):
            values = getattr(self, name)
            if any(not 1 <= value <= 2**20 for value in values):
                raise ValueError(f"{name}: {list(values)} is not allowed; allowed: numbers from 1 to {2**20}")
        for name, low in (("warmups", 0), ("repeats", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; allowed: at least {low}")
        if not 0 < self.row_seconds <= 3600:
            raise ValueError(f"row_seconds: {self.row_seconds} is not allowed; allowed: above 0 to 3600")


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the result: a decode batch, and a prompt that is computed beside it or alone in chunks."""

    batch: int = 0
    context: int = 0
    prompt: int = 0
    chunk: int = 0

    @property
    def kind(self) -> str:
        """`decode`, `prefill` or `mixed`."""
        if not self.prompt:
            return "decode"
        return "mixed" if self.batch else "prefill"

    @property
    def longest(self) -> int:
        """Positions that its longest sequence takes."""
        return max(self.context + 1 if self.batch else 0, self.prompt)

    @property
    def tokens(self) -> int:
        """Tokens computed by one measurement."""
        return self.batch + self.prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """Times of one row: `times_s` of the measurements, a decode step or a whole prompt each."""

    cell: Cell
    steps: int
    """Steps of one measurement."""
    times_s: tuple[float, ...]
    cost: StepCost
    memory_share: float = 0.0
    arithmetic_share: float = 0.0

    @property
    def median_s(self) -> float:
        """Of the measurements."""
        return statistics.median(self.times_s)

    @property
    def tokens_per_s(self) -> float:
        """At the median."""
        return self.cell.tokens / self.median_s

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in milliseconds."""
        return {
            "kind": self.cell.kind,
            **asdict(self.cell),
            "steps": self.steps,
            "repeats": len(self.times_s),
            "median_ms": self.median_s * 1e3,
            "min_ms": min(self.times_s) * 1e3,
            "max_ms": max(self.times_s) * 1e3,
            "tokens_per_s": self.tokens_per_s,
            "memory_share": self.memory_share,
            "arithmetic_share": self.arithmetic_share,
            **asdict(self.cost),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBenchResult:
    """All rows, what bounded them, and the steps for a trace."""

    facts: dict[str, Any]
    bounds: Bounds
    rows: tuple[CellResult, ...]
    events: tuple[TraceEvent, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """For `--save-result`."""
        rows = [row.as_json() for row in self.rows]
        return {"facts": self.facts, "bounds_per_s": asdict(self.bounds), "rows": rows}


def cells(options: EngineBenchOptions) -> tuple[Cell, ...]:
    """The rows that the options ask for, in the order in which they run; prompts that one chunk holds come once."""
    found = [Cell(batch, context) for context in options.contexts for batch in options.batch_sizes]
    for prompt in options.prompt_lens:
        chunks = dict.fromkeys(min(chunk, prompt) for chunk in options.chunk_sizes)
        found += [Cell(prompt=prompt, chunk=chunk) for chunk in chunks]
    if options.mixed:
        pairs = [(context, batch) for context in options.contexts for batch in options.batch_sizes]
        found += [Cell(batch, context, chunk, chunk) for context, batch in pairs for chunk in options.chunk_sizes]
    if not found:
        raise ValueError("batch_sizes: no row is left to measure; allowed: decode batches and contexts, or prompt_lens")
    return tuple(found)


def blocks_needed(found: Sequence[Cell], block_size: int) -> int:
    """KV blocks of the largest row."""
    return max(cell.batch * -(-(cell.context + 1) // block_size) + -(-cell.prompt // block_size) for cell in found)


def with_room(config: EngineConfig, found: Sequence[Cell], block_bytes: int) -> EngineConfig:
    """The engine that holds the largest row and computes the largest step, and no more."""
    return replace(
        config,
        kv_cache_bytes=blocks_needed(found, config.block_size) * block_bytes,
        max_running=max(cell.batch + (cell.prompt > 0) for cell in found),
        max_batched_tokens=max(cell.batch + cell.chunk for cell in found),
    )


def check_device(config: EngineConfig, model: ModelConfig, found: Sequence[Cell]) -> None:
    """ConfigError where there is nothing to measure, or to measure by: a device that computes nothing, a context beyond
    the model's, weights that are not counted.
    """
    if config.device == "paced":
        raise ConfigError("device", config.device, "cpu or cuda: the paced device computes nothing")
    if config.quantization == "w4a16":
        raise ConfigError("quantization", "w4a16", "w8a8 or none: what w4a16 reads at least is not counted here")
    longest = max(cell.longest for cell in found)
    limit = model.max_model_len if config.max_model_len is None else config.max_model_len
    if longest > limit:
        raise ConfigError("context", longest, f"positions up to the model's context of {limit}")


class Steps:
    """Builds the steps of rows and runs them on one device, one at a time."""

    def __init__(self, device: Device, block_size: int, seed: int) -> None:
        self.events: list[TraceEvent] = []
        self._device = device
        self._block_size = block_size
        self._random = random.Random(seed)
        self._plan_id = 0

    def measure(self, cell: Cell) -> tuple[float, int]:
        """Runs the cell's step or, for a prompt, all its steps; (seconds, steps)."""
        rows, block = [], 0
        for index in range(cell.batch):
            blocks = range(block, block := block + -(-(cell.context + 1) // self._block_size))
            rows.append(self._row(f"d{index}", cell.context, 1, blocks, sample=True))
        if not cell.prompt:
            return self._run(rows, cell), 1
        blocks = range(block, block + -(-cell.prompt // self._block_size))
        total_s, starts = 0.0, range(0, cell.prompt, cell.chunk)
        for start in starts:
            length = min(cell.chunk, cell.prompt - start)
            last = start + length == cell.prompt
            total_s += self._run([*rows, self._row("p", start, length, blocks, sample=last)], cell)
        return total_s, len(starts)

    def _row(self, name: str, start: int, length: int, blocks: Sequence[int], *, sample: bool) -> StepRow:
        tokens = tuple(self._random.randrange(self._device.vocab_size) for _ in range(length))
        spec = SampleSpec(_GREEDY, output_index=0, prompt_token_ids=(), output_token_ids=())
        return StepRow(name, start, tokens, tuple(blocks), spec if sample else None)

    def _run(self, rows: Sequence[StepRow], cell: Cell) -> float:
        self._plan_id += 1
        plan = StepPlan(self._plan_id, tuple(rows))
        start_s, end_s = timed_step(self._device, plan, cell)
        if len(self.events) < MAX_TRACE_EVENTS:
            self.events.append(
                TraceEvent(
                    name=f"{cell.kind} {plan.num_tokens}",
                    start_s=start_s,
                    end_s=end_s,
                    process="engine",
                    track="steps",
                    args={**asdict(cell), "tokens": plan.num_tokens},
                )
            )
        return end_s - start_s


def cell_cost(cell: Cell, model: ModelConfig, *, weight_bytes: int, kv_token_bytes: int) -> StepCost:
    """What one measurement of a cell reads and computes at least, over all its steps."""
    decode = [RowShape(cell.context, 1, True)] * cell.batch
    steps: list[list[RowShape]] = [decode]
    if cell.prompt:
        starts = range(0, cell.prompt, cell.chunk)
        ends = [min(start + cell.chunk, cell.prompt) for start in starts]
        steps = [
            [*decode, RowShape(start, end - start, end == cell.prompt)] for start, end in zip(starts, ends, strict=True)
        ]
    costs = [step_cost(model, rows, weight_bytes=weight_bytes, kv_token_bytes=kv_token_bytes) for rows in steps]
    return sum(costs, StepCost())


def shares(cost: StepCost, time_s: float, bounds: Bounds, *, int8: bool) -> tuple[float, float]:
    """(memory, arithmetic): what share of `time_s` the bounds alone would take."""
    linear_rate = bounds.int8_ops if int8 and bounds.int8_ops else bounds.float_flops()
    float_flops = cost.qkv_flops + cost.attention_flops
    arithmetic_s = cost.linear_flops / linear_rate + float_flops / bounds.float_flops()
    return cost.read_bytes / bounds.read_bytes / time_s, arithmetic_s / time_s


def run_engine_bench(
    config: EngineConfig,
    model: ModelConfig,
    options: EngineBenchOptions,
    device: Device,
    on_row: Callable[[CellResult], None] = lambda row: None,
    facts: dict[str, Any] | None = None,
    bounds_of: Callable[[], Bounds] | None = None,
) -> EngineBenchResult:
    """Measures all rows of `options` on `device`, which was built from `config` with room for `blocks_needed`.

    The bounds, of `bounds_of` or the config's device, are measured before and after the rows, and the higher ones hold.
    `on_row` is called with each row as it
    is there, its shares by the bounds of before. Raises ConfigError, ValueError.
    """
    found = cells(options)
    check_device(config, model, found)
    precision = config.quantization or config.dtype
    weight_bytes = step_weight_bytes(model, precision)
    kv_token_bytes = device.kv.layout.block_bytes // config.block_size
    fill_kv(device, blocks_needed(found, config.block_size), options.seed)
    steps = Steps(device, config.block_size, options.seed)
    bounds_of = bounds_of or _bounds_on(config)
    bounds = bounds_of()

    def with_shares(cell: Cell, times_s: tuple[float, ...], count: int) -> CellResult:
        cost = cell_cost(cell, model, weight_bytes=weight_bytes, kv_token_bytes=kv_token_bytes)
        memory, arithmetic = shares(cost, statistics.median(times_s), bounds, int8=precision == "w8a8")
        return CellResult(
            cell=cell, steps=count, times_s=times_s, cost=cost, memory_share=memory, arithmetic_share=arithmetic
        )

    measured: list[tuple[Cell, tuple[float, ...], int]] = []
    for cell in found:
        times_s, count = _measure_row(steps, cell, options)
        measured.append((cell, times_s, count))
        on_row(with_shares(cell, times_s, count))
    bounds = bounds.best(bounds_of())
    return EngineBenchResult(
        facts=facts or {},
        bounds=bounds,
        rows=tuple(with_shares(*row) for row in measured),
        events=tuple(steps.events),
    )


def _bounds_on(config: EngineConfig) -> Callable[[], Bounds]:
    if config.device == "cuda":
        return measure_gpu_bounds
    return partial(measure_bounds, config.threads)


def _measure_row(steps: Steps, cell: Cell, options: EngineBenchOptions) -> tuple[tuple[float, ...], int]:
    until = time.perf_counter() + options.row_seconds
    for _ in range(options.warmups):
        steps.measure(cell)
        if time.perf_counter() > until:
            break
    times_s: list[float] = []
    count = 0
    while len(times_s) < options.repeats and (len(times_s) < 3 or time.perf_counter() < until):
        time_s, count = steps.measure(cell)
        times_s.append(time_s)
    return tuple(times_s), count
