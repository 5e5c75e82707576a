"""A device that computes nothing, takes exactly the time a latency model says, in real time, and checks its KV.

With it, real processes, real gRPC and real queues of a cluster of any size run on two cores. Tokens are a function of
the KV (`paced_language`), and the KV is real memory, moved by the real transports: a handoff that loses, mixes up or
truncates a slot shows as a `KVCorruption` that names the sequence and the position.

What is checked, on each row that starts above position 0: a sequence seen before, that goes on where it stopped, must
still find its last key; any other (after a handoff, a prefix-cache hit, a preemption) has its whole prefix checked:
every slot written, the chain of keys unbroken, padding intact, and, where the row samples, the very tokens of its
context. A row that fails becomes a `RowOutput.error`; the rest of the batch goes on.

A step's time runs from its launch, or from the end of the step before where that is later. `collect` sleeps until then;
it never spins.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ....kvtransfer.layout import DTYPE_BYTES, KVGroup, KVLayout
from ....kvtransfer.mapped.segment import KVSegment
from ....kvtransfer.store import KVStore
from ...clock import Clock, MonotonicClock, VirtualClock
from ...config import EngineConfig
from ...latency.profile import StepProfile, read_profile
from ...models.config import ModelConfig
from ...types import SampledToken, StepTimeCoefficients
from ..plan import RowOutput, StepOutput, StepPlan, StepRow
from ..step_shape import step_shape
from .base import Device
from .paced_language import MULTIPLIER, ROOT, U64, PacedLanguage, chain, expected_tokens, slot_values

__all__ = ["KVCorruption", "PacedDevice", "PacedKVStore", "expected_tokens"]

MAX_OUTSTANDING_STEPS = 16
MAX_KNOWN_SEQUENCES = 4096
LATE_S, LATE_SHARE = 1e-3, 0.05
"""A step is late that ends later than this after its time, in seconds and as a share of it: sleeping is not exact."""


class KVCorruption(RuntimeError):
    """The KV of a sequence is not what computing its tokens would have written."""

    def __init__(self, seq_id: str, position: int, reason: str) -> None:
        super().__init__(f"KV corruption: sequence {seq_id!r}, position {position}: {reason}")
        self.seq_id = seq_id
        self.position = position


class PacedKVStore(KVStore):
    """Blocks of 64-bit words `[2, slot, word]` in one array; words after the first repeat it, as padding."""

    def __init__(self, *, block_size: int, num_blocks: int, pad_bytes_per_token: int = 0) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks} is not >= 1")
        if pad_bytes_per_token < 0:
            raise ValueError(f"pad_bytes_per_token: {pad_bytes_per_token} is not >= 0")
        head_dim = 1 + -(-pad_bytes_per_token // 16)
        group = KVGroup(name="paced", num_layers=1, num_kv_heads=1, head_dim=head_dim, dtype="uint64")
        self.layout = KVLayout(block_size=block_size, groups=(group,))
        self.num_blocks = num_blocks
        self.segment: KVSegment = KVSegment(self.layout, num_blocks)
        words: NDArray[np.uint64] = np.frombuffer(self.segment.blocks, dtype=U64)
        self.slots = words.reshape(num_blocks, 2, block_size, head_dim)
        self._bytes = self.slots.reshape(num_blocks, -1).view(np.uint8)

    def read_block(self, block_id: int) -> memoryview:
        """A read-only view, no copy. ValueError if there is no such block."""
        self._check(block_id)
        view: memoryview = self._bytes[block_id].data
        return view.toreadonly()

    def write_block(self, block_id: int, payload: memoryview | bytes) -> None:
        self._check(block_id)
        data = np.frombuffer(payload, dtype=np.uint8)
        if data.shape[0] != self.layout.block_bytes:
            raise ValueError(f"payload: {data.shape[0]} bytes, a block has {self.layout.block_bytes}")
        self._bytes[block_id] = data

    def _check(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")


@dataclass(frozen=True, slots=True)
class _Known:
    """Where a sequence stopped: the tokens whose KV it has, the last one's key and block, and whether the tokens before
    were compared with the context (a prefix-cache hit is not, until the row that samples).
    """

    tokens: int
    key: int
    block_id: int
    compared: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """A launched plan, its tokens flattened over rows (T tokens of R rows), and its time on the device, seconds."""

    plan: StepPlan
    values: NDArray[np.uint64]
    """[T]: the value words to write."""
    slots: NDArray[np.intp]
    """[T], block id · block size + slot: where each token's KV goes."""
    ends: NDArray[np.intp]
    """[R]: where each row ends among the T tokens."""
    previous: NDArray[np.intp]
    """[R]: the slot before each row's first; -1 where it starts at position 0."""
    start_s: float
    end_s: float


class PacedDevice(Device):
    """See the module. `sleep` None: `time.sleep`, or the clock's own `advance` where the clock is virtual."""

    name = "paced"

    def __init__(
        self,
        vocab_size: int,
        *,
        block_size: int = 16,
        num_blocks: int,
        coefficients: StepTimeCoefficients | StepProfile,
        clock: Clock | None = None,
        sleep: Callable[[float], object] | None = None,
        eos_token_ids: tuple[int, ...] = (),
        eos_probability: float = 0.0,
        pad_bytes_per_token: int = 0,
        verify_every_step: bool = False,
        raise_on_corruption: bool = False,
    ) -> None:
        """Builds the device.

        Args:
            vocab_size: tokens drawn are below it, and none is of `eos_token_ids` but with `eos_probability`.
            block_size: slots of a block.
            num_blocks: blocks of KV memory, 16 bytes a slot and the padding.
            coefficients: what a step takes, seconds.
            clock: None: the machine's monotonic clock.
            sleep: how to wait a number of seconds on that clock.
            eos_token_ids: end-of-sequence tokens.
            eos_probability: how often one is drawn.
            pad_bytes_per_token: extra KV per token, rounded up to 16 bytes, for transfers of a real model's size.
            verify_every_step: check the whole prefix of every row, O(context) a row and step; for tests.
            raise_on_corruption: raise `KVCorruption` out of `collect` instead of failing the row alone.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        self._language = PacedLanguage(
            vocab_size=vocab_size, eos_token_ids=eos_token_ids, eos_probability=eos_probability
        )
        self.kv: PacedKVStore = PacedKVStore(
            block_size=block_size, num_blocks=num_blocks, pad_bytes_per_token=pad_bytes_per_token
        )
        self.vocab_size = vocab_size
        self.fingerprint = hashlib.sha256(f"paced {self._language}".encode()).hexdigest()
        self.corruptions_total = 0
        self.late_steps_total = 0
        """Steps that ended later than the model says (`LATE_S`, `LATE_SHARE`): the machine was too slow for it."""
        self.costs: StepProfile = (
            coefficients if isinstance(coefficients, StepProfile) else StepProfile.linear(coefficients)
        )
        self._clock = MonotonicClock() if clock is None else clock
        if sleep is None:
            sleep = self._clock.advance if isinstance(self._clock, VirtualClock) else time.sleep
        self._sleep = sleep
        self._verify_every_step = verify_every_step
        self._raise_on_corruption = raise_on_corruption
        self._steps: deque[_Step] = deque()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._free_at_s = self._clock.now_s()

    @classmethod
    def for_model(cls, engine: EngineConfig, model: ModelConfig, *, clock: Clock | None = None) -> PacedDevice:
        """A device in the place of `model`: its vocabulary, its end-of-sequence tokens (never drawn), and as many
        blocks as `engine.kv_cache_bytes` of the real model's KV would make (the paced ones take less memory).
        """
        token_bytes = model.num_layers * 2 * model.num_kv_heads * model.head_dim * DTYPE_BYTES[engine.dtype]
        num_blocks = engine.kv_cache_bytes // (token_bytes * engine.block_size)
        if num_blocks < 1:
            raise ValueError(f"kv_cache_bytes: {engine.kv_cache_bytes} holds no block of {token_bytes} bytes a token")
        coefficients = StepTimeCoefficients(
            step_s=engine.paced_step_s,
            prefill_token_s=engine.paced_prefill_token_s,
            decode_row_s=engine.paced_decode_row_s,
            context_token_s=engine.paced_context_token_s,
        )
        profile = None if engine.paced_profile is None else read_profile(engine.paced_profile)
        return cls(
            model.vocab_size,
            block_size=engine.block_size,
            num_blocks=num_blocks,
            coefficients=profile or coefficients,
            clock=clock,
            eos_token_ids=model.eos_token_ids,
        )

    def launch(self, plan: StepPlan) -> None:
        """Starts the step's time. ValueError on a malformed plan, RuntimeError if too many steps are outstanding."""
        if len(self._steps) >= MAX_OUTSTANDING_STEPS:
            raise RuntimeError(f"launch: {MAX_OUTSTANDING_STEPS} steps are outstanding; collect first")
        for row in plan.rows:
            self._check_row(row)
        values, slots, ends, previous = self._flatten(plan)
        shape = step_shape(plan)
        duration_s = self.costs.step_time_s(
            shape.prefill_tokens, shape.prefill_squares, shape.decode_rows, shape.context_tokens
        )
        start_s = max(self._clock.now_s(), self._free_at_s)
        self._free_at_s = start_s + duration_s
        self._steps.append(_Step(plan, values, slots, ends, previous, start_s, self._free_at_s))

    def collect(self) -> StepOutput:
        """Sleeps until the oldest step's time is over. Raises KVCorruption only if `raise_on_corruption` was set."""
        if not self._steps:
            raise RuntimeError("collect: no step is outstanding")
        step = self._steps.popleft()
        rows = self._compute(step)
        remaining_s = step.end_s - self._clock.now_s()
        if remaining_s > 0:
            self._sleep(remaining_s)
        now_s = self._clock.now_s()
        if now_s - step.end_s > max(LATE_S, LATE_SHARE * (step.end_s - step.start_s)):
            self.late_steps_total += 1
        duration_s = max(now_s - step.start_s, 0.0)
        return StepOutput(step.plan.plan_id, rows, duration_s)

    def close(self) -> None:
        """Forgets all steps and sequences. The KV memory goes with the last view of it."""
        self.kv.segment.close()
        self._steps.clear()
        self._known.clear()

    def _check_row(self, row: StepRow) -> None:
        """ValueError if the row cannot be computed."""
        size, end = self.kv.layout.block_size, row.start + len(row.token_ids)
        if row.start < 0 or end == row.start:
            raise ValueError(f"rows: {row.seq_id!r} computes {len(row.token_ids)} tokens from position {row.start}")
        blocks = row.block_ids[: -(-end // size)]
        if len(blocks) * size < end:
            raise ValueError(f"block_ids: {row.seq_id!r} has {len(blocks)} blocks of {size} for {end} tokens")
        if min(blocks) < 0 or max(blocks) >= self.kv.num_blocks:
            raise ValueError(f"block_ids: {row.seq_id!r} names a block that is not in 0…{self.kv.num_blocks - 1}")
        if min(row.token_ids) < 0 or max(row.token_ids) >= self.vocab_size:
            raise ValueError(f"token_ids: {row.seq_id!r} has one that is not in 0…{self.vocab_size - 1}")

    def _flatten(
        self, plan: StepPlan
    ) -> tuple[NDArray[np.uint64], NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """`values`, `slots`, `ends` and `previous` of a step; ValueError if two of its tokens would share a slot."""
        size = self.kv.layout.block_size
        starts = np.array([row.start for row in plan.rows], dtype=np.intp)
        counts = np.array([len(row.token_ids) for row in plan.rows], dtype=np.intp)
        ends = np.cumsum(counts, dtype=np.intp)
        positions = np.arange(counts.sum(), dtype=np.intp) + np.repeat(starts - ends + counts, counts)
        # The blocks that the rows touch, one row after another, from the block of the slot before the first.
        firsts = np.maximum(starts - 1, 0) // size
        used = (starts + counts - 1) // size - firsts + 1
        blocks = np.array(
            [
                block
                for row, first, many in zip(plan.rows, firsts.tolist(), used.tolist(), strict=True)
                for block in row.block_ids[first : first + many]
            ],
            dtype=np.intp,
        )
        bases = np.cumsum(used) - used - firsts
        slots = blocks[np.repeat(bases, counts) + positions // size] * size + positions % size
        if np.unique(slots).shape != slots.shape:
            raise ValueError("block_ids: two rows of the plan write the same slot")
        previous = np.where(starts > 0, blocks[bases + firsts] * size + (starts - 1) % size, -1)
        token_ids = np.array([token for row in plan.rows for token in row.token_ids], dtype=U64)
        return slot_values(token_ids, positions.astype(U64)), slots, ends, previous

    def _compute(self, step: _Step) -> tuple[RowOutput, ...]:
        """Checks every row's prefix, writes the step's KV and draws its tokens; rows whose KV is not their own fail."""
        rows, size = step.plan.rows, self.kv.layout.block_size
        values, ends = step.values, step.ends
        previous = np.where(step.previous < 0, ROOT, self.kv.slots[step.previous // size, 0, step.previous % size, 0])
        keys = np.zeros_like(values)
        single = np.flatnonzero(np.diff(ends, prepend=0) == 1)
        keys[ends[single] - 1] = previous[single] * MULTIPLIER + values[ends[single] - 1]
        errors: dict[int, str] = {}
        good = np.ones(values.shape, dtype=bool)
        for r, row in enumerate(rows):
            stretch = slice(int(ends[r]) - len(row.token_ids), int(ends[r]))
            try:
                compared = row.start == 0 or self._verify(row, int(previous[r]))
            except KVCorruption as error:
                self.corruptions_total += 1
                self._known.pop(row.seq_id, None)
                if self._raise_on_corruption:
                    raise
                errors[r] = str(error)
                good[stretch] = False
                continue
            if len(row.token_ids) > 1:
                keys[stretch] = chain(previous[r], values[stretch])
            self._remember(row, int(keys[ends[r] - 1]), compared)
        written = step.slots[good]
        self.kv.slots[written // size, 0, written % size] = keys[good, None]
        self.kv.slots[written // size, 1, written % size] = values[good, None]
        return self._draw(rows, keys[ends - 1], errors)

    def _draw(self, rows: Sequence[StepRow], keys: NDArray[np.uint64], errors: dict[int, str]) -> tuple[RowOutput, ...]:
        """One output a row; `keys` [R] are those of the rows' last positions."""
        drawing = [(r, row.sample) for r, row in enumerate(rows) if row.sample is not None and r not in errors]
        tokens: dict[int, SampledToken] = {}
        drawn = self._language.draw(keys[[r for r, _ in drawing]], [spec for _, spec in drawing])
        for (r, _), token in zip(drawing, drawn, strict=True):
            if token is None:
                errors[r] = "banned_token_ids: no token of the vocabulary is left to draw"
            else:
                tokens[r] = token
        return tuple(
            RowOutput(row.seq_id, (tokens[r],) if r in tokens else (), errors.get(r, "")) for r, row in enumerate(rows)
        )

    def _verify(self, row: StepRow, previous_key: int) -> bool:
        """Whether the prefix of `row` (start > 0) is now known to be its context's. KVCorruption if it is not whole."""
        known = self._known.get(row.seq_id)
        if (
            known is not None
            and not self._verify_every_step
            and (known.tokens, known.block_id) == (row.start, self._last_block(row, row.start))
            and (known.compared or row.sample is None)
        ):
            if known.key != previous_key:
                raise KVCorruption(row.seq_id, row.start - 1, "the key changed after it was written")
            return known.compared
        self._verify_prefix(row)
        return row.sample is not None

    def _verify_prefix(self, row: StepRow) -> None:
        """Checks all slots below `row.start` at once; KVCorruption names the first bad one."""
        size, count = self.kv.layout.block_size, row.start
        words = self.kv.slots[list(row.block_ids[: -(-count // size)])]
        keys = words[:, 0].reshape(-1, words.shape[-1])[:count]
        values = words[:, 1].reshape(-1, words.shape[-1])[:count]
        _raise_first(row, values[:, 0] == 0, "the slot was never written")
        if row.sample is not None:
            context = [*row.sample.prompt_token_ids, *row.sample.output_token_ids][:count]
            expected = slot_values(np.array(context, dtype=U64), np.arange(len(context), dtype=U64))
            _raise_first(row, values[: len(context), 0] != expected, "the slot holds another token or position")
        torn = (keys != keys[:, :1]).any(axis=1) | (values != values[:, :1]).any(axis=1)
        _raise_first(row, torn, "the padding is not the slot's own: torn or truncated")
        before = np.concatenate(([ROOT], keys[:-1, 0]))
        _raise_first(
            row, keys[:, 0] != before * MULTIPLIER + values[:, 0], "the key does not follow from the one before"
        )

    def _remember(self, row: StepRow, key: int, compared: bool) -> None:
        tokens = row.start + len(row.token_ids)
        self._known[row.seq_id] = _Known(tokens, key, self._last_block(row, tokens), compared)
        self._known.move_to_end(row.seq_id)
        if len(self._known) > MAX_KNOWN_SEQUENCES:
            self._known.popitem(last=False)

    def _last_block(self, row: StepRow, tokens: int) -> int:
        """The block of the last of a number of tokens > 0."""
        return row.block_ids[(tokens - 1) // self.kv.layout.block_size]


def _raise_first(row: StepRow, bad: NDArray[np.bool_], reason: str) -> None:
    """KVCorruption at the first position that is bad, if one is."""
    if bad.any():
        raise KVCorruption(row.seq_id, int(bad.argmax()), reason)
