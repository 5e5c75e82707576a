"""Decides what every step of one engine computes: continuous batching over a token budget, chunked prefill, admission
by KV, preemption by recomputation. One scheduler for all roles; the `BatchPolicy` makes it a prefill, decode or mixed
worker.

Pure: no torch, no I/O, time only from the `Clock`. Driven by one thread, in real time by the worker's engine loop, in
virtual time by the simulator, step by step by tests:

    add / abort / kv_ready / writer_done / release   any time between two calls
    plan = schedule()                                 None: nothing to compute now
    complete(output)                                  outputs in plan order
    take_events()                                     what happened since

Invariants (`check_integrity`): a waiting sequence holds no block; a sequence in an outstanding plan keeps its blocks
until that plan is complete, and an IN sequence's blocks are kept for their writer until `writer_done`, whatever is
aborted meanwhile. Ideas: iteration-level scheduling (Orca, OSDI '22, §3.1), paged KV and recomputation (vLLM, SOSP
'23, §4), stall-free chunked prefill (Sarathi-Serve, OSDI '24, §4.2).
"""

from __future__ import annotations

from collections import deque
from operator import attrgetter
from typing import NamedTuple

from ..clock import Clock
from ..types import EngineLoad, Handoff, SampledToken, SequenceSpec
from .block_pool import BlockPool, IntegrityError
from .integrity import check_sequences
from .plan import StepOutput, StepPlan, StepRow
from .policies import BatchPolicy, Shares
from .prefix_cache import PrefixCache
from .prompt_service import PromptService
from .quiet_run import Lockstep, QuietRun
from .scheduler_events import BlocksGranted, Preempted, PrefillAdvanced, SchedulerEvent, SequenceFailed, TokensEmitted
from .sequence import Sequence, State, check_spec
from .sequence_kv import WRITER, SequenceKV
from .service_queue import ServiceQueue
from .slots import with_slots


class QueueFull(RuntimeError):
    """`max_waiting` sequences wait already; try another worker, or later."""


class _Outstanding(NamedTuple):
    """A plan that the device has not given back, with the sequence of each of its rows."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]


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
    ) -> None:
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
        self._max_outstanding_plans = max_outstanding_plans

        self._sequences: dict[str, Sequence] = {}  # all that have not ended, and ended ones in an outstanding plan
        self._queue = ServiceQueue()
        self._pulling: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._prompts = PromptService(
            self._queue, self._kv, clock, self._running, self._pulling, max_running, max_model_len
        )
        self._held: dict[str, Sequence] = {}
        self._outstanding: deque[_Outstanding] = deque()
        self._lockstep = Lockstep(self._kv)
        self._beside: tuple[tuple[Sequence, StepRow], ...] = ()
        """Prompts that the run computes that was begun last."""
        self._events: list[SchedulerEvent] = []
        self._next_order = 0
        self._next_plan_id = 0
        self._preemptions = 0

    # ---------------------------------------------------------------- commands

    def add(self, spec: SequenceSpec) -> None:
        """Queues a sequence. QueueFull, or ValueError if it is malformed or could never run here."""
        pool = self._kv.pool
        check_spec(spec, num_blocks=pool.num_blocks, block_size=pool.block_size, max_model_len=self._max_model_len)
        if spec.seq_id in self._sequences or self._kv.has_writer(spec.seq_id):
            raise ValueError(f"seq_id: {spec.seq_id!r} is in use on this engine")
        if spec.seq_id.startswith(WRITER):
            raise ValueError(f"seq_id: {spec.seq_id!r} begins with {WRITER!r}, which names transports")
        if self._queue.waiting >= self._max_waiting:
            raise QueueFull(f"{self._queue.waiting} sequences wait already, max_waiting is {self._max_waiting}")
        seq = Sequence(spec, self._next_order, self._max_model_len)
        self._next_order += 1
        self._sequences[seq.seq_id] = seq
        self._queue.push(seq, self._clock.now_s())

    def abort(self, seq_id: str) -> bool:
        """Ends a sequence at any stage; False if there is none to end. It says nothing afterwards, not even what had
        not been taken yet. Blocks in an outstanding plan are freed at its `complete`, those of a writer at
        `writer_done`.
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.state is State.ENDED:
            return False
        if any(isinstance(event, BlocksGranted) and event.seq_id == seq_id for event in self._events):
            self._kv.writer_done(seq_id)  # nobody has heard of the grant, so nobody writes
        self._events = [event for event in self._events if event.seq_id != seq_id]
        self._end(seq)
        return True

    def kv_ready(self, seq_id: str, first_token: SampledToken) -> None:
        """IN: all KV of the context is written, and this is the token drawn from it elsewhere. Implies `writer_done`.
        The sequence joins the running batch at the next `schedule`. After an abort it does nothing more.
        """
        self.writer_done(seq_id)
        seq = self._sequences.get(seq_id)
        if seq is None or seq.state is State.ENDED:
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
        seq = self._sequences.get(seq_id)
        if seq is None or seq.state is State.ENDED or seq.spec.handoff is not Handoff.OUT:
            return
        seq.released = True
        if seq.state is State.HELD:
            self._end(seq)

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
             preempt newer ones;
          2. prompts take the rest in the queue's order, wherever they stand: the next chunk of one that has its
             blocks, the admission and the first chunk of one that waits.
        """
        if len(self._outstanding) >= self._max_outstanding_plans or not self.has_work:
            return None
        if self._lockstep.rows:
            self._lockstep.dissolve()
        if self._policy.pulls_alone and self._pull_first():
            return None
        by_age = sorted(self._running.values(), key=attrgetter("order"))
        decoding = [seq for seq in by_age if seq.can_decode]
        shares = self._shares.of(len(decoding), self._queue.prefill_tokens)
        prompts: list[tuple[Sequence, int]] = []
        if self._policy.prompts_alone:
            prompts = self._serve(shares.prefill_tokens, may_admit=True)
        work = [(seq, count) for seq, count in prompts if count]
        preemptions = self._preemptions
        if decoding and not work:
            work = [(seq, 1) for seq in self._with_slots(decoding[: shares.decode_rows], by_age)]
        if not self._policy.prompts_alone:
            # What a preemption has just freed is for those that run.
            prompts = self._serve(shares.prefill_tokens, may_admit=self._preemptions == preemptions)
            work += [(seq, count) for seq, count in prompts if count]
        plan = StepPlan(self._next_plan_id, tuple([self._row(seq, count) for seq, count in work]))
        self._pay(prompts)
        if not work:
            return None
        self._next_plan_id += 1
        self._outstanding.append(_Outstanding(plan, tuple([seq for seq, _ in work])))
        return plan

    def complete(self, output: StepOutput) -> None:
        """Takes in the oldest plan's output: KV is written, tokens are drawn, a failed row ends its sequence."""
        assert self._outstanding, f"output of plan {output.plan_id}, but no plan is outstanding"
        plan, sequences = self._outstanding[0].plan, self._outstanding[0].sequences
        output.check_answers(plan)
        self._outstanding.popleft()
        for seq, row, result in zip(sequences, plan.rows, output.rows, strict=True):
            seq.plans -= 1
            if seq.state is State.ENDED:
                self._forget_if_idle(seq)
                continue
            if result.error:
                self._kv.distrust(seq)
                self._end(seq)
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
        if policy.whole_batches or policy.prompts_alone or (computes and self._max_outstanding_plans > 1):
            return None
        steps = lockstep.quiet_steps(1 if computes else limit)
        if not steps:
            return None
        lockstep.grow(1)
        prompts = self._serve(shares.prefill_tokens, may_admit=True)
        self._beside = tuple([(seq, self._row(seq, count)) for seq, count in prompts if count])
        self._pay(prompts)
        if not computes:
            steps = lockstep.quiet_steps(steps)
        return QuietRun(steps, rows, lockstep.known_tokens, tuple([row for _, row in self._beside]))

    def take_run(self, steps: int, token: SampledToken) -> None:
        """Does `steps` of the run that `begin_run` has just named, as if every row drew `token` each time. Events tell
        only what somebody waits for: how prompts get on, a sequence's first token drawn here, and its last ones.
        """
        self._next_plan_id += steps
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
        seq = self._sequences.get(seq_id)
        return 0 if seq is None else len(seq.outputs) + self._lockstep.owed(seq)

    def decodes(self, seq_id: str) -> bool:
        """Whether it is in the running batch."""
        return seq_id in self._running

    def load(self) -> EngineLoad:
        """Counts for heartbeats and metrics. O(running)."""
        context_tokens = self._lockstep.known_tokens
        if len(self._running) > len(self._lockstep.rows):
            context_tokens += sum([len(seq.tokens) for seq in self._running.values() if seq.joined is None])
        return EngineLoad(
            waiting=self._queue.waiting,
            running=len(self._running) + len(self._pulling),
            held=len(self._held),
            queued_prefill_tokens=self._queue.prefill_tokens,
            patient_prefill_tokens=self._queue.patient_tokens,
            context_tokens=context_tokens,
            num_blocks=self._kv.pool.num_blocks,
            free_blocks=self._kv.pool.num_free,
            cached_blocks=self._kv.pool.num_cached,
            preemptions_total=self._preemptions,
            prefix_queries_tokens_total=self._kv.queries_tokens,
            prefix_hits_tokens_total=self._kv.hits_tokens,
        )

    def check_integrity(self) -> None:
        """Proves that every block is accounted for and every sequence in exactly one place. Raises IntegrityError."""
        places = {State.PULLING: self._pulling, State.RUNNING: self._running, State.HELD: self._held}
        out = sum(seq.spec.handoff is Handoff.OUT for seq in self._running.values())
        if out != self._prompts.running_out:
            raise IntegrityError(f"scheduler: {out} that run are handed off, {self._prompts.running_out} counted")
        self._lockstep.check_integrity(seq for seq in self._running.values() if seq.can_decode)
        in_plans = [seq for outstanding in self._outstanding for seq in outstanding.sequences]
        check_sequences(self._sequences, self._queue, places, in_plans)
        self._kv.check_integrity([seq for seq in self._sequences.values() if seq.state is not State.WAITING])

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

    def _preempt(self, seq: Sequence) -> None:
        assert (seq.state, seq.plans) == (State.RUNNING, 0), f"{seq.seq_id} cannot be preempted now"
        del self._running[seq.seq_id]
        self._kv.release(seq)
        if self._policy.swaps:
            seq.swap_out()
        else:
            seq.restart()
        self._queue.push_preempted(seq)
        self._preemptions += 1
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

    def _row(self, seq: Sequence, count: int) -> StepRow:
        """Schedules the next `count` tokens of `seq`; the last one of its context draws a token."""
        start, end = seq.scheduled, seq.scheduled + count
        seq.scheduled = end
        seq.plans += 1
        seq.undrawn = end == len(seq.tokens)
        sample = seq.sample_spec(self._eos_token_ids) if seq.undrawn else None
        return StepRow(seq.seq_id, start, seq.tokens[start:end], self._kv.pool.table(seq.seq_id), sample)

    def _take_token(self, seq: Sequence, token: SampledToken) -> None:
        seq.undrawn = False
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
            self._end(seq)
        elif seq.spec.handoff is Handoff.OUT:
            del self._running[seq.seq_id]
            self._prompts.running_out -= 1
            self._held[seq.seq_id] = seq
            seq.state = State.HELD

    def _end(self, seq: Sequence) -> None:
        self._queue.remove(seq)
        if seq.joined is not None:
            self._lockstep.leave(seq)
        if seq.state is State.RUNNING:
            del self._running[seq.seq_id]
            self._prompts.running_out -= seq.spec.handoff is Handoff.OUT
        elif seq.state is State.PULLING:
            del self._pulling[seq.seq_id]
        elif seq.state is State.HELD:
            del self._held[seq.seq_id]
        seq.state = State.ENDED
        self._forget_if_idle(seq)

    def _forget_if_idle(self, seq: Sequence) -> None:
        """An ended sequence gives its blocks back as soon as no outstanding plan writes into them."""
        if seq.plans == 0:
            self._kv.release(seq)
            del self._sequences[seq.seq_id]
