"""Scheduler and paced device together: every stream is `expected_tokens`, whatever the engine did to produce it.

Every prefix is checked at every step, so a block handed out twice, freed too early or filled from elsewhere shows.
"""

from __future__ import annotations

import random

import pytest
from tandem.cluster.clock import VirtualClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.devices.paced import PacedDevice, expected_tokens
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import BlocksGranted, Preempted, SchedulerEvent, TokensEmitted
from tandem.cluster.types import (
    Handoff,
    Role,
    SamplingParams,
    SequenceSpec,
    StepTimeCoefficients,
)

VOCAB, EOS, EOS_PROBABILITY, BLOCK = 500, (3,), 0.03, 4


class Engine:
    def __init__(self, role: Role, num_blocks: int, *, prefix_cache: bool = True, plans: int = 1) -> None:
        self.clock = VirtualClock()
        self.pool = BlockPool(num_blocks, BLOCK)
        self.scheduler = Scheduler(
            block_pool=self.pool,
            prefix_cache=PrefixCache(self.pool, prefix_cache),
            policy=policy_for(role),
            clock=self.clock,
            max_batched_tokens=16,
            max_running=8,
            max_waiting=64,
            max_model_len=128,
            eos_token_ids=EOS,
            max_outstanding_plans=plans,
        )
        self.device = PacedDevice(
            VOCAB,
            block_size=BLOCK,
            num_blocks=num_blocks,
            coefficients=StepTimeCoefficients(step_s=0.01, prefill_token_s=0.001),
            clock=self.clock,
            eos_token_ids=EOS,
            eos_probability=EOS_PROBABILITY,
            pad_bytes_per_token=24,
            verify_every_step=True,
            raise_on_corruption=True,
        )
        self.outstanding = 0
        self.plans = plans
        self.preemptions = 0
        self.streams: dict[str, list[int]] = {}
        self.finished: set[str] = set()

    def step(self) -> list[SchedulerEvent]:
        """Launches what it can, collects one step."""
        while self.outstanding < self.plans and (plan := self.scheduler.schedule()) is not None:
            self.device.launch(plan)
            self.outstanding += 1
        if self.outstanding:
            self.scheduler.complete(self.device.collect())
            self.outstanding -= 1
        self.scheduler.check_integrity()
        events = self.scheduler.take_events()
        for event in events:
            self.preemptions += isinstance(event, Preempted)
            if isinstance(event, TokensEmitted):
                self.streams.setdefault(event.seq_id, []).extend(token.token_id for token in event.tokens)
                if event.finish_reason is not None:
                    self.finished.add(event.seq_id)
        return events


def requests(rng: random.Random, count: int) -> dict[str, SequenceSpec]:
    """Prompts that share prefixes, of all lengths, greedy and seeded."""
    stems = [tuple(rng.randrange(VOCAB) for _ in range(40)) for _ in range(3)]
    specs = {}
    for i in range(count):
        tail = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6)))
        params = SamplingParams(
            temperature=float(i % 2),
            seed=i,
            max_tokens=rng.randrange(1, 25),
            min_tokens=rng.randrange(0, 3),
            ignore_eos=i % 5 == 0,
        )
        prompt = rng.choice(stems)[: rng.randrange(0, 40)] + tail
        specs[str(i)] = SequenceSpec(seq_id=str(i), prompt_token_ids=prompt, sampling=params)
    return specs


def expected(spec: SequenceSpec) -> list[int]:
    options = {"vocab_size": VOCAB, "eos_token_ids": EOS, "eos_probability": EOS_PROBABILITY}
    return list(expected_tokens(spec.prompt_token_ids, spec.sampling.max_tokens, spec.sampling, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("plans", [1, 2])
def test_mixed_engine_under_pressure(prefix_cache: bool, plans: int) -> None:
    rng = random.Random(plans)
    specs = requests(rng, 50)
    engine = Engine(Role.MIXED, 24, prefix_cache=prefix_cache, plans=plans)
    waiting, aborted = list(specs.values()), set()
    for _ in range(3000):
        if waiting and rng.random() < 0.5:
            engine.scheduler.add(waiting.pop())
        if rng.random() < 0.02 and (live := sorted(set(engine.streams) - engine.finished - aborted)):
            victim = rng.choice(live)
            engine.scheduler.abort(victim)
            aborted.add(victim)
        engine.step()
        if not waiting and len(engine.finished | aborted) == len(specs):
            break
    assert engine.finished | aborted == set(specs)
    for seq_id in engine.finished - aborted:
        assert engine.streams[seq_id] == expected(specs[seq_id])
    assert engine.preemptions > 0
    while engine.outstanding:
        engine.step()
    assert engine.pool.num_held == 0


def test_split_engines_hand_every_request_over() -> None:
    """Prefill and decode engines with an instant transport between them, both short of blocks."""
    specs = requests(random.Random(9), 40)
    prefill, decode = Engine(Role.PREFILL, 48), Engine(Role.DECODE, 40)
    theirs: dict[str, BlocksGranted] = {}
    ours: dict[str, BlocksGranted] = {}
    first: dict[str, TokensEmitted] = {}
    for spec in specs.values():
        for engine, handoff in ((prefill, Handoff.OUT), (decode, Handoff.IN)):
            if engine is decode and len(expected(spec)) == 1:
                continue
            engine.scheduler.add(
                SequenceSpec(
                    seq_id=spec.seq_id,
                    prompt_token_ids=spec.prompt_token_ids,
                    sampling=spec.sampling,
                    handoff=handoff,
                )
            )
    for _ in range(3000):
        for event in prefill.step():
            if isinstance(event, BlocksGranted):
                theirs[event.seq_id] = event
            elif isinstance(event, TokensEmitted) and event.finish_reason is None:
                first[event.seq_id] = event
        ours |= {event.seq_id: event for event in decode.step() if isinstance(event, BlocksGranted)}
        for seq_id in sorted(set(first) & set(ours)):
            granted = ours.pop(seq_id)
            pairs = list(zip(theirs[seq_id].blocks, granted.blocks, strict=True))
            for source, target in pairs[granted.cached_tokens // BLOCK :]:
                decode.device.kv.write_block(target.block_id, prefill.device.kv.read_block(source.block_id))
            decode.scheduler.kv_ready(seq_id, first.pop(seq_id).tokens[0])
            prefill.scheduler.release(seq_id)
        if prefill.finished | decode.finished == set(specs):
            break
    for seq_id, spec in specs.items():
        stream = prefill.streams[seq_id] + decode.streams.get(seq_id, [])
        assert stream == expected(spec)
    assert prefill.pool.num_held == decode.pool.num_held == 0
