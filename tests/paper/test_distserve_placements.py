"""DistServe (OSDI '24), §4 and §6: the placements that it finds, approached from its A100 coefficients and ShareGPT's
lengths; where ours differ, the reason by experiment.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster.bench.replay import device_of
from tandem.cluster.planner.problem import load_problem
from tandem.cluster.planner.search import plan
from tandem.cluster.sim.cluster import SimCluster
from tandem.cluster.sim.prompts import asked
from tandem.cluster.sim.request import Outcome
from tandem.cluster.sim.systems import TANDEM, Control
from tandem.cluster.types import SLO, Role
from tandem.cluster.workload.spec import WorkloadSpec, load

PROFILE = "measured/distserve/profiler-a100-80g.distserve.json"
LENGTHS = "workloads/sharegpt_distserve_opt_poisson16rps.csv.gz"
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
                "search": {"seeds": 2, "processes": 2, "time_limit_s": 40},
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


def outcomes_of(data: Path, prefill: tuple[int, int], decode: tuple[int, int], rate: float) -> list[Outcome]:
    """OPT-66B, 300 prompts of ShareGPT, on the device as DistServe measured it, without anybody's control plane."""
    system = replace(TANDEM, control=Control())
    device = replace(device_of(system, data / "measured/distserve", "opt-66b"), max_model_len=2048)
    workers = [(system.replica(Role.PREFILL, *prefill), 1), (system.replica(Role.DECODE, *decode), 1)]
    workload = load(WorkloadSpec(lengths=str(data / LENGTHS)), max_model_len=2048)
    rows = workload.draw(rate=rate, seconds=None, num_requests=300, seed=1)
    requests = [replace(request, slo_class="") for request in asked(rows)]
    return SimCluster(system.cluster(workers, device)).run(requests)


def attained(outcomes: list[Outcome]) -> float:
    return sum(outcome.attains(OPT_66B) for outcome in outcomes) / len(outcomes)


@pytest.mark.parametrize(("rate", "measured"), [(1.0, 100.0), (2.5, 87.3), (4.0, 70.0)])
def test_table_2_is_near_as_far_as_its_setting_is_known(data: Path, rate: float, measured: float) -> None:
    """Table 2, DistServe's row, read as OPT-66B placed 4,1 → 2,2 under 400 and 100 ms: the only reading of its rates
    that comes near. Below its knee more of our prompts are too long for 400 ms than of theirs, of which none is.
    """
    assert 100 * attained(outcomes_of(data, (4, 1), (2, 2), rate)) == pytest.approx(measured, abs=8.0)


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
