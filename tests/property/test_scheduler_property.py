"""A scheduler under any order of commands, with a device and transports that would notice every mistake.

The fake device keeps a value for each KV slot: a hash of all tokens up to that position. It runs a plan as late as
possible (when it is collected), reads every slot of the context before it draws, and draws a function of them, and of
earlier outputs where a penalty asks for it; transports write garbage until they say that they have stopped, and so does
a row that was planned behind a token which turned out to be the last. So a block freed too early, a wrong prefix hit or
a table mixed up gives wrong KV at once, and no sequence may ever see any. What each sequence draws is what it would
draw alone, however many plans are outstanding and whether or not the device looks ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lone_runs import EOS, MAX_LEN, SPECS, VOCAB, Run, alone, draw
from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.plan import DRAWN, RowOutput, StepOutput, StepPlan, StepRow
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import QueueFull, Scheduler
from tandem.cluster.engine.scheduler_events import BlocksGranted, Preempted, PrefillAdvanced, TokensEmitted
from tandem.cluster.types import Handoff, Role, SampledToken, SequenceSpec

BATCHING = st.sampled_from(["iteration", "iteration", "request", "prompts_alone"])


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(8, 14),
        size=st.sampled_from([2, 3]),
        running=st.sampled_from([2, 3, 5]),
        slack=st.sampled_from([0, 1, 2, 12]),
        plans=st.sampled_from([1, 2, 2, 3]),
        looks_ahead=st.booleans(),
        parts=st.sampled_from([1, 1, 2]),
        cache=st.booleans(),
        role=st.sampled_from(Role),
        batching=BATCHING,
    )
    def start(
        self,
        blocks: int,
        size: int,
        running: int,
        slack: int,
        plans: int,
        looks_ahead: bool,
        parts: int,
        cache: bool,
        role: Role,
        batching: str,
    ) -> None:
        self.size, self.budget, self.running = size, running + slack, running
        self.pool = BlockPool(blocks, size)
        self.kv: list[list[int | None]] = [[None] * size for _ in range(blocks)]
        self.scheduler = Scheduler(
            block_pool=self.pool,
            prefix_cache=PrefixCache(self.pool, cache),
            policy=policy_for(role, batching),
            clock=VirtualClock(),
            max_batched_tokens=self.budget,
            max_running=running,
            max_waiting=6,
            max_model_len=MAX_LEN,
            eos_token_ids=(EOS,),
            max_outstanding_plans=plans,
            looks_ahead=looks_ahead,
            decode_parts=parts,
        )
        self.looks_ahead = looks_ahead
        self.drawn: dict[str, int] = {}
        self.runs: dict[str, Run] = {}
        self.plans: deque[StepPlan] = deque()

    @rule(specs=st.lists(SPECS, min_size=1, max_size=3))
    def submit(self, specs: list[SequenceSpec]) -> None:
        for spec in specs:
            if spec.sampling.max_tokens > len(spec.output_token_ids):
                self.add(replace(spec, seq_id=f"s{len(self.runs)}"))

    def add(self, spec: SequenceSpec) -> None:
        sent, handoff, max_tokens = spec.output_token_ids, spec.handoff, spec.sampling.max_tokens
        expected, reason = alone(spec)
        if handoff is Handoff.IN and len(expected) == len(sent) + 1:
            return  # the first token ends it: never submitted
        try:
            self.scheduler.add(spec)
        except QueueFull:
            assert self.scheduler.load().waiting >= 6
        except ValueError:
            slots = self.pool.num_blocks * self.size
            assert len(spec.prompt_token_ids) + max_tokens - 1 > slots or spec.context_tokens > slots
        else:
            self.runs[spec.seq_id] = Run(spec, expected, reason, got=list(sent) if handoff is Handoff.IN else [])

    @rule()
    def launch(self) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            return
        assert 0 < plan.num_tokens <= self.budget
        assert 0 < len(plan.rows) <= self.running
        assert len({row.seq_id for row in plan.rows}) == len(plan.rows)
        assert all(self.runs[row.seq_id].active for row in plan.rows)
        # A device copies what it needs of a row when it is launched.
        self.plans.append(StepPlan(plan.plan_id, tuple(self.copied(row) for row in plan.rows)))

    def copied(self, row: StepRow) -> StepRow:
        run, sample = self.runs[row.seq_id], row.sample
        ahead = sum(
            row.seq_id == other.seq_id and other.sample is not None for plan in self.plans for other in plan.rows
        )
        longest = min(len(run.spec.prompt_token_ids) + run.spec.sampling.max_tokens, MAX_LEN)
        assert row.start + len(row.token_ids) < longest, "the last token's KV is for nobody"
        if list(row.token_ids) == [DRAWN]:
            assert self.looks_ahead
            assert ahead
        else:
            assert not ahead
        if sample is None:
            return row
        known = sample.output_index - ahead
        assert list(sample.output_token_ids) == run.expected[:known]
        assert not (ahead and sample.params.presence_penalty)
        return row._replace(sample=sample._replace(output_token_ids=list(sample.output_token_ids)))

    @precondition(lambda self: self.plans)
    @rule()
    def finish(self) -> None:
        plan = self.plans.popleft()
        output = StepOutput(plan.plan_id, tuple(self.compute(row) for row in plan.rows))
        self.scheduler.complete(output)
        self.hear()

    @rule(steps=st.integers(1, 8), ahead=st.integers(0, 2))
    def drive(self, steps: int, ahead: int) -> None:
        """Steps with up to `ahead` more plans outstanding, while cancelled transports still write."""
        for _ in range(steps):
            self.launch()
            self.hear()
            for run in self.runs.values():
                if run.writing and not run.active:
                    self.overwrite(run)
            if len(self.plans) > ahead:
                self.finish()
            self.scheduler.check_integrity()

    @rule()
    def hear(self) -> None:
        for event in self.scheduler.take_events():
            run = self.runs[event.seq_id]
            assert run.active, f"{event} of a sequence that has ended"
            match event:
                case BlocksGranted():
                    assert run.grant is None
                    assert event.cached_tokens % self.size == 0
                    run.grant, run.writing = event, run.spec.handoff is Handoff.IN
                    read = self.read([ref.block_id for ref in event.blocks], event.cached_tokens)
                    assert read == run.kv(0, event.cached_tokens)
                case PrefillAdvanced():
                    run.computed = event.computed_tokens
                case Preempted():
                    assert run.spec.handoff is not Handoff.OUT
                    run.computed = 0
                case TokensEmitted():
                    self.take(run, event)

    def take(self, run: Run, event: TokensEmitted) -> None:
        sent = list(run.spec.output_token_ids)
        if not run.got:
            run.got = sent
        assert event.index == len(run.got)
        run.got += [token.token_id for token in event.tokens]
        assert run.got == run.expected[: len(run.got)]
        if event.finish_reason is not None:
            assert (run.got, event.finish_reason) == (run.expected, run.reason)
            run.finished = True

    @precondition(lambda self: any(run.writing for run in self.runs.values()))
    @rule(data=st.data())
    def write_garbage(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from([run for run in self.runs.values() if run.writing]), "run")
        self.overwrite(run)

    @precondition(lambda self: any(run.writing and run.active for run in self.runs.values()))
    @rule(data=st.data())
    def kv_arrives(self, data: st.DataObject) -> None:
        self.deliver(data.draw(st.sampled_from([r for r in self.runs.values() if r.writing and r.active]), "run"))

    @precondition(lambda self: any(run.writing for run in self.runs.values()))
    @rule(data=st.data(), order=st.sampled_from(["abort", "abort, stop", "stop, abort"]))
    def pull_fails(self, data: st.DataObject, order: str) -> None:
        run = data.draw(st.sampled_from([run for run in self.runs.values() if run.writing]), "run")
        for what in order.split(", "):
            if what == "abort":
                self.end(run)
            else:
                self.scheduler.writer_done(run.spec.seq_id)
                run.writing = False

    @precondition(lambda self: sum(run.active for run in self.runs.values()) > 3)
    @rule(data=st.data(), late=st.booleans())
    def abort(self, data: st.DataObject, late: bool) -> None:
        runs = [run for run in self.runs.values() if late or run.active]
        self.end(data.draw(st.sampled_from(runs), "run"))

    @precondition(lambda self: any(run.held for run in self.runs.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.read_and_release(data.draw(st.sampled_from([run for run in self.runs.values() if run.held]), "run"))

    @rule(role=st.sampled_from(Role), batching=BATCHING)
    def flip(self, role: Role, batching: str) -> None:
        self.scheduler.set_policy(policy_for(role, batching))

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            self.no_block_in_two_hands()

    def no_block_in_two_hands(self) -> None:
        """What an outstanding plan writes is its sequence's, and nobody else's."""
        for row in [row for plan in self.plans for row in plan.rows]:
            blocks = row.block_ids[row.start // self.size : (row.start + len(row.token_ids) - 1) // self.size + 1]
            assert set(blocks) <= set(self.pool.table(row.seq_id))
            others = self.pool.holders() - {row.seq_id, f"writer:{row.seq_id}"}
            assert not [name for name in others if set(blocks) & set(self.pool.table(name))]

    def compute(self, row: StepRow) -> RowOutput:
        """The device: writes the row's KV, and for a sample reads the whole context back."""
        run, end = self.runs[row.seq_id], row.start + len(row.token_ids)
        tokens = [*run.spec.prompt_token_ids, *run.expected]
        if end >= len(tokens):  # with the last one, or behind it
            self.kv[row.block_ids[row.start // self.size]][row.start % self.size] = -1
            return RowOutput(row.seq_id, (SampledToken(VOCAB - 1),))
        given = [self.drawn[row.seq_id] if token == DRAWN else token for token in row.token_ids]
        if given != tokens[row.start : end]:
            raise AssertionError(f"{row} is given {given}")
        for position, value in enumerate(run.kv(row.start, end), row.start):
            self.kv[row.block_ids[position // self.size]][position % self.size] = value
        if row.sample is None:
            return RowOutput(row.seq_id)
        assert row.sample.output_index == end - len(run.spec.prompt_token_ids)
        read = self.read(row.block_ids, end)
        assert read == run.kv(0, end)
        sample = row.sample
        token = draw(read[-1], sample.output_index, sample.params, sample.output_token_ids)
        self.drawn[row.seq_id] = token
        return RowOutput(row.seq_id, (SampledToken(token),))

    def read(self, block_ids: Sequence[int], end: int) -> list[int | None]:
        return [self.kv[block_ids[p // self.size]][p % self.size] for p in range(end)]

    def overwrite(self, run: Run) -> None:
        for block_id in self.blocks_to_write(run):
            self.kv[block_id] = [-1] * self.size

    def blocks_to_write(self, run: Run) -> list[int]:
        assert run.grant is not None
        refs = run.grant.blocks[run.grant.cached_tokens // self.size :]
        assert all(self.pool.generation(ref.block_id) == ref.generation for ref in refs)
        return [ref.block_id for ref in refs]

    def deliver(self, run: Run) -> None:
        """The transport: all KV of the context, into the blocks that were no hits, then the first token."""
        self.blocks_to_write(run)
        assert run.grant is not None
        spec, context = run.spec, run.spec.context_tokens
        for position, value in enumerate(run.kv(run.grant.cached_tokens, context), run.grant.cached_tokens):
            self.kv[run.grant.blocks[position // self.size].block_id][position % self.size] = value
        first = run.expected[spec.context_tokens - len(spec.prompt_token_ids)]
        self.scheduler.kv_ready(spec.seq_id, SampledToken(first))
        run.got.append(first)
        run.writing, run.kv_arrived = False, True

    def read_and_release(self, run: Run) -> None:
        """The decode worker's side: what it reads under the grant's references is this sequence's KV."""
        assert run.grant is not None
        refs, context = run.grant.blocks, run.spec.context_tokens
        assert all(self.pool.generation(ref.block_id) == ref.generation for ref in refs)
        assert self.read([ref.block_id for ref in refs], context) == run.kv(0, context)
        self.scheduler.release(run.spec.seq_id)
        self.scheduler.release(run.spec.seq_id)
        run.finished = True

    def end(self, run: Run) -> None:
        was_active = run.active
        ended = self.scheduler.abort(run.spec.seq_id)
        assert ended or not was_active or not run.active
        run.aborted = run.aborted or ended

    def teardown(self) -> None:
        """Driven on without new work, every sequence ends and every block comes back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20 * MAX_LEN * (len(self.runs) + 1)):
            self.hear()
            for run in list(self.runs.values()):
                if run.writing and run.active:
                    self.deliver(run)
                elif run.writing:
                    self.scheduler.writer_done(run.spec.seq_id)
                    run.writing = False
                if run.held:
                    self.read_and_release(run)
            if not any(run.active for run in self.runs.values()) and not self.plans:
                break
            self.launch()
            if self.plans:
                self.finish()
            self.scheduler.check_integrity()
        assert not [run.spec.seq_id for run in self.runs.values() if run.active]
        assert self.pool.holders() == frozenset()
        assert self.pool.num_available == self.pool.num_blocks
        load = self.scheduler.load()
        assert (load.waiting, load.running, load.held, load.queued_prefill_tokens) == (0, 0, 0, 0)
        self.scheduler.check_integrity()


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestScheduler = SchedulerMachine.TestCase
