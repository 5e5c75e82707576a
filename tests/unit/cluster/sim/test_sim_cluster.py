"""Whole simulated clusters: everybody is served, nothing is left, the same input gives the same times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from sim_cases import COSTS, FAST, assert_clean, cluster, split, worker, workload
from tandem.cluster.bench.claims_virtual import EngineShape, Job, VirtualEngine
from tandem.cluster.latency.links import Link
from tandem.cluster.sim.request import Asked, Outcome
from tandem.cluster.types import SLO, Role
from tandem.router.slo_classes import Promise


def test_a_mixed_worker_alone_is_the_engine_that_steps_one_by_one() -> None:
    """Runs, the router and the worker add nothing where they take no time."""
    asked = workload(150, 6.0, longest=300)
    simulated = cluster(worker("m", Role.MIXED, max_batched_tokens=512, max_waiting=10_000))
    outcomes = simulated.run(asked)
    shape = EngineShape(num_blocks=4000, max_batched_tokens=512)
    jobs = [
        Job(arrival_s=one.arrival_s, prompt_tokens=len(one.prompt_token_ids), output_tokens=one.output_tokens)
        for one in asked
    ]
    served = {job.job: job for job in VirtualEngine(shape, COSTS).run(jobs)}
    for job, outcome in zip(jobs, outcomes, strict=True):
        want = served[job]
        assert (outcome.first_token_s, outcome.last_token_s) == pytest.approx((want.first_token_s, want.last_token_s))
    assert_clean(simulated)


def test_alike_workers_share_the_load_whoever_was_warmed_up() -> None:
    """Long prompts take longer than a line through all steps says: who had one first must not look slow ever after."""
    costs = replace(COSTS, prefill_square_s=2e-8)
    workers = [worker(f"m{place}", Role.MIXED, costs=costs, max_batched_tokens=1024) for place in range(4)]
    long = tuple(range(1900))
    warm = [
        Asked(request_id=f"w{place}", arrival_s=place * 0.3, prompt_token_ids=long, output_tokens=2 + place)
        for place in range(4)
    ]
    load = [replace(one, arrival_s=one.arrival_s + 10.0) for one in workload(400, 30.0)]
    outcomes = cluster(*workers).run([*warm, *load])
    shares = Counter(outcome.decode_worker or outcome.prefill_worker for outcome in outcomes)
    assert min(shares[one.worker_id] for one in workers) > 0.7 * max(shares.values()), shares


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 3)])
def test_a_split_cluster_serves_everybody_and_nothing_is_left(prefill: int, decode: int, prefix_cache: bool) -> None:
    simulated = cluster(*split(prefill, decode, prefix_cache=prefix_cache), rpc_s=0.001)
    outcomes = simulated.run(workload(120, 8.0))
    assert all(outcome.done for outcome in outcomes)
    assert {outcome.path for outcome in outcomes} == {"split", "prefill_only"}
    for outcome in outcomes:
        assert outcome.first_token_s is not None
        assert outcome.last_token_s is not None
        assert outcome.asked.arrival_s < outcome.first_token_s <= outcome.last_token_s
    assert_clean(simulated)


def test_months_in_which_nobody_comes_cost_nothing() -> None:
    """Idle workers say once that they are, and again when somebody comes."""
    month_s = 30 * 86_400.0
    asked = [replace(one, arrival_s=one.arrival_s + place * month_s) for place, one in enumerate(workload(4, 1.0))]
    simulated = cluster(*split())
    outcomes = simulated.run(asked)
    assert all(outcome.done for outcome in outcomes)
    assert sum(member.heartbeats for member in simulated.router._members.values()) < 1000
    for outcome, one in zip(outcomes, asked, strict=True):
        (alone,) = cluster(*split()).run([replace(one, arrival_s=0.0)])
        assert outcome.last_token_s is not None
        assert alone.last_token_s is not None
        assert outcome.last_token_s - one.arrival_s == pytest.approx(alone.last_token_s, abs=1e-6)


def test_the_kv_of_every_handoff_crosses_the_links() -> None:
    simulated = cluster(*split())
    outcomes = simulated.run(workload(50, 4.0))
    blocks = sum(-(-len(one.asked.prompt_token_ids) // 16) for one in outcomes if one.path == "split")
    assert sum(outcome.transferred_bytes for outcome in outcomes) == blocks * 1000
    assert simulated.crossed_bytes() == {"inside ": blocks * 1000}


def test_a_slow_link_is_exposed_and_a_fast_one_hardly() -> None:
    slow = Link(name="slow", bandwidth_gb_s=1e-4)  # 100 KB/s: 10 ms a block
    exposed = {}
    for name, link in (("slow", slow), ("fast", FAST)):
        outcomes = cluster(*split(), inside=link).run(workload(50, 2.0))
        exposed[name] = max(outcome.exposed_transfer_s for outcome in outcomes)
    assert exposed["slow"] > 0.1 > 1e-6 > exposed["fast"]


def test_a_shared_prefix_is_computed_once() -> None:
    asked = workload(40, 2.0, longest=64)
    shared = tuple(range(2000, 2512))
    asked = [replace(one, prompt_token_ids=shared + one.prompt_token_ids) for one in asked]
    outcomes = cluster(*split(prefix_cache=True)).run(asked)
    assert outcomes[0].cached_tokens == 0
    assert all(outcome.cached_tokens >= 512 for outcome in outcomes[1:])


def test_short_prompts_stay_with_the_decode_worker_where_that_is_asked_for() -> None:
    outcomes = cluster(*split(), local_threshold_tokens=100).run(workload(100, 4.0))
    decoded = [outcome for outcome in outcomes if outcome.asked.output_tokens > 1]
    for outcome in decoded:
        assert (outcome.path == "local") == (len(outcome.asked.prompt_token_ids) < 100)
    assert {outcome.path for outcome in decoded} == {"local", "split"}


def test_memory_that_does_not_suffice_preempts_or_waits_and_serves_all_the_same() -> None:
    simulated = cluster(*split(num_blocks=60, max_model_len=700))
    outcomes = simulated.run(workload(60, 8.0, longest=500))
    assert all(outcome.done for outcome in outcomes)
    assert max(outcome.decode_queue_s for outcome in outcomes) > 0.01, "KV waited in the prefill worker's memory"
    assert_clean(simulated)


def test_more_stages_take_more_prompts_in_flight() -> None:
    """A pipeline of two stages of half the time each: nearly twice the rate, the same time for one prompt."""
    whole = replace(COSTS, prefill_step_s=0.02, prefill_token_s=2e-4)
    asked = workload(120, 100.0, longest=200, answer=1)
    one = cluster(worker("m", Role.MIXED, costs=whole, max_batched_tokens=256)).run(asked)
    half = replace(whole, prefill_step_s=0.01, prefill_token_s=1e-4, pipeline_stages=2)
    two = cluster(worker("m", Role.MIXED, costs=half, max_batched_tokens=256)).run(asked)
    last = [max(outcome.last_token_s or 0.0 for outcome in outcomes) for outcomes in (one, two)]
    assert last[1] < 0.8 * last[0]


def test_a_promise_that_cannot_be_kept_is_refused_as_the_router_refuses_it() -> None:
    promise = Promise(slo_class="", share=1.0, ttft_s=0.5, tpot_s=0.1)
    outcomes = cluster(*split(), promises={"": promise}, refuses=True).run(workload(300, 60.0))
    refused = [outcome for outcome in outcomes if outcome.refused]
    assert refused
    kept = [outcome for outcome in outcomes if not outcome.refused]
    assert all(outcome.done for outcome in kept)
    share = sum(outcome.attains(SLO(ttft_s=0.5, tpot_s=None)) for outcome in kept) / len(kept)
    assert share > 0.9


def test_workers_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="workers: prefill are not allowed; allowed: mixed ones"):
        cluster(worker("p", Role.PREFILL))


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"max_model_len": 64}, "context_length_exceeded"), ({"num_blocks": 4}, "invalid_request_error")],
)
def test_what_can_never_run_is_refused_as_the_router_refuses_it(fields: dict[str, int], why: str) -> None:
    [asked] = workload(1, 1.0)
    simulated = cluster(*split(**fields))
    fits, too_long = (
        replace(asked, request_id=str(tokens), prompt_token_ids=(1,) * 55, output_tokens=tokens) for tokens in (9, 11)
    )
    outcomes = simulated.run([fits, too_long])
    assert [(one.done, one.refused) for one in outcomes] == [(True, ""), (False, why)]
    assert_clean(simulated)


def test_a_run_ends_where_its_caller_knows_enough() -> None:
    simulated, asked_at = cluster(*split()), []

    def enough(now_s: float, outcomes: Sequence[Outcome]) -> bool:
        asked_at.append(now_s)
        return sum(outcome.done for outcome in outcomes) >= 10

    outcomes = simulated.run(workload(100, 4.0), decided=enough, decided_period_s=0.5)
    assert 10 <= sum(outcome.done for outcome in outcomes) < 30
    assert asked_at == [0.5 * (place + 1) for place in range(len(asked_at))]
