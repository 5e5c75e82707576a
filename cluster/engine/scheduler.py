"""Decides what every step of one engine computes: continuous batching over a token budget, chunked prefill, admission
by KV, preemption by recomputation. One scheduler for all roles; the `BatchPolicy` makes it a prefill, decode or mixed
worker.

Pure: no torch, no I/O, time only from the `Clock`. Driven by one thread, in real time by the worker's engine loop, in
virtual time by the simulator, step by step by tests:

    add / abort / kv_ready / writer_done / release   any time between two calls
    plan = schedule()                                 None: nothing to compute now
    complete(output)                                  outputs in plan order
    take_events()                                     what happened since

Up to `max_outstanding_plans` are scheduled before the first of them is complete. A sequence whose token is being drawn
waits for it, unless the device `looks_ahead`: then its next row is planned with that token to be filled in (`DRAWN`).
If the token ends it, that row was for nothing: its output is dropped when it comes.

Invariants (`check_integrity`): a waiting sequence holds no block; a sequence in an outstanding plan keeps its blocks
until that plan is complete, and an IN sequence's blocks are kept for their writer until `writer_done`, whatever is
aborted meanwhile. Ideas: iteration-level scheduling (Orca, OSDI '22, §3.1), paged KV and recomputation (vLLM, SOSP
'23, §4), stall-free chunked prefill (Sarathi-Serve, OSDI '24, §4.2).
"""

from __future__ import annotations

from operator import attrgetter

from ..clock import Clock
from ..types import EngineLoad, Handoff, SampledToken, SequenceSpec
from .block_pool import BlockPool
from .decode_parts import DecodeParts
from .outstanding import OutstandingPlans
from .plan import StepOutput, StepPlan, StepRow
from .policies import BatchPolicy, Shares, StepShares
from .prefix_cache import PrefixCache
from .prompt_service import PromptService
from .quiet_run import Lockstep, QuietRun
from .residents import Residents
from .scheduler_events import BlocksGranted, Preempted, PrefillAdvanced, SchedulerEvent, SequenceFailed, TokensEmitted
from .sequence import Sequence, State, check_spec
from .sequence_kv import WRITER, SequenceKV
from .service_queue import ServiceQueue
from .slots import with_slots


class QueueFull(RuntimeError):
    """`max_waiting` sequences wait already; try another worker, or later."""


class Scheduler:
    """See the module's docstring. Not thread-safe."""

    def __init__(
        self,
        *,
        block_pool: BlockPool,
        prefix_cache: PrefixCache,
        policy: BatchPolicy,
        clock: Clock,
        max_batched_tokens: int,
        max_running: int,
        max_waiting: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        max_outstanding_plans: int = 1,
        looks_ahead: bool = False,
        decode_parts: int = 1,
        decode_part_rows: int = 1,
    ) -> None:
        """`looks_ahead`: the device computes rows whose token it is still drawing. `decode_parts`: among so many plans
        are the rows shared out that decode, where no prompt is beside them, so that each stage of a pipeline has some,
        and no fewer than `decode_part_rows` (`decode_parts`).
        """
        counts = {"running": max_running, "waiting": max_waiting, "outstanding_plans": max_outstanding_plans}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"max_{name}: {value} is not at least 1")
        if max_model_len < 2:
            raise ValueError(f"max_model_len: {max_model_len} is not at least 2")
        if max_batched_tokens < max_running:
            names = f"max_batched_tokens: {max_batched_tokens} is below max_running, {max_running}"
            raise ValueError(f"{names}; a step must be able to hold one token of every running sequence")
        self._kv = SequenceKV(block_pool, prefix_cache)
        self._policy = policy
        self._shares = Shares(policy, max_batched_tokens)
        self._clock = clock
        self._max_batched_tokens = max_batched_tokens
        self._max_waiting = max_waiting
        self._max_model_len = max_model_len
        self._eos_token_ids = tuple(eos_token_ids)
        self._looks_ahead = looks_ahead
        self._decode_parts = DecodeParts(decode_parts, decode_part_rows)

        self._queue = ServiceQueue()
        self._lockstep = Lockstep(self._kv)
        self._residents = Residents(self._queue, self._kv, self._lockstep)
        self._running, self._pulling = self._residents.running, self._residents.pulling
        self._prompts = PromptService(self._queue, self._kv, clock, self._residents, max_running, max_model_len)
        self._outstanding = OutstandingPlans(block_pool, self._eos_token_ids, max_outstanding_plans)
        self._beside: tuple[tuple[Sequence, StepRow], ...] = ()
        """Prompts that the run computes that was begun last."""
        self._events: list[SchedulerEvent] = []
        self._next_order = 0

    # ---------------------------------------------------------------- commands

    def add(self, spec: SequenceSpec) -> None:
        """Queues a sequence. QueueFull, or ValueError if it is malformed or could never run here."""
        pool = self._kv.pool
        check_spec(spec, num_blocks=pool.num_blocks, block_size=pool.block_size, max_model_len=self._max_model_len)
        if spec.seq_id in self._residents.known or self._kv.has_writer(spec.seq_id):
            raise ValueError(f"seq_id: {spec.seq_id!r} is in use on this engine")
        if spec.seq_id.startswith(WRITER):
            raise ValueError(f"seq_id: {spec.seq_id!r} begins with {WRITER!r}, which names transports")
        if self._queue.waiting >= self._max_waiting:
            raise QueueFull(f"{self._queue.waiting} sequences wait already, max_waiting is {self._max_waiting}")
        seq = Sequence(spec, self._next_order, self._max_model_len)
        self._next_order += 1
        self._residents.known[seq.seq_id] = seq
        self._queue.push(seq, self._clock.now_s())

    def abort(self, seq_id: str) -> bool:
        """Ends a sequence at any stage; False if there is none to end. It says nothing afterwards, not even what had
        not been taken yet. Blocks in an outstanding plan are freed at its `complete`, those of a writer at
        `writer_done`.
        """
        seq = self._residents.alive(seq_id)
        if seq is None:
            return False
        if any(isinstance(event, BlocksGranted) and event.seq_id == seq_id for event in self._events):
            self._kv.writer_done(seq_id)  # nobody has heard of the grant, so nobody writes
        self._events = [event for event in self._events if event.seq_id != seq_id]
        self._residents.end(seq)
        return True

    def kv_ready(self, seq_id: str, first_token: SampledToken) -> None:
        """IN: all KV of the context is written, and this is the token drawn from it elsewhere. Implies `writer_done`.
        The sequence joins the running batch at the next `schedule`. After an abort it does nothing more.
        """
        self.writer_done(seq_id)
        seq = self._residents.alive(seq_id)
        if seq is None:
            return
        assert seq.state is State.PULLING, f"kv_ready of {seq_id} ({seq.state.value}): no blocks were granted for it"
        del self._pulling[seq_id]
        self._running[seq_id] = seq
        seq.state = State.RUNNING
        seq.needs_pull = False
        seq.computed = seq.scheduled = seq.prefill_end
        self._kv.written(seq)
        seq.append(first_token)
        if self._lockstep.rows:
            self._lockstep.join(seq)

    def writer_done(self, seq_id: str) -> None:
        """IN: the transport no longer writes into the blocks: it succeeded, failed or was cancelled. Idempotent, and
        right after an abort too. A sequence that is still alive needs `kv_ready` or `abort` as well.
        """
        self._kv.writer_done(seq_id)

    def release(self, seq_id: str) -> None:
        """OUT: the reader has its KV, or will never come. Idempotent. Before the end of prefill: nothing is held."""
        seq = self._residents.alive(seq_id)
        if seq is None or seq.spec.handoff is not Handoff.OUT:
            return
        seq.released = True
        if seq.state is State.HELD:
            self._residents.end(seq)

    def set_policy(self, policy: BatchPolicy) -> None:
        """Changes role. Everything in flight goes on under the new policy."""
        self._policy = policy
        self._shares = Shares(policy, self._max_batched_tokens)

    # ---------------------------------------------------------------- a step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute now or too many plans are outstanding.

        The one idea: every sequence has tokens whose KV does not exist yet, and a step computes some of them. A
        decoding sequence has exactly one; a prompt has many and takes them in chunks. There is no prefill phase and
        no decode phase, only a budget of tokens that the policy shares out:

          1. each decoding sequence, oldest first, takes one token, and a block if its last one is full: that may
             preempt newer ones; in a pipeline, only as many as leave some for the plans beside this one;
          2. prompts take the rest in the queue's order, wherever they stand: the next chunk of one that has its
             blocks, the admission and the first chunk of one that waits.
        """
        if len(self._outstanding) >= self._outstanding.limit or not self.has_work:
            return None
        if self._lockstep.rows:
            self._lockstep.dissolve()
        if self._policy.pulls_alone and self._pull_first():
            return None
        by_age = sorted(self._running.values(), key=attrgetter("order"))
        ahead = self._looks_ahead
        decoding = [seq for seq in by_age if seq.can_decode or (ahead and seq.can_look_ahead)]
        shares = self._shares.of(len(decoding), self._queue.prefill_tokens)
        prompts: list[tuple[Sequence, int]] = []
        if self._policy.prompts_alone:
            prompts = self._serve(shares.prefill_tokens, may_admit=True)
        work = [(seq, count) for seq, count in prompts if count]
        preemptions = self._residents.preemptions
        if decoding and not work:
            rows = shares.decode_rows if self._decode_parts.parts == 1 else self._part(shares, by_age)
            work = [(seq, 1) for seq in self._with_slots(decoding[:rows], by_age)]
        if not self._policy.prompts_alone:
            # What a preemption has just freed is for those that run.
            prompts = self._serve(shares.prefill_tokens, may_admit=self._residents.preemptions == preemptions)
            work += [(seq, count) for seq, count in prompts if count]
        plan = self._outstanding.make(work) if work else None
        self._pay(prompts)
        return plan

    def complete(self, output: StepOutput) -> None:
        """Takes in the oldest plan's output: KV is written, tokens are drawn, a failed row ends its sequence."""
        for seq, row, result in self._outstanding.take(output):
            seq.plans -= 1
            if seq.state is State.ENDED:
                self._residents.forget_if_idle(seq)
                continue
            if result.error:
                self._kv.distrust(seq)
                self._residents.end(seq)
                self._events.append(SequenceFailed(seq_id=seq.seq_id, message=result.error))
                continue
            self._computed(seq, row, result.tokens)
            if seq.doomed and seq.plans == 0 and seq.state is State.RUNNING:
                self._preempt(seq)

    # ---------------------------------------------------------------- many steps

    def begin_run(self, limit: int) -> QuietRun | None:
        """The longest run of at most `limit` next steps that are alike (`cluster.engine.quiet_run`), provided that no
        command comes; None: `schedule` must decide. `take_run` comes before the next command. Grants what its first
        step would have granted to contexts that are pulled; where prompts are computed beside the rows that decode, it
        is one step.
        """
        policy, lockstep = self._policy, self._lockstep
        if self._outstanding or not (lockstep.rows or self._line_up()):
            return None
        may_admit = self._prompts.may_admit(policy)
        if policy.pulls_alone and (self._pulling or may_admit):
            return None
        rows = len(lockstep.rows)
        shares = self._shares.of(rows, self._queue.prefill_tokens)
        if shares.decode_rows < rows:
            return None
        under_way = len(self._running) > rows
        if not under_way and not may_admit:
            steps = lockstep.quiet_steps(limit)
            return QuietRun(steps, rows, lockstep.known_tokens) if steps else None
        computes = under_way or self._queue.prefill_tokens > 0
        if policy.whole_batches or policy.prompts_alone or (computes and self._outstanding.limit > 1):
            return None
        steps = lockstep.quiet_steps(1 if computes else limit)
        if not steps:
            return None
        lockstep.grow(1)
        prompts = self._serve(shares.prefill_tokens, may_admit=True)
        self._beside = tuple([(seq, self._outstanding.row(seq, count)) for seq, count in prompts if count])
        self._pay(prompts)
        if not computes:
            steps = lockstep.quiet_steps(steps)
        return QuietRun(steps, rows, lockstep.known_tokens, tuple([row for _, row in self._beside]))

    def take_run(self, steps: int, token: SampledToken) -> None:
        """Does `steps` of the run that `begin_run` has just named, as if every row drew `token` each time. Events tell
        only what somebody waits for: how prompts get on, a sequence's first token drawn here, and its last ones.
        """
        self._outstanding.skip(steps)
        for seq in self._lockstep.take(steps, token.token_id):
            self._tell(seq, (token,) * steps)
        beside, self._beside = self._beside, ()
        for seq, row in beside:
            seq.plans -= 1
            self._computed(seq, row, () if row.sample is None else (token,))
            if seq.can_decode and self._lockstep.rows:
                self._lockstep.join(seq)

    def _line_up(self) -> bool:
        """Puts all that decode in lockstep; False: nobody does."""
        for seq in self._running.values():
            if seq.can_decode:
                self._lockstep.join(seq)
        return bool(self._lockstep.rows)

    def take_events(self) -> list[SchedulerEvent]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ---------------------------------------------------------------- reports

    @property
    def waiting(self) -> int:
        """Sequences that have no blocks yet."""
        return self._queue.waiting

    @property
    def has_work(self) -> bool:
        """Whether `begin_run` or `schedule` could have anything to do but for contexts that are pulled."""
        return bool(self._running or self._queue.waiting)

    def drawn(self, seq_id: str) -> int:
        """Output tokens that sequence has so far, those of earlier attempts included; 0 if there is none."""
        seq = self._residents.known.get(seq_id)
        return 0 if seq is None else len(seq.outputs) + self._lockstep.owed(seq)

    def decodes(self, seq_id: str) -> bool:
        """Whether it is in the running batch."""
        return seq_id in self._running

    def load(self) -> EngineLoad:
        """Counts for heartbeats and metrics. O(running)."""
        return self._residents.load()

    def check_integrity(self) -> None:
        """Proves that every block is accounted for and every sequence in exactly one place. Raises IntegrityError."""
        self._residents.check_integrity(self._outstanding.sequences())

    # ---------------------------------------------------------------- how

    def _with_slots(self, decoding: list[Sequence], by_age: list[Sequence]) -> list[Sequence]:
        return with_slots(decoding, by_age, self._kv, self._preempt)

    def _pull_first(self) -> bool:
        """Whether contexts are pulled now, or once the plans that are under way are complete; begins them, after those
        that run have what their next step takes.
        """
        by_age = sorted(self._running.values(), key=attrgetter("order"))
        self._with_slots([seq for seq in by_age if seq.can_decode], by_age)
        if not self._pulling and self._queue.pulls and self._prompts.may_admit(self._policy):
            if self._outstanding:
                return True
            for seq, _ in self._serve(0, may_admit=True):
                self._queue.served(seq, seq.spec.context_tokens)
        return bool(self._pulling)

    def _part(self, shares: StepShares, by_age: list[Sequence]) -> int:
        """How many rows may decode in this plan: all of them beside a prompt, a part of those that decode without."""
        prompts = shares.prefill_tokens > 0 and self._queue.prefill_tokens > 0
        if prompts and (self._prompts.may_admit(self._policy) or any(seq.can_prefill for seq in by_age)):
            return shares.decode_rows
        decoders = sum(not seq.can_prefill for seq in by_age)
        return min(shares.decode_rows, self._decode_parts.rows(decoders))

    def _preempt(self, seq: Sequence) -> None:
        self._residents.preempt(seq, swaps=self._policy.swaps)
        self._events.append(Preempted(seq_id=seq.seq_id))

    def _serve(self, budget: int, *, may_admit: bool) -> list[tuple[Sequence, int]]:
        return self._prompts.serve(self._policy, budget, self._events, may_admit=may_admit)

    def _pay(self, prompts: list[tuple[Sequence, int]]) -> None:
        """`_serve` has served these; who has been given no token of its prompt was given the blocks of its context."""
        for seq, count in prompts:
            self._queue.served(seq, count if count or seq.remaining_prefill else seq.spec.context_tokens)

    def _computed(self, seq: Sequence, row: StepRow, tokens: tuple[SampledToken, ...]) -> None:
        """The KV of `row` is written, and `tokens`, of which there is one or none, are drawn."""
        seq.computed = row.start + len(row.token_ids)
        self._kv.written(seq)
        if row.start < seq.prefill_end:
            self._events.append(PrefillAdvanced(seq_id=seq.seq_id, computed_tokens=seq.computed))
        if tokens:
            self._take_token(seq, tokens[0])

    def _take_token(self, seq: Sequence, token: SampledToken) -> None:
        seq.drawing -= 1
        seq.append(token)
        self._tell(seq, (token,))

    def _tell(self, seq: Sequence, tokens: tuple[SampledToken, ...]) -> None:
        """`tokens` are the last ones of `seq`: tells of them, and ends it where they do."""
        assert seq.admitted_s is not None
        seq.told = True
        if seq.prefill_s is None:
            seq.prefill_s = self._clock.now_s() - seq.admitted_s
        reason, stop_token_id = seq.finish_reason(self._eos_token_ids)
        index, queue_s = len(seq.outputs) - len(tokens), max(0.0, seq.admitted_s - seq.spec.arrival_s)
        waterfall = (queue_s, seq.prefill_s, seq.cached_tokens)
        self._events.append(TokensEmitted(seq.seq_id, index, tokens, reason, stop_token_id, *waterfall))
        if reason is not None or seq.released:
            self._residents.end(seq)
        elif seq.spec.handoff is Handoff.OUT:
            self._residents.hold(seq)
