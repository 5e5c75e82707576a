"""Decode steps taken together leave what they leave one by one: lengths, counts, events and their times."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.plan import RowOutput, StepOutput
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import BlocksGranted, Preempted, TokensEmitted
from tandem.cluster.types import FinishReason, Handoff, Role, SampledToken, SamplingParams, SequenceSpec

TOKEN = SampledToken(1)
STEPS = 120


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A sequence, the step before which it comes, and (IN) how many steps after its grant its KV is there."""

    at: int
    prompt: int
    max_tokens: int
    handoff: Handoff
    pull_steps: int


@dataclass
class Driven:
    """A scheduler, driven by `run` to the end of its arrivals."""

    blocks: int
    max_running: int
    role: Role
    batching: str
    prefix_cache: bool
    together: bool
    steps_alone: int = 0
    ready: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    log: list[tuple[object, ...]] = field(default_factory=list)
    seen: dict[int, tuple[object, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pool = BlockPool(self.blocks, 4)
        self.scheduler = Scheduler(
            block_pool=pool,
            prefix_cache=PrefixCache(pool, enabled=self.prefix_cache),
            policy=policy_for(self.role, self.batching),
            clock=VirtualClock(),
            max_batched_tokens=16,
            max_running=self.max_running,
            max_waiting=1000,
            max_model_len=40,
            eos_token_ids=(0,),
        )

    def run(self, arrivals: list[Arrival]) -> None:
        named = {str(number): arrival for number, arrival in enumerate(arrivals)}
        stops = {arrival.at for arrival in arrivals}
        step = 0
        while step < STEPS:
            for seq_id, arrival in named.items():
                if arrival.at == step:
                    self._add(seq_id, arrival)
            for seq_id in self.ready.pop(step, ()):
                self.scheduler.kv_ready(seq_id, TOKEN)
            load = self.scheduler.load()
            self.seen[step] = (load.waiting, load.running, load.free_blocks + load.cached_blocks, load.context_tokens)
            later = [at for at in (*stops, *self.ready, STEPS) if at > step]
            run = self.scheduler.begin_run(min(later) - step) if self.together else None
            if run is None:
                self._step()
                step += 1
            else:
                self._hear(step + 1, named)  # grants: their KV may be there before the run ends
                steps = min([run.steps, *(at - step for at in self.ready)])
                self.scheduler.take_run(steps, TOKEN)
                step += steps
            self._hear(step, named)
            self.scheduler.check_integrity()

    def _add(self, seq_id: str, arrival: Arrival) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=arrival.max_tokens, ignore_eos=True)
        # Shared prefixes, but no two alike: who computes the same content twice may find it kept or not.
        prompt = (*range(2, 1 + arrival.prompt), 100 + int(seq_id))
        self.scheduler.add(
            SequenceSpec(seq_id=seq_id, prompt_token_ids=prompt, sampling=sampling, handoff=arrival.handoff)
        )

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            return
        self.steps_alone += 1
        rows = tuple(RowOutput(row.seq_id, (TOKEN,) if row.sample is not None else ()) for row in plan.rows)
        self.scheduler.complete(StepOutput(plan.plan_id, rows))

    def _hear(self, step: int, named: dict[str, Arrival]) -> None:
        """Grants, preemptions, first tokens and ends, each with the step after which it came."""
        for event in self.scheduler.take_events():
            match event:
                case BlocksGranted():
                    self.ready[step + named[event.seq_id].pull_steps].append(event.seq_id)
                    self.log.append((step, "granted", event.seq_id, event.cached_tokens))
                case Preempted():
                    self.log.append((step, "preempted", event.seq_id))
                case TokensEmitted():
                    index = event.index + len(event.tokens) - 1
                    if event.finish_reason is not None:
                        self.log.append((step, "ended", event.seq_id, index, event.finish_reason))
                    elif event.index == (named[event.seq_id].handoff is Handoff.IN):
                        self.log.append((step, "first", event.seq_id, index))


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 40),
        prompt=st.sampled_from([1, 3, 4, 5, 9, 14]),
        max_tokens=st.sampled_from([2, 3, 8, 20, 30, 60]),
        handoff=st.sampled_from([Handoff.NONE, Handoff.IN]),
        pull_steps=st.integers(1, 3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=ARRIVALS,
    blocks=st.sampled_from([10, 14, 30, 100]),
    max_running=st.sampled_from([1, 3, 8]),
    role=st.sampled_from([Role.DECODE, Role.MIXED, Role.PREFILL]),
    batching=st.sampled_from(["iteration", "iteration", "request", "prompts_alone"]),
    prefix_cache=st.booleans(),
)
def test_steps_taken_together_leave_what_they_leave_one_by_one(
    arrivals: list[Arrival], blocks: int, max_running: int, role: Role, batching: str, prefix_cache: bool
) -> None:
    one_by_one, together = (
        Driven(blocks, max_running, role, batching, prefix_cache, together) for together in (False, True)
    )
    for driven in (one_by_one, together):
        driven.run(arrivals)
    assert together.log == one_by_one.log
    assert {step: one_by_one.seen[step] for step in together.seen} == together.seen


def test_a_long_answer_takes_few_runs() -> None:
    driven = Driven(100, 8, Role.DECODE, "iteration", False, True)
    driven.run([Arrival(at=0, prompt=5, max_tokens=30, handoff=Handoff.NONE, pull_steps=1)])
    assert driven.log == [(1, "first", "0", 0), (30, "ended", "0", 29, FinishReason.LENGTH)]
    assert driven.steps_alone == 1, "its prompt's"


def test_a_prompt_is_computed_beside_rows_in_lockstep() -> None:
    """It comes while another one decodes: no step is taken one by one for it, not even where it takes two of them."""
    driven = Driven(100, 8, Role.MIXED, "iteration", False, True)
    driven.run(
        [
            Arrival(at=0, prompt=5, max_tokens=30, handoff=Handoff.NONE, pull_steps=1),
            Arrival(at=10, prompt=20, max_tokens=3, handoff=Handoff.NONE, pull_steps=1),
        ]
    )
    assert [entry[:3] for entry in driven.log] == [
        (1, "first", "0"),
        (12, "first", "1"),
        (14, "ended", "1"),
        (30, "ended", "0"),
    ]
    assert driven.steps_alone == 1, "the first prompt's"
