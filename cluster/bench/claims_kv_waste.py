"""Which share of the KV memory holds tokens: paged, by the real scheduler and block pool, or reserved in one stretch.

PagedAttention (SOSP '23), §3.1 and figure 2: systems that keep a request's KV in one stretch reserve it for the longest
answer (`max`), for the next power of two of the true length (`pow2`), or for the true length, if an oracle tells
(`oracle`), out of a buddy allocator (§6.1). Then slots are lost in three ways: reserved for tokens that come later,
internal (never used by who holds them), external (free, but of no use to who waits next).

Every system is saturated: there is always someone waiting, first come first served. A step writes the prompts that were
let in and one token of everybody else. Shares are means over the steps until nobody waits any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.plan import StepPlan
from ..latency.profile import DecodeTerms, StepProfile
from .claims_virtual import EngineShape, Job, VirtualEngine

PAPER_SLOTS = 15_700
"""OPT-13B on an A100-40GB: 12 GB of KV (PagedAttention, table 1)."""
PAPER_SHARES = {"contiguous, max": 0.204, "contiguous, pow2": 0.268, "contiguous, oracle": 0.382, "paged, 16": 0.963}
"""Shares of token states in the paper's figure 2."""
_STEP = DecodeTerms(step_s=1.0, row_s=0.0, context_token_s=0.0)
_PROFILE = StepProfile(prefill_step_s=1.0, prefill_token_s=0.0, decode=_STEP, large_decode=_STEP, large_batch_rows=1)


class BuddyAllocator:
    """Stretches of 2**k slots that halve and join again (Knowlton 1965), over a memory of any size."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"slots: {num_slots} is not allowed; allowed: at least 1")
        self._free: dict[int, set[int]] = {1 << order: set() for order in range(num_slots.bit_length())}
        self._held: dict[int, int] = {}
        start = 0
        for size in sorted(self._free, reverse=True):
            if num_slots & size:
                self._free[size].add(start)
                start += size

    def allocate(self, slots: int) -> tuple[int, int] | None:
        """A stretch of at least `slots`, as (start, size); None if there is none."""
        wanted = 1 << max(slots - 1, 0).bit_length()
        size = wanted
        while not self._free.get(size):
            size *= 2
            if size not in self._free:
                return None
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:
            size //= 2
            self._free[size].add(start + size)
        self._held[start] = wanted
        return start, wanted

    def release(self, start: int) -> None:
        """Gives a stretch back; it joins its buddy where that is free as a whole."""
        size = self._held.pop(start)
        while (buddy := start ^ size) in self._free[size] and size * 2 in self._free:
            self._free[size].remove(buddy)
            start, size = min(start, buddy), size * 2
        self._free[size].add(start)

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return sum(size * len(starts) for size, starts in self._free.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class KVWaste:
    """One system: what its KV memory holds, shares that add up to 1, and how many sequences run beside each other."""

    system: str
    tokens: float
    """Token states."""
    reserved: float
    """For tokens that will come."""
    internal: float
    external: float
    """Free, or kept free, while someone waits."""
    running: float
    steps: int


@dataclass(slots=True)
class _Resident:
    job: Job
    start: int
    size: int
    written: int


def contiguous_waste(jobs: Sequence[Job], rule: str, *, num_slots: int, max_model_len: int) -> KVWaste:
    """`rule`: `max`, `pow2` or `oracle`."""
    memory, waiting = BuddyAllocator(num_slots), deque(jobs)
    running: list[_Resident] = []
    seen: list[tuple[int, int, int, int, int]] = []
    while True:
        for resident in running:
            resident.written += 1
        while waiting:
            job = waiting[0]
            stretch = memory.allocate(_reservation(job, rule, max_model_len))
            if stretch is None:
                break
            running.append(_Resident(waiting.popleft(), *stretch, job.prompt_tokens))
        if not waiting:
            return _waste(f"contiguous, {rule}", seen, num_slots)
        if not running:
            longest = max(_reservation(job, rule, max_model_len) for job in jobs)
            raise ValueError(f"slots: {num_slots} is not allowed; allowed: room for a reservation of {longest}")
        tokens = sum(resident.written for resident in running)
        final = sum(_final(resident.job) for resident in running)
        held = sum(resident.size for resident in running)
        seen.append((tokens, final - tokens, held - final, memory.free_slots, len(running)))
        for resident in running:
            if resident.written == _final(resident.job):
                memory.release(resident.start)
        running = [resident for resident in running if resident.written < _final(resident.job)]


def paged_waste(jobs: Sequence[Job], *, num_slots: int, block_size: int, max_model_len: int) -> KVWaste:
    """What the real scheduler and block pool make of the same jobs."""
    num_blocks = num_slots // block_size
    engine = VirtualEngine(
        EngineShape(
            num_blocks=num_blocks,
            block_size=block_size,
            max_batched_tokens=2**20,
            max_running=2**16,
            max_model_len=max_model_len,
        ),
        _PROFILE,
    )
    written: dict[str, int] = {}
    seen: list[tuple[int, int, int, int, int]] = []

    def on_step(plan: StepPlan) -> None:
        written.update((row.seq_id, row.start + len(row.token_ids)) for row in plan.rows)
        for seq_id in [seq_id for seq_id in written if not engine.pool.table(seq_id)]:
            del written[seq_id]
        if engine.scheduler.load().waiting:
            tokens, held = sum(written.values()), engine.pool.num_held * block_size
            seen.append((tokens, 0, held - tokens, num_blocks * block_size - held, len(written)))

    engine.run(
        [Job(arrival_s=0.0, prompt_tokens=j.prompt_tokens, output_tokens=j.output_tokens) for j in jobs],
        on_step=on_step,
    )
    return _waste(f"paged, {block_size}", seen, num_blocks * block_size)


def compare(
    jobs: Sequence[Job],
    *,
    num_slots: int = PAPER_SLOTS,
    block_sizes: Sequence[int] = (16,),
    max_model_len: int = 2048,
) -> tuple[KVWaste, ...]:
    """All systems on the same jobs. ValueError where they are too few to fill the memory."""
    rows = [
        contiguous_waste(jobs, rule, num_slots=num_slots, max_model_len=max_model_len)
        for rule in ("max", "pow2", "oracle")
    ]
    rows += [
        paged_waste(jobs, num_slots=num_slots, block_size=size, max_model_len=max_model_len) for size in block_sizes
    ]
    return tuple(rows)


def show(rows: Sequence[KVWaste]) -> str:
    """The table."""
    lines = [
        f"{'KV memory, %':<20}{'tokens':>8}{'reserved':>10}{'internal':>10}{'external':>10}{'running':>9}{'paper':>8}"
    ]
    for row in rows:
        shares = "".join(
            f"{100 * share:>{width}.1f}"
            for share, width in ((row.tokens, 8), (row.reserved, 10), (row.internal, 10), (row.external, 10))
        )
        paper = PAPER_SHARES.get(row.system)
        lines.append(f"{row.system:<20}{shares}{row.running:>9.1f}{'' if paper is None else f'{100 * paper:.1f}':>8}")
    return "\n".join(lines)


def _final(job: Job) -> int:
    """Tokens whose KV is written by the end; the last one's never is."""
    return job.prompt_tokens + job.output_tokens - 1


def _reservation(job: Job, rule: str, max_model_len: int) -> int:
    if rule == "max":
        return max_model_len
    if rule == "pow2":
        return min(job.prompt_tokens + (1 << (job.output_tokens - 1).bit_length()), max_model_len)
    return _final(job)


def _waste(system: str, seen: Sequence[tuple[int, int, int, int, int]], num_slots: int) -> KVWaste:
    if not seen:
        raise ValueError("num_prompts: too few to fill the KV memory; allowed: enough that some wait")
    tokens, reserved, internal, external, running = np.array(seen, dtype=np.float64).mean(axis=0)
    return KVWaste(
        system=system,
        tokens=tokens / num_slots,
        reserved=reserved / num_slots,
        internal=internal / num_slots,
        external=external / num_slots,
        running=running,
        steps=len(seen),
    )
