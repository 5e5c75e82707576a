"""Workers that fail in virtual time: requests go on behind what was sent, and nothing is left of any."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim_cases import FAST, NO_PROMISE, assert_clean, split, worker, workload
from tandem.cluster.latency.links import Link
from tandem.cluster.sim.cluster import ClusterSpec, Failure, SimCluster
from tandem.cluster.sim.request import Asked
from tandem.cluster.sim.router import RouterSpec
from tandem.cluster.sim.worker_spec import WorkerSpec
from tandem.cluster.types import Role
from tandem.router.slo_classes import Promise

SLOW = Link(name="slow", bandwidth_gb_s=1e-3, latency_us=500.0)
URGENT = Promise(slo_class="urgent", share=0.9, ttft_s=2.0, tpot_s=0.1)


def failing(workers: tuple[WorkerSpec, ...], *failures: Failure, link: Link = FAST, **router: Any) -> SimCluster:
    values = {"promises": {"": NO_PROMISE, "urgent": URGENT}, "refuses": False, "timeout_s": 600.0, **router}
    spec = RouterSpec(**values)
    return SimCluster(ClusterSpec(workers=workers, router=spec, inside=link, between=link, failures=failures))


def one(prompt: int, answer: int, at_s: float = 0.0) -> Asked:
    return Asked(request_id=f"q{at_s}", arrival_s=at_s, prompt_token_ids=(1,) * prompt, output_tokens=answer)


def test_a_decode_worker_that_dies_is_replaced_behind_the_tokens_already_sent() -> None:
    """Prefill again on the other path: 16 + what was sent, at the prefill worker; the answer ends whole."""
    simulated = failing(split(1, 2), Failure(worker_id="d0", at_s=1.0), rpc_s=0.001)
    [outcome] = simulated.run([one(100, 200)])
    assert outcome.done
    assert (outcome.tries, outcome.decode_worker) == (2, "d1")
    whole = failing(split(1, 2), rpc_s=0.001).run([one(100, 200)])[0]
    assert outcome.last_token_s is not None
    assert whole.last_token_s is not None
    lost_s = outcome.last_token_s - whole.last_token_s
    assert 0.008 < lost_s < 0.1, "one prefill, a few messages, no token twice"
    assert_clean(simulated)


def test_the_prefill_is_kept_where_only_the_decode_worker_died() -> None:
    """A slow link: the KV is still on its way when its reader dies, so the other decode worker takes it from there."""
    simulated = failing(split(1, 2), Failure(worker_id="d0", at_s=0.05), link=SLOW)
    asked = [one(600, 20)]
    [outcome] = simulated.run(asked)
    assert outcome.done
    assert (outcome.tries, outcome.decode_worker) == (2, "d1")
    assert simulated.workers[0].engine.steps_total == 2, "600 tokens in steps of 512, computed once"
    assert_clean(simulated)


def test_a_prefill_worker_that_dies_takes_its_prompts_with_it_and_not_what_was_handed_over() -> None:
    simulated = failing(split(2, 1), Failure(worker_id="p0", at_s=0.5))
    early, late = one(50, 200), one(500, 20, at_s=0.49)
    outcomes = simulated.run([early, late])
    assert [outcome.done for outcome in outcomes] == [True, True]
    assert outcomes[0].tries == 1
    assert_clean(simulated)


def test_a_request_waits_for_workers_to_come_back() -> None:
    workers = split(1, 1)
    simulated = failing(workers, Failure(worker_id="d0", at_s=0.5, back_s=60.0))
    [outcome] = simulated.run([one(50, 200)])
    assert outcome.done
    assert outcome.last_token_s is not None
    assert outcome.last_token_s > 60.0
    assert_clean(simulated)


@pytest.mark.parametrize(
    ("timeout_s", "fails_s", "ends_s", "why"),
    [(30.0, 0.1, 29.5, "unavailable"), (0.2, 100.0, 0.2, "deadline_exceeded")],
)
def test_it_waits_until_its_deadline_and_no_longer(timeout_s: float, fails_s: float, ends_s: float, why: str) -> None:
    simulated = failing(split(1, 1), Failure(worker_id="d0", at_s=fails_s), timeout_s=timeout_s)
    [outcome] = simulated.run([one(50, 200)])
    assert (outcome.done, outcome.failed) == (False, why)
    assert 2 <= outcome.output_tokens < 50, "what was drawn until then counts"
    assert simulated.timeline.now_s() >= ends_s
    settle(simulated)
    assert_clean(simulated)


def test_who_comes_to_a_cluster_without_workers_waits_as_long_as_the_router_lets_it() -> None:
    simulated = failing((worker("m", Role.MIXED),), Failure(worker_id="m", at_s=0.0), unready_wait_s=3.0)
    [outcome] = simulated.run([one(50, 20, at_s=1.0)])
    assert outcome.failed == "unavailable"
    assert 4.0 <= simulated.timeline.now_s() <= 4.5


def test_a_silent_machine_is_found_out_by_its_heartbeats() -> None:
    """No new work after a second without one, and what ran there goes on elsewhere after ten."""
    workers = (worker("m0", Role.MIXED), worker("m1", Role.MIXED))
    simulated = failing(workers, Failure(worker_id="m0", at_s=0.5, silent=True))
    outcomes = simulated.run([one(50, 200), one(50, 20, at_s=5.0)])
    assert [outcome.done for outcome in outcomes] == [True, True]
    assert outcomes[0].last_token_s is not None
    assert outcomes[0].last_token_s > 10.5
    assert outcomes[1].tries == 1


def test_the_last_of_too_many_tries_is_told() -> None:
    failures = [Failure(worker_id="m", at_s=at_s, back_s=at_s + 0.1) for at_s in (0.5, 1.0, 1.5)]
    simulated = failing((worker("m", Role.MIXED),), *failures, max_attempts=3)
    [outcome] = simulated.run([one(50, 400)])
    assert (outcome.failed, outcome.tries) == ("unavailable", 3)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Failure(worker_id="x", at_s=1.0), "worker 'x' is not allowed; allowed: p0, d0"),
        (Failure(worker_id="p0", at_s=2.0, back_s=1.0), "p0 at 2 s, back at 1 s is not allowed"),
    ],
)
def test_failures_that_make_no_sense_are_refused(failure: Failure, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        failing(split(), failure)


def test_without_a_deadline_nobody_may_fail() -> None:
    with pytest.raises(ValueError, match=r"router\.timeout_s: inf is not allowed where workers fail"):
        failing(split(), Failure(worker_id="p0", at_s=1.0), timeout_s=math.inf)


POOLS = {
    "split": lambda **f: split(2, 2, **f),
    "mixed": lambda **f: (worker("m0", Role.MIXED, **f), worker("m1", Role.MIXED, **f)),
    "both": lambda **f: (*split(1, 1, **f), worker("m0", Role.MIXED, **f)),
}


def settle(simulated: SimCluster) -> None:
    """Lets the leases of confirmations that were lost run out."""
    simulated.timeline.run(until_s=simulated.timeline.now_s() + 60.0)
    for alive in simulated.workers:
        if alive.alive:
            alive.tick()
    simulated.timeline.run()


FAILURES = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0.0, 8.0), st.floats(0.01, 5.0) | st.none(), st.booleans()), max_size=6
)


def failures_of(drawn: list[tuple[int, float, float | None, bool]], workers: tuple[WorkerSpec, ...]) -> list[Failure]:
    """One after the other for each worker."""
    free_s, failures = dict.fromkeys((one.worker_id for one in workers), 0.0), []
    for place, at_s, away_s, silent in sorted(drawn, key=lambda failure: failure[1]):
        name = workers[place % len(workers)].worker_id
        if at_s >= free_s[name]:
            back_s = None if away_s is None else at_s + away_s
            failures.append(Failure(worker_id=name, at_s=at_s, back_s=back_s, silent=silent))
            free_s[name] = math.inf if back_s is None else back_s
    return failures


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pools=st.sampled_from(sorted(POOLS)),
    drawn=FAILURES,
    seed=st.integers(0, 1000),
    num_blocks=st.sampled_from([48, 80, 400]),
    max_waiting=st.sampled_from([1, 3, 64]),
    options=st.fixed_dictionaries(
        {
            "prefix_cache": st.booleans(),
            "credit_ttl_s": st.sampled_from([0.02, 10.0]),
            "lease_s": st.sampled_from([0.3, 30.0]),
        }
    ),
    router=st.fixed_dictionaries(
        {
            "rpc_s": st.sampled_from([0.0, 0.002]),
            "refuses": st.booleans(),
            "timeout_s": st.sampled_from([1.0, 20.0]),
            "local_threshold_tokens": st.sampled_from([0, 100]),
            "decode_after_prefill": st.booleans(),
        }
    ),
    slow=st.booleans(),
)
def test_whatever_fails_every_request_ends_and_no_block_leaks(
    pools: str,
    drawn: list[tuple[int, float, float | None, bool]],
    seed: int,
    num_blocks: int,
    max_waiting: int,
    options: dict[str, Any],
    router: dict[str, Any],
    slow: bool,
) -> None:
    workers = POOLS[pools](num_blocks=num_blocks, max_waiting=max_waiting, max_model_len=760, **options)
    asked = [
        replace(asked, slo_class="urgent" if place % 3 else "")
        for place, asked in enumerate(workload(30, 6.0, seed=seed, longest=700, answer=60))
    ]
    simulated = failing(workers, *failures_of(drawn, workers), link=SLOW if slow else FAST, **router)
    outcomes = simulated.run(asked)
    for outcome in outcomes:
        assert outcome.done != bool(outcome.refused or outcome.failed), outcome
        assert outcome.output_tokens <= outcome.asked.output_tokens
    settle(simulated)
    assert_clean(simulated)
