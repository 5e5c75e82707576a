"""What the transcripts (test_scheduler_golden) do not show well: limits, timings, misuse, fairness, cost."""

from __future__ import annotations

from collections import defaultdict

import pytest
from instant_engine import EOS, Engine, rows
from tandem.cluster.engine.plan import RowOutput, StepOutput
from tandem.cluster.engine.policies import BatchPolicy, DecodePolicy, MixedPolicy, PrefillPolicy
from tandem.cluster.engine.scheduler_events import (
    BlocksGranted,
    Preempted,
    SequenceFailed,
    TokensEmitted,
)
from tandem.cluster.types import FinishReason, Handoff, SampledToken


def test_end_of_sequence_and_stop_tokens() -> None:
    engine = Engine()
    engine.add("eos", max_tokens=9)
    engine.add("ignored", max_tokens=3, ignore_eos=True)
    engine.add("stop", max_tokens=9, stop_token_ids=(7, 101))
    engine.draw = lambda seq_id, index: 100 + index if seq_id == "stop" else EOS
    for _ in range(4):
        engine.step()
    ends = {name: (engine.last(name).finish_reason, engine.last(name).stop_token_id) for name in engine.tokens}
    assert ends == {
        "eos": (FinishReason.STOP, None),
        "ignored": (FinishReason.LENGTH, None),
        "stop": (FinishReason.STOP, 101),
    }
    assert engine.tokens == {"eos": [EOS], "ignored": [EOS] * 3, "stop": [100, 101]}


def test_min_tokens_bans_what_would_end_the_choice() -> None:
    engine = Engine()
    engine.add("a", max_tokens=9, min_tokens=2, stop_token_ids=(7,))
    engine.add("b", max_tokens=9, min_tokens=1, stop_token_ids=(7,), ignore_eos=True)
    banned = defaultdict(list)
    for _ in range(4):
        plan = engine.step()
        assert plan is not None
        for row in plan.rows:
            assert row.sample is not None
            banned[row.seq_id].append(row.sample.banned_token_ids)
    assert banned == {"a": [(0, 7), (0, 7), (), ()], "b": [(7,), (), (), ()]}


def test_the_model_length_ends_a_choice() -> None:
    engine = Engine()
    engine.add("a", prompt=126, max_tokens=100)
    for _ in range(4):
        engine.step()
    assert engine.tokens["a"] == [100, 101]
    assert engine.last("a").finish_reason is FinishReason.LENGTH


def test_timings_are_from_arrival_to_admission_to_first_token() -> None:
    engine = Engine(budget=8, running=1)
    engine.add("a", prompt=16, max_tokens=2)
    engine.add("b", max_tokens=1)
    for _ in range(4):
        plan = engine.scheduler.schedule()
        engine.clock.advance(0.5)
        assert plan is not None
        engine.finish(plan)
    a0, a1, b0 = [event for event in engine.scheduler.take_events() if isinstance(event, TokensEmitted)]
    assert (a0.queue_s, a0.prefill_s) == (0.0, 1.0)
    assert (a1.queue_s, a1.prefill_s) == (0.0, 1.0)
    assert (b0.queue_s, b0.prefill_s) == (1.5, 0.5)


def test_blocks_in_an_outstanding_plan_are_no_hits_yet() -> None:
    engine = Engine(budget=8, plans=3)
    engine.add("a", prompt=24)
    first, second = engine.scheduler.schedule(), engine.scheduler.schedule()
    assert (rows(first), rows(second)) == ([("a", 0, 8)], [("a", 8, 8)])
    assert first is not None
    engine.finish(first)
    engine.add("b", prompt=24, text="a", handoff=Handoff.IN)
    engine.scheduler.schedule()
    (granted,) = [event for event in engine.scheduler.take_events() if isinstance(event, BlocksGranted)]
    assert granted.cached_tokens == 8
    engine.scheduler.check_integrity()


def test_kv_ready_before_the_grant_is_a_bug_of_the_caller() -> None:
    engine = Engine()
    engine.add("a", handoff=Handoff.IN)
    with pytest.raises(AssertionError, match="no blocks were granted"):
        engine.scheduler.kv_ready("a", SampledToken(5))
    engine.scheduler.kv_ready("never heard of", SampledToken(5))
    engine.scheduler.writer_done("never heard of")
    engine.scheduler.release("never heard of")


def test_a_wrong_output_is_a_bug_of_the_device() -> None:
    engine = Engine()
    engine.add("a")
    plan = engine.scheduler.schedule()
    assert plan is not None
    with pytest.raises(AssertionError, match="wants"):
        engine.scheduler.complete(StepOutput(plan.plan_id, (RowOutput("a"),)))
    with pytest.raises(AssertionError, match="is the oldest"):
        engine.scheduler.complete(StepOutput(plan.plan_id + 1, (RowOutput("a", (SampledToken(1),)),)))
    engine.finish(plan)
    with pytest.raises(AssertionError, match="no plan is outstanding"):
        engine.scheduler.complete(StepOutput(plan.plan_id, ()))
    engine.scheduler.check_integrity()


def test_a_row_that_fails_ends_its_sequence_alone_and_its_kv_is_never_found_again() -> None:
    engine = Engine(budget=8, plans=2)
    engine.add("good", prompt=4)
    engine.add("bad", prompt=24)
    first, second = engine.scheduler.schedule(), engine.scheduler.schedule()
    assert first is not None
    assert rows(second) == [("bad", 4, 8)]
    error = RowOutput("bad", error="logits are not numbers")
    engine.scheduler.complete(StepOutput(first.plan_id, (RowOutput("good", (SampledToken(100),)), error)))
    engine.scheduler.check_integrity()
    assert engine.scheduler.take_events()[-1] == SequenceFailed(seq_id="bad", message="logits are not numbers")
    assert engine.pool.table("bad")  # the second plan still writes
    assert second is not None
    engine.finish(second)
    assert engine.pool.holders() == {"good"}
    assert engine.pool.num_cached == 0
    for _ in range(4):
        engine.step()
    assert engine.tokens["good"] == [101, 102, 103]
    assert engine.pool.num_cached == 1
    engine.scheduler.check_integrity()


def test_an_abort_before_the_grant_was_heard_frees_the_writers_hold_too() -> None:
    engine = Engine()
    engine.add("a", handoff=Handoff.IN)
    assert engine.scheduler.schedule() is None
    assert engine.pool.holders() == {"a", "writer:a"}
    assert engine.scheduler.abort("a")
    assert engine.scheduler.take_events() == []
    assert engine.pool.holders() == frozenset()


def test_who_needs_no_computing_may_pass_who_only_lacks_budget() -> None:
    engine = Engine(budget=8, policy=DecodePolicy())
    engine.add("long", prompt=40)
    engine.step()
    engine.add("local", prompt=8)
    engine.add("pulled", prompt=8, handoff=Handoff.IN)
    engine.step()
    assert [event.seq_id for event in engine.events if isinstance(event, BlocksGranted)] == ["pulled"]
    assert engine.scheduler.load().waiting == 1


def test_who_lacks_budget_keeps_a_place_in_the_batch() -> None:
    engine = Engine(budget=8, running=2)
    engine.add("long", prompt=16)
    engine.add("next", prompt=8)
    engine.add("pulled", prompt=8, handoff=Handoff.IN)
    engine.step()
    assert engine.events[-1].seq_id == "long"
    assert engine.scheduler.load().waiting == 2
    engine.step()
    assert rows(engine.step())[-1][0] == "next"


def test_nobody_passes_who_lacks_blocks() -> None:
    engine = Engine(blocks=16, size=4)
    engine.add("a", prompt=40, max_tokens=2)
    engine.step()
    engine.add("big", prompt=30)
    engine.add("pulled", prompt=4, handoff=Handoff.IN)
    engine.add("small", prompt=4)
    assert rows(engine.step()) == [("a", 40, 1)]
    assert engine.pool.holders() == frozenset()  # a has ended, nobody else was let in
    assert rows(engine.step()) == [("big", 0, 30), ("small", 0, 4)]


def test_the_running_batch_is_bounded_and_so_is_a_step() -> None:
    engine = Engine(budget=10, running=3)
    for name in "abcdef":
        engine.add(name, prompt=7, max_tokens=3)
    for _ in range(20):
        plan = engine.step()
        if plan is None:
            break
        assert len(plan.rows) <= 3
        assert plan.num_tokens <= 10
    assert all(len(engine.tokens[name]) == 3 for name in "abcdef")


def test_a_prompt_never_stops_decodes_and_decodes_never_stop_a_prompt() -> None:
    """Sarathi-Serve's stall-free batching: every decode takes part in every step while a long prompt is computed."""
    engine = Engine(budget=8, running=8, blocks=128)
    for name in "abcdefg":
        engine.add(name, prompt=1, max_tokens=40)
    engine.step()
    engine.add("long", prompt=20, max_tokens=1)
    for _ in range(20):
        plan = engine.step()
        assert rows(plan)[-1][0] == "long"
        assert len(rows(plan)) == 8
    assert engine.tokens["long"] == [100]


def test_the_oldest_gets_on_at_every_step_however_tight_memory_is() -> None:
    engine = Engine(blocks=12, size=2, running=6)
    names = [f"s{i}" for i in range(6)]
    for name in names:
        engine.add(name, prompt=3, max_tokens=20)
    ended: set[str] = set()
    for _ in range(400):
        oldest = next((name for name in names if name not in ended), None)
        if oldest is None:
            break
        have = len(engine.tokens[oldest])
        engine.step()
        assert len(engine.tokens[oldest]) == have + 1
        ended = {name for name in names if len(engine.tokens[name]) == 20}
    assert ended == set(names)
    assert engine.scheduler.load().preemptions_total > 0
    assert engine.tokens == {name: [100 + i for i in range(20)] for name in names}
    assert engine.pool.holders() == frozenset()


def test_a_preempted_sequence_that_had_been_pulled_is_prefilled_here() -> None:
    engine = Engine(blocks=6, size=4, policy=DecodePolicy())
    engine.add("a", prompt=7, max_tokens=10)
    engine.add("b", prompt=7, max_tokens=10, handoff=Handoff.IN)
    engine.step()
    engine.scheduler.kv_ready("b", SampledToken(100))
    for _ in range(30):
        engine.step()
    assert [event.seq_id for event in engine.events if isinstance(event, Preempted)] == ["b"]
    assert [event.seq_id for event in engine.events if isinstance(event, BlocksGranted)] == ["b"]
    assert engine.tokens["b"] == [101 + i for i in range(9)]


def test_blocks_that_a_reader_keeps_stop_growth_but_are_never_taken() -> None:
    engine = Engine(blocks=4, size=4)
    engine.add("held", prompt=8, handoff=Handoff.OUT)
    engine.add("a", prompt=4, max_tokens=9)
    for _ in range(5):
        engine.step()
    assert engine.step() is None  # a needs a third block, the reader keeps two
    assert engine.scheduler.load().held == 1
    engine.scheduler.release("held")
    for _ in range(9):
        engine.step()
    assert len(engine.tokens["a"]) == 9


def test_all_handoffs_at_once_across_role_flips() -> None:
    engine = Engine(blocks=64, policy=PrefillPolicy())
    kinds = list(Handoff)
    for i in range(9):
        engine.add(f"s{i}", prompt=5 + i, handoff=kinds[i % 3], max_tokens=6)
    policies: list[BatchPolicy] = [DecodePolicy(), MixedPolicy(), PrefillPolicy()]
    for step in range(40):
        engine.scheduler.set_policy(policies[step % 3])
        engine.step()
        for event in engine.events:
            if isinstance(event, BlocksGranted) and engine.pool.table(f"writer:{event.seq_id}"):
                engine.scheduler.kv_ready(event.seq_id, SampledToken(100))
    assert engine.scheduler.load().held == 3
    for i in range(9):
        assert len(engine.tokens[f"s{i}"]) == {Handoff.NONE: 6, Handoff.OUT: 1, Handoff.IN: 5}[kinds[i % 3]]
        engine.scheduler.release(f"s{i}")
    assert engine.pool.holders() == frozenset()


def test_load_counts() -> None:
    engine = Engine(blocks=32, budget=8, running=3)
    engine.add("a", prompt=12, handoff=Handoff.OUT)
    engine.add("b", prompt=20)
    engine.add("c", prompt=6, handoff=Handoff.IN)
    engine.step()
    load = engine.scheduler.load()
    assert (load.waiting, load.running, load.held) == (1, 2, 0)  # c needs no budget: it pulls already
    assert load.queued_prefill_tokens == 4 + 20
    assert (load.num_blocks, load.free_blocks, load.cached_blocks) == (32, 32 - 3 - 2, 0)
    assert (load.prefix_queries_tokens_total, load.prefix_hits_tokens_total) == (18, 0)
    engine.step()
    load = engine.scheduler.load()
    assert (load.waiting, load.running, load.held) == (0, 2, 1)
    assert load.queued_prefill_tokens == 20 - 4
    assert load.context_tokens == 20


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("running", 0, "max_running: 0"),
        ("plans", 0, "max_outstanding_plans: 0"),
        ("budget", 7, "max_batched_tokens: 7 is below max_running, 8"),
    ],
)
def test_limits_are_checked(limit: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(**{limit: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("plans", [1, 2])
def test_a_row_that_fails_ends_its_sequence_alone(plans: int) -> None:
    """RowOutput.error: bad logits or foreign KV. The batch goes on; nothing of the failed step becomes a prefix."""
    engine = Engine(plans=plans, budget=32)
    engine.add("good")
    engine.add("bad", prompt=12)
    plan = engine.scheduler.schedule()
    assert plan is not None
    rows = tuple(
        RowOutput(row.seq_id, error="logits are not numbers")
        if row.seq_id == "bad"
        else RowOutput(row.seq_id, (SampledToken(7),))
        for row in plan.rows
    )
    engine.scheduler.complete(StepOutput(plan.plan_id, rows))
    events = engine.scheduler.take_events()
    assert SequenceFailed(seq_id="bad", message="logits are not numbers") in events
    assert [event.tokens[0].token_id for event in events if isinstance(event, TokensEmitted)] == [7]
    engine.scheduler.check_integrity()
    assert not engine.scheduler.abort("bad")
    engine.scheduler.abort("good")
    load = engine.scheduler.load()
    assert load.free_blocks + load.cached_blocks == load.num_blocks
    assert load.cached_blocks == 2, "only the blocks of the sequence that did not fail"
