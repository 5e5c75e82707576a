"""Virtual time against the runtime's own classes, against steps taken one by one, and against small sums by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from sim_cases import COSTS, assert_clean, cluster, split, worker, workload
from tandem.cluster.bench.simulate import digest
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.policies import DecodePolicy, MixedPolicy, PrefillPolicy
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.latency.links import INSTANT, Link
from tandem.cluster.sim import router as sim_router
from tandem.cluster.sim.cluster import ClusterSpec, SimCluster
from tandem.cluster.sim.observer import StepSpan, TransferSpan, WorkerSample
from tandem.cluster.sim.request import Asked
from tandem.cluster.types import Role
from tandem.kvtransfer.protocol.credits import CreditLedger
from tandem.kvtransfer.protocol.holder import HandoffHolder
from tandem.kvtransfer.protocol.puller import HandoffPuller
from tandem.router import attempt, choice, dispatch, placer, tries
from tandem.router.admission import Admission
from tandem.router.placing import find_place
from tandem.router.prefix_index import PrefixIndex
from tandem.router.turns import Turns


def one(prompt: int, answer: int, at_s: float = 0.0) -> Asked:
    return Asked(request_id=f"q{at_s}", arrival_s=at_s, prompt_token_ids=(1,) * prompt, output_tokens=answer)


def test_what_decides_is_the_runtimes_own() -> None:
    """The same classes and functions, not alike ones: a change of a policy changes both."""
    simulated = cluster(*split(), worker("m", Role.MIXED))
    for one_worker, policy in zip(simulated.workers, (PrefillPolicy, DecodePolicy, MixedPolicy), strict=True):
        scheduler = one_worker.scheduler
        assert type(scheduler) is Scheduler
        assert type(scheduler._kv.pool) is BlockPool
        assert type(scheduler._kv.cache) is PrefixCache
        assert type(scheduler._policy) is policy
        assert type(one_worker.holder) is HandoffHolder
        assert type(one_worker.puller) is HandoffPuller
        assert type(one_worker.puller._credits) is CreditLedger
    router = simulated.router
    assert type(router._admission) is Admission
    assert type(router._prefixes) is PrefixIndex
    assert type(router._turns) is Turns is dispatch.Turns
    assert sim_router.find_place is find_place is placer.find_place
    assert sim_router.Tries is tries.Tries is choice.Tries
    assert attempt.PrefillKeep is tries.PrefillKeep


@pytest.mark.parametrize(
    "workers",
    [
        split(),
        (worker("m", Role.MIXED),),
        split(costs=replace(COSTS, pipeline_stages=2)),
        (worker("m", Role.MIXED, costs=replace(COSTS, pipeline_stages=3)),),
        split(num_blocks=60, max_model_len=700),
    ],
    ids=["split", "mixed", "two stages", "three stages, mixed", "little memory"],
)
def test_runs_of_steps_are_what_their_steps_are_one_by_one(
    workers: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = workload(40, 5.0)
    together = cluster(*workers)
    outcomes = together.run(asked)
    monkeypatch.setattr(Scheduler, "begin_run", lambda self, limit: None)
    apart = cluster(*workers)
    want = apart.run(asked)
    assert apart.timeline.events_total > together.timeline.events_total
    for outcome, expected in zip(outcomes, want, strict=True):
        times = (expected.first_token_s, expected.last_token_s, expected.exposed_transfer_s)
        assert (outcome.first_token_s, outcome.last_token_s, outcome.exposed_transfer_s) == pytest.approx(times)


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert len({digest(cluster(*split(2, 2), rpc_s=0.001).run(workload(60, 6.0))) for _ in range(2)}) == 1


def test_a_split_request_by_hand() -> None:
    """100 tokens of prompt, 3 of answer; blocks of 16 tokens and 1000 bytes over a link of 1 MB/s.

    own work 5 ms, credit and command 3 x 1 ms, prefill 8 + 10 ms, a message 1 ms: the first token after 27 ms. All 7
    blocks become readable at the end of prefill, at 26 ms, and cross in 7 ms: exposed. Then the end of the pull's
    message, and two decode steps of 10.5 ms and a little for the context.
    """
    link = Link(name="slow", bandwidth_gb_s=1e-3)
    simulated = cluster(*split(), inside=link, own_s=0.005, rpc_s=0.001)
    [outcome] = simulated.run([one(100, 3)])
    assert outcome.ttft_s == pytest.approx(0.005 + 0.003 + 0.018 + 0.001)
    assert outcome.exposed_transfer_s == pytest.approx(0.007)
    assert outcome.transferred_bytes == 7000
    steps = 2 * 0.0105 + (101 + 102) * 1e-7
    assert outcome.last_token_s == pytest.approx(0.026 + 0.007 + 0.001 + steps + 0.001)


def test_with_infinite_bandwidth_decode_goes_on_where_prefill_has_ended() -> None:
    """The same request: what is left of the handoff are its messages."""
    [outcome] = cluster(*split(), inside=INSTANT, own_s=0.005, rpc_s=0.001).run([one(100, 3)])
    assert outcome.transferred_bytes == 7000
    assert outcome.exposed_transfer_s == pytest.approx(0.0, abs=1e-9)
    assert outcome.last_token_s == pytest.approx(0.026 + 0.001 + 2 * 0.0105 + (101 + 102) * 1e-7 + 0.001)


def test_a_transfer_overlaps_with_the_prefill_that_goes_on() -> None:
    """A prompt of two chunks: the first one's 16 blocks cross while the second is computed, 0.4 ms a block."""
    link = Link(name="slow", bandwidth_gb_s=2.5e-3)
    fields: dict[str, Any] = {"max_batched_tokens": 256, "max_running": 256}
    [outcome] = cluster(*split(**fields), inside=link).run([one(512, 3)])
    assert outcome.transferred_bytes == 32_000
    assert outcome.exposed_transfer_s == pytest.approx(16 * 0.0004)


def test_two_readers_share_a_link() -> None:
    """Two prompts of one step, whose KV leaves together: each at half the pace."""
    link = Link(name="slow", bandwidth_gb_s=1e-3)
    outcomes = cluster(*split(1, 2), inside=link).run([one(64, 3), replace(one(64, 3), request_id="other")])
    assert [outcome.exposed_transfer_s for outcome in outcomes] == pytest.approx([0.004, 0.008], abs=0.0045)
    assert max(outcome.exposed_transfer_s for outcome in outcomes) == pytest.approx(0.008)


def test_kv_waits_in_the_prefill_workers_memory_while_decode_is_full() -> None:
    """Two answers fit into decode's memory: the third one's KV is held by the prefill worker until one has ended."""
    prefill, decode = worker("p", Role.PREFILL), worker("d", Role.DECODE, num_blocks=20, credit_factor=10.0)
    seen: list[int] = []
    watch = _Watch(lambda workers: seen.append(workers[0].held))
    base = cluster(prefill, decode)
    simulated = SimCluster(base._spec, watch)
    outcomes = simulated.run([replace(one(128, 20), request_id=str(place)) for place in range(3)])
    assert all(outcome.done for outcome in outcomes)
    ends = sorted(outcome.last_token_s or 0.0 for outcome in outcomes)
    assert max(outcome.decode_queue_s for outcome in outcomes) > 0.1
    assert ends[2] > ends[1]
    assert max(seen) >= 1
    assert_clean(simulated)


def test_a_full_queue_refuses_and_the_router_tries_again() -> None:
    """The prefill worker takes one waiting sequence: who is refused asks again, and everybody is served."""
    simulated = cluster(*split(num_blocks=64, max_waiting=1, max_running=1, max_model_len=900))
    outcomes = simulated.run(workload(30, 50.0, longest=300, answer=20))
    assert all(outcome.done for outcome in outcomes)
    assert max(outcome.tries for outcome in outcomes) > 1
    assert_clean(simulated)


def test_split_workers_go_before_mixed_ones_as_in_the_runtime() -> None:
    outcomes = cluster(*split(), worker("m", Role.MIXED)).run(workload(20, 5.0))
    paths = {outcome.path for outcome in outcomes}
    assert "split" in paths
    assert paths <= {"split", "prefill_only"}


class _Watch:
    """Keeps what it is told."""

    sample_period_s = 0.01
    wants_spans = True

    def __init__(self, look: Any = None) -> None:
        self.samples: list[tuple[float, int]] = []
        self.steps: list[StepSpan] = []
        self.transfers: list[TransferSpan] = []
        self._look = look

    def sample(self, at_s: float, waiting_at_router: int, workers: Sequence[WorkerSample]) -> None:
        self.samples.append((at_s, waiting_at_router))
        for seen in workers:
            assert 0 <= seen.used_blocks <= seen.num_blocks
        if self._look is not None:
            self._look(workers)

    def step(self, span: StepSpan) -> None:
        self.steps.append(span)

    def transfer(self, span: TransferSpan) -> None:
        self.transfers.append(span)


def test_who_watches_sees_every_step_and_transfer_and_changes_nothing() -> None:
    asked, watch = workload(300, 20.0), _Watch()
    plain = cluster(*split(2, 2))
    want = digest(plain.run(asked))
    spec: ClusterSpec = plain._spec
    watched = SimCluster(spec, watch)
    outcomes = watched.run(asked)
    assert digest(outcomes) == want
    assert sum(span.steps for span in watch.steps) == sum(one.engine.steps_total for one in watched.workers)
    computed = sum(span.prefill_tokens for span in watch.steps)
    assert computed == sum(len(one.prompt_token_ids) for one in asked)
    drawn = sum(span.steps * span.decode_rows for span in watch.steps)
    assert drawn == sum(outcome.output_tokens - 1 for outcome in outcomes)
    moved = {span.request_id: span.size_bytes for span in watch.transfers}
    assert moved == {one.asked.request_id: one.transferred_bytes for one in outcomes if one.path == "split"}
    gaps = {round(later - before, 9) for (before, _), (later, _) in zip(watch.samples, watch.samples[1:], strict=False)}
    assert gaps == {0.01}
