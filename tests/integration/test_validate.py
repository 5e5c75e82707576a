"""A tiny paced cluster of real processes under a staircase: the simulator's requests are its requests, the router
counts what the client counts, and what was measured is not measured again.
"""

from __future__ import annotations

import asyncio
import csv
import json
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tandem.cluster.bench.claims_cluster import RunningSystem
from tandem.cluster.bench.claims_disaggregation import Kept, StairResult, climb, options_for, run_key
from tandem.cluster.bench.claims_load import Promise, Staircase
from tandem.cluster.bench.run import connect
from tandem.cluster.bench.validate import VARIANT, Trial, validate
from tandem.cluster.bench.validate_calibrate import calibrate
from tandem.cluster.bench.validate_predict import Overheads, router_for
from tandem.cluster.bench.validate_show import show
from tandem.cluster.bench.validate_subjects import QUICK_PROFILE, paced_subject
from tandem.cluster.config import PlanConfig

REQUESTS = 12


def own_count(url: str) -> dict[str, float]:
    """What the router says of all classes together."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return {
            sample.name.removeprefix("tandem:"): sample.value
            for family in families
            for sample in family.samples
            if sample.labels.get("slo_class") == ""
        }


def test_what_is_predicted_is_what_is_asked_and_the_router_counts_as_its_client(tmp_path: Path) -> None:
    lengths, steps = tmp_path / "lengths.csv", tmp_path / "steps.json"
    with lengths.open("w", newline="") as file:
        rows = [["", 20 + number, 4] for number in range(20)]
        csv.writer(file).writerows([["arrival_s", "input_tokens", "output_tokens"], *rows])
    QUICK_PROFILE.save(steps)
    subject = paced_subject("1P+1D", steps)
    load = Staircase(
        dataset_path=str(lengths),
        rates=(REQUESTS / 1.5,),
        stair_s=1.5,
        promises=(Promise(ttft_s=60.0, tpot_s=60.0),),
    )
    router = replace(router_for(subject, load), plan=PlanConfig(predicted_attainment=0.97, rate=8.0))

    async def scene(running: RunningSystem) -> tuple[Overheads, dict[str, float], list[StairResult], dict[str, float]]:
        async with connect(options_for(running, load)) as served:
            overheads = await calibrate(served, QUICK_PROFILE, QUICK_PROFILE)
            before = own_count(running.url)
            stairs = await climb(subject.system, running, served, load)
            return overheads, before, stairs, own_count(running.url)

    with RunningSystem(subject.system, router) as running:
        overheads, before, stairs, after = asyncio.run(scene(running))
    assert overheads.first_token_s > 0.0
    [run] = [run for stair in stairs for run in stair.runs]
    assert (run.requests, run.attained) == (REQUESTS, REQUESTS)
    assert after["attainment_requests"] - before["attainment_requests"] == run.requests
    assert after["attainment"] == 1.0
    assert after["predicted_attainment"] == 0.97

    kept = Kept(path=tmp_path / "runs.jsonl")
    kept.add(run_key(subject.system, load, VARIANT), load.seed, subject.label, stairs)
    lines: list[str] = []
    found = asyncio.run(
        validate(
            [Trial(subject=subject, load=load)],
            overheads,
            seeds=1,
            kept=Kept(path=tmp_path / "runs.jsonl"),
            end_s=time.monotonic(),
            say=lines.append,
        )
    )
    [row] = found.rows
    assert (row.predicted.requests, row.predicted.attainment) == (REQUESTS, 1.0)
    assert row.counts == (not row.void)
    assert bool(row.void) or not stairs[0].void
    assert row.measured is not None
    assert row.measured.attainment == 1.0
    assert all("no time left" in line for line in lines)
    assert "1 prefill + 1 decode" in show(found)
    json.dumps(found.as_json({}), allow_nan=False)
