"""What a run and a sweep write: named as vLLM names its files, only where it was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.run import BenchResult
from tandem.cluster.cli_bench_output import Output
from tandem.cluster.workload.report import METRICS, RequestRecord, summarize
from tandem.cluster.workload.sweep import SweepPoint, SweepResult, SweepRun

RECORDS = (RequestRecord(due_s=1.0, sent_s=1.0, first_token_s=1.1, last_token_s=1.3, output_tokens=2),)
RESULT = BenchResult(
    summary=summarize(RECORDS, {}), records=RECORDS, facts={"model_id": "m/n"}, metrics=METRICS, name="run"
)


def output(**given: Any) -> Output:
    nothing: dict[str, Any] = dict.fromkeys(("result_dir", "result_filename", "plot", "trace", "server_events"))
    return Output(**{"save_result": False, "detailed": False, "sweep": False, **nothing, **given})


def test_nothing_is_written_that_was_not_asked_for() -> None:
    assert list(output().write_run(RESULT, BenchOptions())) == []


def test_a_result_is_named_by_what_it_is(tmp_path: Path) -> None:
    options = BenchOptions(label="my run", request_rate=2.5, max_concurrency=4)
    lines = list(output(result_dir=str(tmp_path)).write_run(RESULT, options))
    (path,) = tmp_path.iterdir()
    assert lines == [f"saved       {path}"]
    assert path.name.startswith("my_run-2.5qps-concurrency4-")
    saved = json.loads(path.read_text())
    assert saved["mean_ttft_ms"] == pytest.approx(100)
    assert "ttfts" not in saved


def test_detail_and_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    out = output(detailed=True, result_dir=str(tmp_path), result_filename="a.json", trace=str(trace))
    out.check()
    lines = list(out.write_run(RESULT, BenchOptions()))
    assert json.loads((tmp_path / "a.json").read_text())["ttfts"] == pytest.approx([0.1])
    assert lines[-1] == f"traced      {trace}, 0 of 1 requests with the server's own times"
    assert any(row["name"] == "streaming" for row in json.loads(trace.read_text())["traceEvents"])


def test_a_sweep_is_saved_whole(tmp_path: Path) -> None:
    run = SweepRun(seed=0, requests=10, attained=10, late_requests=5, late_attained=5, duration_s=1.0)
    sweep = SweepResult(label="m", target=0.9, promises_ms={"ttft": 1.0}, points=(SweepPoint(rate=2.0, runs=(run,)),))
    out = output(sweep=True, save_result=True, result_dir=str(tmp_path), result_filename="s.json")
    out.check()
    assert len(list(out.write_sweep(sweep))) == 1
    assert json.loads((tmp_path / "s.json").read_text())["best_rate"] == 2.0
    with pytest.raises(ValueError, match="save_trace: is not allowed with sweep"):
        output(sweep=True, trace=str(tmp_path / "t")).check()
