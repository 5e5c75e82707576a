"""DistServe (OSDI '24), §4 and §6: the placements that it finds, approached from its A100 coefficients and ShareGPT's
lengths; where ours differ, the reason by experiment.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster.bench.replay import device_of
from tandem.cluster.bench.replay_colocated import PAID_APART, attainment, contenders
from tandem.cluster.planner.problem import load_problem
from tandem.cluster.planner.search import plan
from tandem.cluster.sim.cluster import SimCluster
from tandem.cluster.sim.deploy import DeviceModel
from tandem.cluster.sim.prompts import asked
from tandem.cluster.sim.request import Asked, Outcome
from tandem.cluster.sim.systems import DISTSERVE, TANDEM, VLLM, Control, ServingSystem
from tandem.cluster.types import SLO, Role
from tandem.cluster.workload.spec import WorkloadSpec, load

PROFILE = "measured/distserve/profiler-a100-80g.distserve.json"
LENGTHS = "workloads/sharegpt_distserve_opt_poisson16rps.csv.gz"
IDEAL = replace(TANDEM, control=Control())
OPT_66B = SLO(ttft_s=0.4, tpot_s=0.1)
GRID = 0.15625
"""Requests/s and GPU: what DistServe's search halves its range of 5 down to."""


def test_opt_13b_on_four_gpus_is_prefill_tp_2_and_decode_tp_1(data: Path) -> None:
    """The example of its README: 200 and 100 ms, 1.56 requests/s and GPU, prefill TP 2, decode TP 1."""
    found = plan(
        load_problem(
            None,
            {
                "model": "opt-13b",
                "dtype": "float16",
                "hardware": "a100-80g",
                "utilization": 0.95,
                "gpus_per_node": 4,
                "profile": str(data / PROFILE),
                "workload": {
                    "lengths": str(data / LENGTHS),
                    "slo_classes": {"chat": {"ttft_s": 0.2, "tpot_s": 0.1}},
                },
                "search": {"seeds": 2, "processes": 2, "time_limit_s": 80},
            },
        )
    )
    best = found.disaggregated
    assert best is not None
    splits = {pool.role: (pool.tensor_parallel, pool.pipeline_stages) for pool in best.candidate.pools}
    assert splits == {Role.PREFILL: (2, 1), Role.DECODE: (1, 1)}
    if found.complete:
        assert best.goodput_per_gpu == pytest.approx(1.56, rel=0.2)
    assert best.binding is None or best.binding.promise == "ttft"


def outcomes_of(
    data: Path,
    prefill: tuple[int, int],
    decode: tuple[int, int],
    rate: float,
    *,
    system: ServingSystem = IDEAL,
    batches: int | None = None,
) -> list[Outcome]:
    """OPT-66B, 300 prompts of ShareGPT, on the device as DistServe measured it, without anybody's control plane or as
    a system of its own. `batches`: of decode rows in a pipeline; None: one a stage.
    """
    workers = [(system.replica(Role.PREFILL, *prefill), 1), (system.replica(Role.DECODE, *decode), 1)]
    spec = system.cluster(workers, opt_66b(data, system))
    if batches is not None:
        costs = [replace(one, costs=replace(one.costs, pipeline_stages=batches)) for one in spec.workers[1:]]
        spec = replace(spec, workers=(spec.workers[0], *costs))
    return SimCluster(spec).run(prompts_of_sharegpt(data, rate))


def opt_66b(data: Path, system: ServingSystem) -> DeviceModel:
    return replace(device_of(system, data / "measured/distserve", "opt-66b"), max_model_len=2048)


def prompts_of_sharegpt(data: Path, rate: float) -> list[Asked]:
    workload = load(WorkloadSpec(lengths=str(data / LENGTHS)), max_model_len=2048)
    rows = workload.draw(rate=rate, seconds=None, num_requests=300, seed=1)
    return [replace(request, slo_class="") for request in asked(rows)]


def attained(outcomes: list[Outcome], promise: SLO = OPT_66B) -> float:
    return sum(outcome.attains(promise) for outcome in outcomes) / len(outcomes)


@pytest.mark.parametrize(("rate", "measured"), [(1.0, 100.0), (2.5, 87.3), (4.0, 70.0)])
def test_table_2_is_near_as_far_as_its_setting_is_known(data: Path, rate: float, measured: float) -> None:
    """Table 2, DistServe's row, read as OPT-66B placed 4,1 → 2,2 under 400 and 100 ms: the only reading of its rates
    that comes near.
    """
    outcomes = outcomes_of(data, (4, 1), (2, 2), rate, system=DISTSERVE)
    assert 100 * attained(outcomes) == pytest.approx(measured, abs=8.0)


def test_no_promise_gives_both_ends_of_table_2(data: Path) -> None:
    """Why not nearer: alone, a prompt of 2,000 tokens takes 370 of its 400 ms, so that at 2 requests/s a twelfth of
    ours miss where 0.7 % did. A promise that so many keep is kept by far more than 70.0 % at 4 requests/s: its row
    falls by 12 points from 2.0 to 2.5, as no queue of these prompts does under one promise.
    """
    slow, fast = (outcomes_of(data, (4, 1), (2, 2), rate, system=DISTSERVE) for rate in (2.0, 4.0))
    promises = [SLO(ttft_s=ttft_s, tpot_s=0.1) for ttft_s in (0.4, 0.5, 0.6, 0.8, 1.0)]
    loose = next(promise for promise in promises if attained(slow, promise) > 0.97)
    assert loose != OPT_66B
    assert attained(fast, loose) > 0.8
    assert attained(fast) == pytest.approx(0.70, abs=0.08)


def test_no_number_of_gpus_gives_both_ends_of_vllms_row_of_table_2(data: Path) -> None:
    """Table 2, vLLM's row: 65.5 at 1.5 requests/s and still 23.6 at 4. On the four GPUs of §6.1 (TP 4) a queue that
    loses as many at 1.5 keeps nobody at 4; on eight, as DistServe's row has them, four of five are kept at 1.5.
    """

    def attained_by(ranks: int, workers: int, rate: float) -> float:
        spec = VLLM.cluster([(VLLM.replica(Role.MIXED, ranks), workers)], opt_66b(data, VLLM))
        return attained(SimCluster(spec).run(prompts_of_sharegpt(data, rate)))

    assert attained_by(4, 1, 1.5) < 0.655 - 0.2
    assert attained_by(4, 1, 4.0) < 0.05
    for ranks, workers in ((4, 2), (8, 1)):
        assert attained_by(ranks, workers, 1.5) > 0.655 + 0.1
        assert attained_by(ranks, workers, 4.0) < 0.236


def test_both_stages_of_a_decode_pipeline_have_a_batch(data: Path) -> None:
    """DistServe's loop reads as if a pipeline could stay with one batch (`DecodingStageLLMEngine._step` waits for it
    before it lets anybody in). Then no more than half would keep 100 ms at 3 requests/s, where 83.0 % attained.
    """
    both, one = (outcomes_of(data, (4, 1), (2, 2), 3.0, system=DISTSERVE, batches=count) for count in (None, 1))
    assert 100 * attained(both) == pytest.approx(83.0, abs=8.0)
    assert attained(one) < 0.6


def test_opt_66b_wants_tp_4_for_prefill_and_either_split_of_four_gpus_for_decode(data: Path) -> None:
    """DistServe places 66B as 4,1 → 2,2; our search on 8 GPUs says 4,1 → 4,1, half a percent ahead. Prefill binds: with
    three GPUs for it a tenth fewer attain, while TPOT keeps its 100 ms behind either decode split. At the points of
    DistServe's grid the two differ by less than its 300 requests can tell, so it takes whichever it meets first.
    """
    for step in (1, 2, 3):
        rate = step * GRID * 8
        wide, deep = (outcomes_of(data, (4, 1), decode, rate) for decode in ((4, 1), (2, 2)))
        assert abs(attained(wide) - attained(deep)) <= 0.02
        for outcomes in (wide, deep):
            tpot_s = sorted(outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None)
            assert tpot_s[int(0.9 * len(tpot_s))] < 0.09
    assert attained(outcomes_of(data, (3, 1), (4, 1), rate)) < attained(wide) - 0.1


def test_what_a_verdict_rests_on(data: Path) -> None:
    """README's 1.56 requests/s and GPU at 200 and 100 ms is what DistServe as measured keeps. vLLM 0.2 as measured
    keeps none at a third of that; but mixed workers with the same step times keep what its split does not, even if a
    mixed step cost as much as its halves apart: the gain of §6.2 is over that engine, and a plan may say: together.
    """
    named = {contender.name.partition(":")[0]: contender for contender in reversed(contenders())}

    def keeps(name: str, rate: float) -> bool:
        promises = [SLO(ttft_s=0.2, tpot_s=0.1)]
        [share] = attainment(named[name], data / "measured/distserve", data / LENGTHS, rate, promises)
        return share >= 0.9

    assert [keeps("DistServe as measured", rate) for rate in (1.5, 1.85)] == [True, False]
    assert not keeps("vLLM 0.2 as measured", 0.5)
    assert [keeps(name, 1.9) for name in ("apart", PAID_APART)] == [False, True]
