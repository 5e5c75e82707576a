"""What a simulation models, one thing at a time, against small sums by hand: steps of `sim_cases.COSTS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from sim_cases import COSTS, NO_PROMISE, assert_clean, cluster, split, worker
from tandem.cluster.latency.links import Link
from tandem.cluster.sim.choice import SimChoice
from tandem.cluster.sim.cluster import Failure, SimCluster
from tandem.cluster.sim.deploy import Replica, worker_spec
from tandem.cluster.sim.record import Recorder
from tandem.cluster.sim.request import Asked, Outcome
from tandem.cluster.sim.scenario import read_scenario
from tandem.cluster.sim.timeline import Timeline
from tandem.cluster.types import Role, Urgency
from tandem.router.slo_classes import Promise
from tandem.router.tries import Tries

SLOW = Link(name="slow", bandwidth_gb_s=1e-3)
"""A block of 1000 bytes in a millisecond."""


def ask(name: str, prompt: int, answer: int, at_s: float = 0.0) -> Asked:
    return Asked(request_id=name, arrival_s=at_s, prompt_token_ids=(1,) * prompt, output_tokens=answer)


def watched(simulated: SimCluster, asked: Sequence[Asked]) -> tuple[list[Outcome], Recorder, SimCluster]:
    """The same cluster, with its steps and transfers."""
    recorder = Recorder(sample_period_s=0.001, spans=True)
    again = SimCluster(simulated._spec, recorder)
    return again.run(asked), recorder, again


def mixed(**fields: Any) -> SimCluster:
    return cluster(worker("m", Role.MIXED, **fields))


def prefill_steps(seen: Recorder, worker_id: str) -> list[int]:
    return [step.prefill_tokens for step in seen.steps if step.worker_id == worker_id and step.prefill_tokens]


# --- steps and batches ------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_of_the_step_or_whole() -> None:
    """1000 tokens in four steps of at most 256, each of which costs its 8 ms, or in one."""
    for most_tokens, chunks in ((256, [256, 256, 256, 232]), (2048, [1000])):
        [outcome], seen, _ = watched(mixed(max_batched_tokens=most_tokens), [ask("q", 1000, 1)])
        assert prefill_steps(seen, "m") == chunks
        assert outcome.ttft_s == pytest.approx(len(chunks) * 0.008 + 0.1)


@pytest.mark.parametrize(("batching", "tokens"), [("prompts_alone", 1100), ("padded", 2000)])
def test_prompts_of_a_step_may_be_padded_to_the_longest(batching: str, tokens: int) -> None:
    """Two that wait behind a third: 1000 and 100 tokens in one step, or twice 1000."""
    requests = [ask("first", 500, 1), ask("long", 1000, 1, at_s=0.01), ask("short", 100, 1, at_s=0.02)]
    outcomes, seen, _ = watched(mixed(max_batched_tokens=4096, batching=batching), requests)
    assert prefill_steps(seen, "m")[1:] == [tokens]
    first, long, short = outcomes
    assert long.first_token_s == short.first_token_s
    assert long.first_token_s - first.first_token_s == pytest.approx(0.008 + tokens * 1e-4)


@pytest.mark.parametrize(
    ("fields", "longest_step_s", "together"),
    [
        ({"max_batched_tokens": 256}, 0.0105 + 255 * 1e-4, True),
        ({"max_batched_tokens": 2048}, 0.0105 + 0.1, True),
        ({"max_batched_tokens": 2048, "batching": "prompts_alone"}, 0.108, False),
    ],
    ids=["chunks", "whole", "alone"],
)
def test_a_prompt_delays_the_answers_beside_it_by_its_chunk(
    fields: dict[str, Any], longest_step_s: float, together: bool
) -> None:
    """An answer is under way when a prompt of 1000 tokens comes: what its next token waits for is one step of both, or
    the whole prompt before it where the two never share a step.
    """
    outcomes, seen, _ = watched(mixed(**fields), [ask("answer", 16, 60), ask("prompt", 1000, 2, at_s=0.2)])
    assert all(outcome.done for outcome in outcomes)
    longest = max(seen.steps, key=lambda step: (step.end_s - step.start_s) / step.steps)
    context_s = longest.context_tokens * 1e-7
    assert longest.end_s - longest.start_s == pytest.approx(longest_step_s + context_s)
    assert any(step.prefill_tokens and step.decode_rows for step in seen.steps) == together


def test_a_batch_of_whole_requests_lets_nobody_in_before_it_has_ended() -> None:
    """Orca's comparison: who comes second waits for the end of the first, or joins it at the next step."""
    asked = [ask("first", 16, 50), ask("second", 16, 2, at_s=0.1)]
    for batching, joins in (("iteration", True), ("request", False)):
        first, second = mixed(batching=batching).run(asked)
        assert first.last_token_s is not None
        assert second.first_token_s is not None
        assert (second.first_token_s < first.last_token_s) == joins


def test_memory_bounds_who_decodes_together_and_the_next_joins_when_one_has_ended() -> None:
    """A context of 64 + 33 tokens takes 7 blocks: in 14 there are two at a time, in 4000 all four, in 4000 with three
    places three.
    """
    asked = [ask(str(place), 64, 33) for place in range(4)]
    for fields, most in (({"num_blocks": 14}, 2), ({}, 4), ({"max_running": 3}, 3)):
        outcomes, seen, simulated = watched(mixed(max_model_len=100, max_batched_tokens=512, **fields), asked)
        assert all(outcome.done for outcome in outcomes)
        assert max(step.decode_rows for step in seen.steps) == most
        assert max(sample[2][0].running for sample in seen.samples) == most
        if most == 2:
            ends = sorted(outcome.last_token_s or 0.0 for outcome in outcomes)
            firsts = sorted(outcome.first_token_s or 0.0 for outcome in outcomes)
            assert firsts[2] >= ends[0]
        assert_clean(simulated)


def test_who_is_preempted_is_computed_again_and_draws_no_token_twice() -> None:
    """Two answers that grow out of 20 blocks together: the newer one gives way, and its context is prefilled again."""
    asked = [ask("older", 96, 120), ask("newer", 96, 120)]
    outcomes, seen, simulated = watched(mixed(num_blocks=20, max_model_len=300), asked)
    [preempting] = simulated.workers
    assert preempting.scheduler.load().preemptions_total >= 1
    assert [outcome.output_tokens for outcome in outcomes] == [120, 120]
    assert sum(prefill_steps(seen, "m")) > 2 * 96
    drawn = sum(step.steps * step.decode_rows for step in seen.steps)
    again = preempting.scheduler.load().preemptions_total
    assert drawn == 2 * 119 - again, "the step that computes a context again draws its next token"
    older, newer = outcomes
    assert older.last_token_s is not None
    assert newer.last_token_s is not None
    assert older.last_token_s < newer.last_token_s
    assert_clean(simulated)


def test_a_worker_that_is_asked_in_the_middle_of_a_run_of_steps_says_how_far_it_has_come() -> None:
    """Steps are taken together, but what heartbeats and watchers see of memory grows with each of them."""
    [outcome], seen, _ = watched(mixed(), [ask("q", 16, 300)])
    assert max(step.steps for step in seen.steps) > 100
    first_s, last_s = outcome.first_token_s, outcome.last_token_s
    assert first_s is not None
    assert last_s is not None
    under_way = [(at_s, worker.used_blocks) for at_s, _, (worker,) in seen.samples if first_s < at_s < last_s]
    for at_s, used_blocks in under_way:
        tokens = 17 + 299 * (at_s - first_s) / (last_s - first_s)
        assert used_blocks == pytest.approx(tokens / 16, abs=2.0), at_s
    assert len({used_blocks for _, used_blocks in under_way}) >= 18


def test_a_full_queue_of_the_router_refuses_and_one_that_waits_takes_no_place_behind_its_first_token() -> None:
    """Of eight places those without a promise have half: the fifth of a burst is refused, a later one is let in."""
    asked = [ask(str(place), 500, 50, at_s=place * 1e-6) for place in range(6)] + [ask("later", 500, 50, at_s=0.5)]
    outcomes = cluster(*split(), refuses=True, max_waiting=8).run(asked)
    assert [outcome.refused for outcome in outcomes] == ["", "", "", "", *["overloaded"] * 2, ""]
    assert all(outcome.done != bool(outcome.refused) for outcome in outcomes)


def test_a_decode_worker_promises_no_more_memory_and_places_than_it_has() -> None:
    """Ten blocks, of which a context of 100 tokens takes seven; or one place in its queue."""
    for fields, granted in (
        ({"num_blocks": 10}, 1),
        ({"num_blocks": 10, "credit_factor": 2.0}, 2),
        ({"max_waiting": 1}, 1),
        ({}, 3),
    ):
        decode = cluster(*split(max_model_len=160, **fields)).workers[1]
        credits = [decode.reserve(f"q{place}", 1, 100, Urgency()) for place in range(3)]
        assert sum(credit is not None for credit in credits) == granted, fields


# --- pipelines --------------------------------------------------------------------------------------------------------

STAGES = replace(COSTS, prefill_step_s=0.0, prefill_token_s=2e-4)
"""Prompts of 0.2 ms a token, through all stages."""


def test_a_pipeline_takes_the_next_prompt_after_a_stage_and_lets_none_overtake() -> None:
    """200 tokens: 40 ms, two stages of 20 ms. Equal ones follow each other every 20 ms. One of 50 tokens enters as
    soon, but its second stage waits for the large one's: a bubble. A large one behind a small one waits for its own.
    """
    for stages, sizes, ends_s in (
        (2, (200, 200, 200), (0.04, 0.06, 0.08)),
        (2, (200, 50), (0.04, 0.045)),
        (2, (50, 200), (0.01, 0.045)),
        (4, (200, 200, 200), (0.04, 0.05, 0.06)),
    ):
        asked = [ask(str(place), size, 1, at_s=place * 1e-9) for place, size in enumerate(sizes)]
        costs = replace(STAGES, pipeline_stages=stages)
        outcomes = mixed(costs=costs, max_batched_tokens=200, max_running=200).run(asked)
        assert [outcome.last_token_s for outcome in outcomes] == pytest.approx(ends_s, abs=1e-6), sizes


def test_routers_hear_how_fast_a_pipeline_takes_prompts_not_how_long_one_is_in_it() -> None:
    asked = [ask(str(place), 20 + 37 * place % 400, 1, at_s=place * 1.0) for place in range(60)]
    for stages in (1, 4):
        simulated = mixed(costs=replace(STAGES, pipeline_stages=stages))
        simulated.run(asked)
        [pipeline] = simulated.workers
        # One line for prompts and for the decode steps that it was told of, which begin higher.
        assert pipeline.status().step_time.prefill_token_s == pytest.approx(2e-4 / stages, rel=0.15), stages


def test_decode_rows_of_a_pipeline_are_divided_into_micro_batches() -> None:
    """Nine answers: in two stages five rows at most, whose step of 10 + 5 x 0.5 ms all wait for; in one all nine."""
    asked = [ask(str(place), 16, 40) for place in range(9)]
    for stages, rows in ((1, 9), (2, 5), (9, 1)):
        _, seen, _ = watched(mixed(costs=replace(COSTS, pipeline_stages=stages)), asked)
        full = max(seen.steps, key=lambda step: (step.decode_rows, step.steps))
        assert full.decode_rows == 9
        step_s = (full.end_s - full.start_s) / full.steps
        assert step_s == pytest.approx(0.01 + rows * 0.0005, abs=rows * 60 * 1e-7), stages


# --- links ------------------------------------------------------------------------------------------------------------


def exposed_ms(*workers: Any, count: int = 1, between: Link = SLOW, prompt: int = 64) -> list[float]:
    """Waits for KV between nodes, of prompts that come together; 64 tokens are four blocks."""
    outcomes = cluster(*workers, between=between).run([ask(str(place), prompt, 3) for place in range(count)])
    assert all(outcome.transferred_bytes for outcome in outcomes)
    return sorted(outcome.exposed_transfer_s * 1e3 for outcome in outcomes)


def at(node: str, name: str, role: Role) -> Any:
    return worker(name, role, node=node)


def test_kv_inside_a_node_does_not_cross_the_network() -> None:
    p, near, far = at("a", "p", Role.PREFILL), at("a", "d", Role.DECODE), at("b", "d", Role.DECODE)
    assert exposed_ms(p, near) == pytest.approx([0.0], abs=0.1)
    assert exposed_ms(p, far) == pytest.approx([4.0])
    late = replace(SLOW, latency_us=2000.0)
    assert exposed_ms(p, far, between=late) == pytest.approx([6.0])


def test_what_leaves_one_node_or_enters_one_shares_its_link() -> None:
    """Two handoffs at the same time: out of one node, into one node, or with nothing in common."""
    out_of_one = [at("a", "p0", Role.PREFILL), at("a", "p1", Role.PREFILL)]
    out_of_two = [at("a", "p0", Role.PREFILL), at("b", "p1", Role.PREFILL)]
    into_one = [at("c", "d0", Role.DECODE), at("c", "d1", Role.DECODE)]
    into_two = [at("c", "d0", Role.DECODE), at("d", "d1", Role.DECODE)]
    assert exposed_ms(*out_of_two, *into_two, count=2) == pytest.approx([4.0, 4.0])
    assert exposed_ms(*out_of_one, *into_two, count=2) == pytest.approx([8.0, 8.0])
    assert exposed_ms(*out_of_two, *into_one, count=2) == pytest.approx([8.0, 8.0])


def test_links_inside_two_nodes_are_two() -> None:
    workers = [at(node, f"{role.value}{node}", role) for node in "ab" for role in (Role.PREFILL, Role.DECODE)]
    simulated = cluster(*workers, inside=SLOW, between=SLOW)
    simulated.run([ask(str(place), 64, 3, at_s=place) for place in range(6)])
    assert set(simulated.crossed_bytes()) <= {"inside a", "inside b", "out of a", "out of b", "into a", "into b"}
    assert sum(size for name, size in simulated.crossed_bytes().items() if "into" not in name) == 6 * 4000


def test_kv_crosses_beside_prefill_or_behind_it_where_decode_hears_of_it_late() -> None:
    """512 tokens in two chunks, 32 blocks of 0.4 ms: the first chunk's cross while the second is computed, or all of
    them afterwards.
    """
    link = Link(name="slow", bandwidth_gb_s=2.5e-3)
    for late, exposed_blocks in ((False, 16), (True, 32)):
        workers = split(max_batched_tokens=256, max_running=256)
        [outcome] = cluster(*workers, inside=link, decode_after_prefill=late).run([ask("q", 512, 3)])
        assert outcome.exposed_transfer_s == pytest.approx(exposed_blocks * 0.0004), late


# --- the way there ----------------------------------------------------------------------------------------------------


def test_the_routers_work_on_a_prompt_grows_with_it() -> None:
    """2 ms and 0.01 ms a token, then a credit's way and back, the command's, prefill, and the token's way."""
    simulated = cluster(worker("m", Role.MIXED), own_s=0.002, own_token_s=1e-5, rpc_s=0.001)
    [outcome] = simulated.run([ask("q", 100, 1)])
    assert outcome.ttft_s == pytest.approx(0.002 + 100 * 1e-5 + 3 * 0.001 + 0.018 + 0.001)


def test_a_short_prompt_is_computed_by_the_decode_worker_and_moves_nothing() -> None:
    simulated = cluster(*split(), local_threshold_tokens=100)
    short, long = simulated.run([ask("short", 99, 5), ask("long", 100, 5, at_s=1.0)])
    assert (short.path, short.prefill_worker, short.decode_worker, short.transferred_bytes) == ("local", "", "d0", 0)
    assert (long.path, long.prefill_worker, long.decode_worker, long.transferred_bytes) == ("split", "p0", "d0", 7000)
    assert short.ttft_s == pytest.approx(0.008 + 0.0099)


def test_prompts_with_a_common_beginning_go_where_it_is_cached() -> None:
    """Three prefill workers: the second prompt of each beginning goes where the first one went, in any order."""
    first = [beginning(number, at_s=number * 0.001) for number in (0, 1, 2)]
    second = [beginning(number, at_s=10 + place * 0.001) for place, number in enumerate((2, 0, 1))]
    outcomes = cluster(*split(3, 1, prefix_cache=True)).run(first + second)
    went = {one.asked.prompt_token_ids[0]: one.prefill_worker for one in outcomes[:3]}
    assert len(set(went.values())) == 3
    assert {one.asked.prompt_token_ids[0]: one.prefill_worker for one in outcomes[3:]} == went
    assert {one.cached_tokens for one in outcomes[:3]} == {0}
    assert all(one.cached_tokens >= 304 for one in outcomes[3:])


def beginning(number: int, at_s: float) -> Asked:
    """320 tokens that only prompts of the same number have."""
    return replace(ask(f"{number} at {at_s}", 1, 2, at_s=at_s), prompt_token_ids=(number,) * 320)


def test_what_a_worker_had_cached_is_forgotten_with_it() -> None:
    base = cluster(*(worker(name, Role.MIXED, prefix_cache=True) for name in ("m0", "m1")), timeout_s=60.0)
    asked = [beginning(7, at_s=0.0), ask("later", 16, 2, at_s=5.0)]
    for failures, blocks in (((), 20), ((Failure(worker_id="m0", at_s=2.0, back_s=3.0),), 0)):
        simulated = SimCluster(replace(base._spec, failures=failures))
        assert simulated.run(asked)[0].decode_worker == "m0"
        assert simulated.router._prefixes.match_blocks("m0", asked[0].block_keys(16)) == blocks


def test_no_more_decode_together_than_keep_the_promise_on_tokens() -> None:
    """A step of 10 ms and 5 ms a row: of eight answers that come one after another, three take 25 ms a token."""
    decode = replace(COSTS.decode, row_s=0.005)
    workers = split(costs=replace(COSTS, decode=decode))
    known = [ask(f"known {place}", 16 + 30 * place, 30 + 10 * place, at_s=place * 0.3) for place in range(20)]
    burst = [ask(f"burst {place}", 16, 60, at_s=30 + place * 0.05) for place in range(8)]
    for tpot_s, least, most in ((None, 8, 8), (0.026, 3, 4)):
        promise = Promise(slo_class="", share=1.0, ttft_s=None, tpot_s=tpot_s)
        outcomes, seen, _ = watched(cluster(*workers, promises={"": promise}), known + burst)
        assert all(outcome.done for outcome in outcomes)
        assert least <= max(step.decode_rows for step in seen.steps if step.start_s >= 30) <= most


def test_an_answer_goes_on_behind_what_was_sent_when_its_worker_died() -> None:
    """The second try computes prompt and answer so far, once, and draws what is left."""
    base = cluster(worker("m0", Role.MIXED), worker("m1", Role.MIXED), timeout_s=60.0)
    lost = [Failure(worker_id="m0", at_s=0.5), Failure(worker_id="m1", at_s=0.5, back_s=1.0)]
    simulated = SimCluster(replace(base._spec, failures=tuple(lost)))
    [outcome], seen, _ = watched(simulated, [ask("q", 100, 100)])
    assert (outcome.done, outcome.output_tokens) == (True, 100)
    first, second = (step.prefill_tokens for step in seen.steps if step.prefill_tokens)
    # 0.5 s: 18 ms of prefill, then steps of a little more than 10.5 ms, of which the last is lost.
    assert (first, second) == (100, 100 + 1 + 45)
    assert outcome.last_token_s == pytest.approx(1.0 + 0.008 + 146 * 1e-4 + 53 * 0.0105, abs=0.002)


def test_a_silent_worker_gets_no_more_work_once_its_heartbeats_are_late() -> None:
    """`p0` falls silent at 0.5 s: what is sent there within the second that a heartbeat may be late is lost, and tried
    again elsewhere; nothing is sent there later.
    """
    base = cluster(*split(2, 1), timeout_s=60.0)
    spec = replace(base._spec, failures=(Failure(worker_id="p0", at_s=0.5, silent=True),))
    for at_s, worker_id, lost in ((0.4, "p0", False), (0.9, "p1", True), (5.0, "p1", False)):
        [outcome] = SimCluster(spec).run([ask("q", 16, 2, at_s=at_s)])
        assert (outcome.done, outcome.prefill_worker) == (True, worker_id), at_s
        assert (outcome.tries > 1) == lost


def test_kv_that_is_lost_on_its_way_is_computed_again() -> None:
    """600 tokens in two steps, done after 76 ms; the last block has crossed after 97 ms. The prefill worker dies after
    80 ms: the reader finds out by itself, tries three times to reach it, and then another one computes all.
    """
    base = cluster(*split(2, 1), inside=SLOW, timeout_s=60.0)
    dies = replace(base._spec, failures=(Failure(worker_id="p0", at_s=0.08),))
    whole, lost = (SimCluster(spec).run([ask("q", 600, 20)])[0] for spec in (base._spec, dies))
    assert (whole.tries, whole.prefill_worker) == (1, "p0")
    assert (lost.done, lost.tries, lost.prefill_worker) == (True, 2, "p1")
    assert lost.first_token_s == whole.first_token_s, "that had been sent"
    assert lost.last_token_s is not None
    assert whole.last_token_s is not None
    tried_s, step_s = 0.05 + 0.1 + 0.2, 0.0106  # the second prefill draws the second token
    assert lost.last_token_s - whole.last_token_s == pytest.approx(0.08 + tried_s - step_s, abs=0.001)


def test_kv_over_several_links_at_once_is_divided_among_them() -> None:
    device = read_scenario(None, {"model": "opt-13b", "hardware": "a100-80g", "mixed.workers": 1}).device()
    one, two = (
        worker_spec("d", Replica(role=Role.DECODE, pipeline_stages=2, handoff_shards=shards), device)
        for shards in (1, 2)
    )
    assert one.block_bytes == 2 * two.block_bytes == 16 * device.facts.kv_bytes_per_token()


def test_the_next_try_avoids_the_worker_that_failed_the_one_before() -> None:
    asked = ask("q", 16, 2)
    tries = Tries(max_attempts=3, deadline_s=60.0, timeout_s=60.0)
    choice = SimChoice(
        timeline=Timeline(),
        desk=cluster(*split()).router,
        asked=asked,
        outcome=Outcome(asked=asked),
        promise=NO_PROMISE,
        tries=tries,
        timeout_s=60.0,
    )
    assert choice.needs.avoid == frozenset()
    tries.failed("d0")
    assert choice.needs.avoid == {"d0"}
