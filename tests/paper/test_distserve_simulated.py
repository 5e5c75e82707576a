"""DistServe (OSDI '24): runs that its authors measured on A100s, replayed request by request in virtual time, with one
set of constants for each system (`cluster.sim.systems`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster.bench.replay import MAX_POINTS, REQUESTS, Replayed, cluster_of, read_runs, replay
from tandem.cluster.sim.cluster import SimCluster

SATURATED = {"distserve-c21d11-600-6"}
"""Its decode memory is full: TPOT p90 is 13 times p50."""
WITHIN = {"vllm-100-1": 7.0}
"""Points. Of a hundred requests each is one; and the same prompt, alone in the system, took 14 % less here than in the
second of vLLM's runs: one set of constants stands between the two.
"""


@pytest.fixture(scope="module")
def replayed(data: Path) -> dict[str, Replayed]:
    folder = data / "measured/distserve"
    return {run.name: replay(run, folder) for run in read_runs(folder / REQUESTS)}


@pytest.mark.parametrize(
    "name",
    ["distserve-c21d11-300-3", "distserve-c21d11-450-4.5", "distserve-c21d11-600-6", "vllm-100-1", "vllm-200-2"],
)
def test_attainment_is_what_was_measured(replayed: dict[str, Replayed], name: str) -> None:
    """§6.2, OPT-13B on ShareGPT: 250 ms TTFT and 100 ms TPOT, jointly."""
    assert abs(replayed[name].points) <= WITHIN.get(name, MAX_POINTS)


def test_latencies_are_within_15_percent_below_saturation(replayed: dict[str, Replayed]) -> None:
    for name, row in replayed.items():
        errors = row.errors()
        if name in SATURATED:
            del errors["tpot_p90_s"]
        assert max(map(abs, errors.values())) <= 0.15, (name, errors)


def test_beyond_saturation_the_tail_is_that_of_swapping(data: Path, replayed: dict[str, Replayed]) -> None:
    """What a decode worker that swaps out does to TPOT is foretold; one that had room for all would attain 25 points
    more.
    """
    row = replayed["distserve-c21d11-600-6"]
    assert row.simulated.tpot_p90_s > 0.7 * row.measured.tpot_p90_s
    spec = cluster_of(row.run, data / "measured/distserve")
    roomy = replace(spec, workers=tuple(replace(worker, num_blocks=20_000) for worker in spec.workers))
    outcomes = SimCluster(roomy).run(row.run.asked)
    tpot_s = sorted(outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None)
    assert tpot_s[int(0.9 * len(tpot_s))] < 0.1


def test_a_run_of_an_unknown_split_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(
        "run,backend,config,num_requests,nominal_rate_rps,arrival_s,input_tokens,output_tokens,ttft_ms,tpot_ms\n"
        "odd,distserve,c2,1,1,0,5,2,20,30\n"
    )
    [run] = read_runs(path)
    with pytest.raises(ValueError, match="is not like c21d11"):
        cluster_of(run, data / "measured/distserve")
    path.write_text("run,backend\nodd,vllm\n")
    with pytest.raises(ValueError, match="there is no column"):
        read_runs(path)
