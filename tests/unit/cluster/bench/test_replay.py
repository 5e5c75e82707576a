"""`tandem bench replay` on a made-up device: whoever measured what virtual time says is not far."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tandem.cluster.bench.replay import REQUESTS, ablations, cluster_of, read_runs, replay, show, show_ablations
from tandem.cluster.bench.replay_costs import compare_costs, show_costs
from tandem.cluster.cli import app
from tandem.cluster.sim.systems import DISTSERVE, VLLM
from typer.testing import CliRunner

SPLIT = {
    "decoding_large_small_bs_threshold": 95,
    "prefill": [100.0, 0.0, 0.0],
    "decoding_smallbs": [40.0, 0.0, 0.0],
    "decoding_largebs": [40.0, 0.0, 0.0],
}
HEADER = "run,backend,config,num_requests,nominal_rate_rps,arrival_s,input_tokens,output_tokens,ttft_ms,tpot_ms\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as DistServe's data are kept; a prompt takes 0.1 s there, a step 40 ms."""
    for kind in ("distserve", "vllm"):
        (tmp_path / f"profiler-a100-80g.{kind}.json").write_text(json.dumps({"facebook/opt-13b": {"1": SPLIT}}))
    held = ["model,tp,pp,max_num_tokens", "facebook/opt-13b,1,1,66144", "facebook/opt-13b,1,2,163008"]
    (tmp_path / "max_num_tokens.csv").write_text("\n".join(held) + "\n")
    rows = "split,distserve,c11d11,2,1,{at},16,{out},{ttft},{tpot}\n"
    text = HEADER + rows.format(at=5, out=1, ttft=110, tpot="") + rows.format(at=0, out=11, ttft=110, tpot=43)
    with gzip.open(tmp_path / REQUESTS, "wt") as file:
        file.write(text)
    return tmp_path


def test_a_run_is_read_in_order_of_arrival_and_replayed(data: Path) -> None:
    [run] = read_runs(data / REQUESTS)
    assert [request.arrival_s for request in run.asked] == [0.0, 5.0]
    assert (run.system, run.config, run.rate) == ("distserve", "c11d11", 1.0)
    row = replay(run, data)
    assert row.measured.attainment == row.simulated.attainment == 1.0
    assert row.points == 0.0
    assert max(map(abs, row.errors().values())) < 0.1
    assert "| split | 2 | 100.0 → 100.0 | +0.0 | 110 → 10" in show([row])


def test_what_is_left_out_is_named_and_changes_the_system(data: Path) -> None:
    [run] = read_runs(data / REQUESTS)
    for system in (DISTSERVE, VLLM):
        parts = ablations(system)
        assert parts.pop("as it is") is system
        assert len(parts) >= 3
        assert system not in parts.values()
    rows = {name: [replay(run, data, part)] for name, part in ablations(DISTSERVE).items()}
    text = show_ablations(rows)
    assert text.count("\n") == 2 + len(rows)
    assert "| KV moves in no time | 100.0 %, TPOT" in text


@pytest.mark.parametrize(
    ("backend", "config", "message"),
    [
        ("orca", "tp1", "backend: 'orca' is not known; known: distserve, vllm, tandem"),
        ("vllm", "c2", "config: 'c2' is not like c21d11 or tp1"),
        ("vllm", "c11d11", "vllm has no prefill workers"),
        ("distserve", "c41d11", "TP 4 PP 1: nothing is known of its memory; known: TP 1 PP 1, TP 1 PP 2"),
    ],
)
def test_what_nothing_is_known_of_is_refused(data: Path, backend: str, config: str, message: str) -> None:
    path = data / "other.csv"
    path.write_text(f"{HEADER}odd,{backend},{config},1,1,0,5,2,20,30\n")
    [run] = read_runs(path)
    with pytest.raises(ValueError, match=message):
        cluster_of(run, data)


def test_the_command_says_who_is_far(data: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["bench", "replay", "--data", str(data), *words])
        return result.exit_code, result.output

    code, output = run("--ablate", "--costs")
    assert code == 0
    assert "| as it is |" in output
    assert "| opt-13b | 1 | prefill | 6 |" in output
    path = data / "slow.csv"
    path.write_text(f"{HEADER}slow,distserve,c11d12,1,1,0,5,9,900,30\n")
    code, output = run("--requests", str(path))
    assert code == 1
    assert "more than 5 points off: slow" in output


def test_the_roofline_is_compared_at_every_split(data: Path) -> None:
    rows = compare_costs(data)
    assert [(row.tensor_parallel, row.phase, len(row.errors)) for row in rows] == [(1, "prefill", 6), (1, "decode", 21)]
    assert show_costs(rows).count("\n") == 3
