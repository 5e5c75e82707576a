"""Estimates: exact where the simulation is simple, near it where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import opt
from tandem.cluster.latency.interface import StepRun
from tandem.cluster.latency.links import INSTANT
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.planner.estimate import Kind, serve
from tandem.cluster.planner.outlook import Outlook
from tandem.cluster.planner.place import replica_of
from tandem.cluster.planner.result import Affinity, Candidate, Pool
from tandem.cluster.planner.setting import Setting, default_pool, setting_of
from tandem.cluster.planner.trial import Judge, Trial, judged, run_candidate
from tandem.cluster.sim.cluster import ClusterSpec
from tandem.cluster.sim.deploy import Replica, worker_spec
from tandem.cluster.sim.prompts import asked
from tandem.cluster.sim.router import RouterSpec
from tandem.cluster.types import Role

TERMS = DecodeTerms(step_s=0.01, row_s=0.0, context_token_s=0.0)
COSTS = StepProfile(prefill_step_s=0.0, prefill_token_s=1e-3, decode=TERMS, large_decode=TERMS, large_batch_rows=1000)


def kind(role: Role, budget: int = 1000, rows: int = 8, kv_tokens: int = 100_000) -> Kind:
    return Kind(role=role, costs=COSTS, budget_tokens=budget, max_running=rows, kv_tokens=kv_tokens)


def test_prompts_wait_for_those_before_them() -> None:
    first_s, last_s = serve(kind(Role.PREFILL, budget=100), 1, [0.0, 0.05, 1.0], [100, 100, 50], [1, 1, 1])
    assert first_s == pytest.approx([0.1, 0.2, 1.05])
    assert last_s == first_s


def test_two_workers_take_turns() -> None:
    first_s, _ = serve(kind(Role.PREFILL), 2, [0.0, 0.01], [100, 100], [1, 1])
    assert first_s == pytest.approx([0.1, 0.11])


def test_rows_get_a_token_a_step() -> None:
    _, last_s = serve(kind(Role.DECODE), 1, [0.0, 0.0], [10, 10], [11, 21])
    assert last_s == pytest.approx([0.1, 0.2])


def test_rows_that_find_no_place_wait() -> None:
    _, last_s = serve(kind(Role.DECODE, rows=1), 1, [0.0, 0.0], [10, 10], [11, 11])
    assert last_s == pytest.approx([0.1, 0.2])
    _, last_s = serve(kind(Role.DECODE, kv_tokens=40), 1, [0.0, 0.0], [30, 30], [11, 11])
    assert last_s == pytest.approx([0.1, 0.2])


def test_a_prompt_holds_up_the_rows_beside_it() -> None:
    first_s, last_s = serve(kind(Role.MIXED, budget=101), 1, [0.0, 0.105], [10, 100], [21, 1])
    assert first_s[1] == pytest.approx(0.22)  # the step under way ends at 0.11; then 100 tokens beside a row: 0.11 s
    assert last_s[0] == pytest.approx(0.01 + 20 * 0.01 + 0.1)


PLENTY = 10_000_000


class Costless:
    """Steps that take no time: the other half of a phase that is looked at alone."""

    pipeline_stages = 1

    def step_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """None."""
        return 0.0

    stage_time_s = step_time_s

    def decode_steps(self, rows: int, context_tokens: int, steps: int) -> StepRun:
        """All at once."""
        return StepRun(0.0, 0.0, steps)


def phase_alone(setting: Setting, pool: Pool, rate: float, seed: int, requests: int) -> Trial:
    """The workers of one phase, the other half costless (DistServe, OSDI '24, §4.1): prefill by requests of one output
    token against TTFT, decode by requests whose KV is there at once against TPOT.
    """
    rows = setting.workload.draw(rate=rate, seconds=None, num_requests=requests, seed=seed)
    device = replace(setting.device, prefix_cache=False)
    own = tuple(worker_spec(f"own-{number}", replica_of(pool), device) for number in range(pool.count))
    other_role = Role.DECODE if pool.role is Role.PREFILL else Role.PREFILL
    other = worker_spec(
        "other",
        Replica(role=other_role, max_batched_tokens=PLENTY, max_running=PLENTY),
        device,
        costs=Costless(),
        num_blocks=sum(-(-row.input_tokens // device.block_size) for row in rows) + device.context_tokens,
    )
    if pool.role is Role.PREFILL:
        rows = [replace(row, output_tokens=1) for row in rows]
        promises = {name: replace(one, tpot_s=None) for name, one in setting.promises.items()}
    else:
        promises = {name: replace(one, ttft_s=None) for name, one in setting.promises.items()}
    # A router that knew the TPOT promise would hold requests back, which costs nothing where TTFT does not count.
    known = {name: replace(one, tpot_s=None) for name, one in promises.items()}
    router = RouterSpec(promises=known, refuses=False)
    spec = ClusterSpec(workers=(*own, other), router=router, inside=INSTANT, between=INSTANT)
    workload = asked(rows, sharing=False)
    judge = Judge(workload, promises, setting.target)
    judged(spec, workload, judge)
    return judge.verdict(rate, seed)


@pytest.mark.parametrize(
    ("role", "tensor", "stages", "rate"),
    [
        (Role.PREFILL, 1, 1, 8.0),
        (Role.PREFILL, 1, 2, 12.0),
        (Role.DECODE, 1, 1, 20.0),
        (Role.MIXED, 2, 1, 8.0),
    ],
)
def test_an_estimate_is_near_the_simulation(role: Role, tensor: int, stages: int, rate: float) -> None:
    setting = setting_of(opt(workload__range_ratio=0.5))
    pool = default_pool(role, 1, tensor, stages, 1024)
    if role is Role.MIXED:
        candidate = Candidate(pools=(pool,), affinity=Affinity.COLOCATED)
        told, seen = Outlook(setting).score(candidate, rate, 0, 120), run_candidate(setting, candidate, rate, 0, 120)
    else:
        told, seen = Outlook(setting).score(pool, rate, 0, 120), phase_alone(setting, pool, rate, 0, 120)
    assert told == pytest.approx(seen.score, abs=0.1)


def test_mixed_pipelines_are_loaded_alike() -> None:
    """What they say of their steps must not make an idle one look slower than a full one: the simulator, whose router
    ranks by it, then attains what the estimate does, which knows better. It attained a third."""
    setting = setting_of(opt(workload__input_tokens=760, workload__output_tokens=186, workload__range_ratio=0.9))
    pipelines = default_pool(Role.MIXED, 4, 1, 2, 1024)
    candidate = Candidate(pools=(pipelines,), affinity=Affinity.COLOCATED)
    setting = replace(setting, gpus_per_node=pipelines.gpus)
    told, seen = Outlook(setting).score(candidate, 24.0, 0, 200), run_candidate(setting, candidate, 24.0, 0, 200)
    assert told == pytest.approx(seen.score, abs=0.1)


def test_a_promise_that_nobody_keeps_alone_is_hopeless() -> None:
    setting = setting_of(opt(**{"workload__slo_classes": {"chat": {"ttft_s": 0.01, "tpot_s": 0.1}}}))
    pool = default_pool(Role.PREFILL, 1, 1, 1, 2048)
    hopeless = Outlook(setting).hopeless(pool)
    assert hopeless is not None
    assert "even one unloaded request takes" in hopeless.text
    assert "promised are 10 ms" in hopeless.text
    assert Outlook(setting).hopeless(default_pool(Role.DECODE, 1, 1, 1, 2048)) is None


def test_more_workers_have_as_much_more_capacity() -> None:
    outlook = Outlook(setting_of(opt()))
    for role in Role:
        one, two = (outlook.capacity(default_pool(role, count, 1, 1, 1024)) for count in (1, 2))
        assert two == pytest.approx(2 * one)
