"""`tandem simulate`: the same seed gives the same bytes, reports have the names of a benchmark's, what cannot be is
refused by name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster import cli
from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.run import _facts
from tandem.cluster.bench.show import table
from tandem.cluster.bench.simulated import METRICS, SimulatedRun, Simulation
from tandem.cluster.bench.simulated_plots import lost_text, title_of
from tandem.cluster.bench.simulated_sweep import sweep
from tandem.cluster.bench.simulated_trace import simulated_events
from tandem.cluster.bench.sweep_load import SweepPlan
from tandem.cluster.bench.workload import Workload
from tandem.cluster.cli_display import Display
from tandem.cluster.cli_simulate import watched_run
from tandem.cluster.cli_simulate_options import of_cluster
from tandem.cluster.sim.request import Outcome
from tandem.cluster.sim.scenario import read_scenario
from tandem.cluster.workload.chrome_trace import TraceEvent
from tandem.cluster.workload.report import result_json
from tandem.cluster.workload.sweep import SweepPoint

CLUSTER = {"model": "opt-13b", "hardware": "a100-80g", "prefill.workers": 1, "decode.workers": 1, "rate": 4.0}
FLAGS = ("--model", "opt-13b", "--hardware", "a100-80g", "--prefill", "1", "--decode", "1", "--request-rate", "4")
PROGRAM = "import sys; from tandem.cluster.cli import run; sys.exit(run(sys.argv[1:]))"
EVERYTHING = (
    *("--arrivals", "trace", "--goodput", "ttft:300", "tpot:50", "--save-detailed", "--result-filename", "run.json"),
    *("--save-requests", "requests.csv", "--save-trace", "trace.json", "--save-plot", "run.svg"),
)
CLASSES = {"chat": {"share": 0.5, "ttft_s": 0.5, "tpot_s": 0.1}, "bulk": {"share": 0.5}}


def simulation(**fields: Any) -> Simulation:
    tree = CLUSTER | {"num_requests": 40} | {name.replace("__", "."): value for name, value in fields.items()}
    return Simulation(read_scenario(None, tree))


def simulate(*argv: str) -> int:
    return cli.run(["simulate", *FLAGS, *argv])


@pytest.fixture(scope="module")
def watched() -> SimulatedRun:
    return simulation(workload__slo_classes=CLASSES).run(record_all=True)


def test_the_example_scenarios_can_be_simulated(repository: Path) -> None:
    found = sorted((repository / "deploy" / "plans").glob("*.scenario.yaml"))
    assert found
    for path in found:
        result = Simulation(read_scenario(path, {"num_requests": 5})).run()
        assert result.summary.completed == 5


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{place * 0.2},{600 + 40 * place % 300},{5 + place},{place % 3} {place % 5}" for place in range(30)]
    trace.write_text("arrival_s,input_tokens,output_tokens,prefix_hashes\n" + "\n".join(lines) + "\n")
    written = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, "simulate", *FLAGS[:-2], "--dataset-path", str(trace), *EVERYTHING],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())} | {"stdout": done.stdout})
    assert set(written[0]) == {"run.json", "requests.csv", "trace.json", "run.svg", "stdout"}
    assert {name for name in written[0] if written[0][name] != written[1][name]} == set()


def test_a_saved_result_has_the_names_of_a_benchmarks(tmp_path: Path) -> None:
    assert (
        simulate("--num-prompts", "20", "--goodput", "ttft:400", "--save-detailed", "--result-dir", str(tmp_path)) == 0
    )
    [path] = tmp_path.iterdir()
    saved = json.loads(path.read_text())
    assert (saved["virtual_time"], saved["backend"], saved["model_id"]) == (True, "simulate", "opt-13b")
    assert (saved["completed"], saved["failed"], saved["num_prompts"], saved["request_rate"]) == (20, 0, 20, 4.0)
    assert len(saved["ttfts"]) == len(saved["latencies"]) == 20
    assert saved["p99_ttft_ms"] >= saved["median_ttft_ms"] > 0
    assert saved["goodput_slo_ms"] == {"ttft": 400.0}
    assert saved["slo_classes"]["interactive"]["attainment"] == saved["attainment"]
    assert not [name for name in saved if "lateness" in name or "stall" in name or name in ("date", "itls")]


def test_a_saved_result_has_no_name_of_its_own_for_what_a_benchmark_has(watched: SimulatedRun) -> None:
    options = BenchOptions(base_url="http://127.0.0.1:1", request_rate=4.0)
    told = _facts(options, "opt-13b", "20260101", Workload(requests=(), arrivals_s=(), warmups=()))
    theirs = {*told, *result_json(watched.summary, watched.records, {}, metrics=METRICS)}
    ours = set(watched.as_json(detailed=True)) | {"label"}  # which saving adds
    assert ours - theirs == {
        *("virtual_time", "hardware", "arrivals", "scenario"),
        *("refused", "slo_classes", "kv_crossed_bytes"),
    }
    left = {name for name in theirs - ours if not name.endswith(("lateness_ms", "stall_ms"))}
    assert left == {
        *("date", "base_url", "endpoint", "tokenizer_id"),
        *("client_warning", "max_output_tokens_per_s", "itls", "generated_texts", "queue_times"),
    }


def test_the_first_line_says_that_time_is_virtual(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--num-prompts", "5", "--slo-class", "a:0.5:ttft:9", "--slo-class", "b:0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("VIRTUAL TIME: nothing is computed")
    assert lines[1] == "opt-13b on a100-80g: 1 x prefill TP 1 + 1 x decode TP 1; random lengths, poisson at 4/s"
    assert any(line.startswith("TTFT") for line in lines)
    assert not any(line.startswith(("sent late", "read late")) for line in lines)


def test_several_classes_are_judged_each_by_its_own(watched: SimulatedRun) -> None:
    assert {name: total for name, (_, total) in watched.by_class.items()} != {"chat": 40, "bulk": 0}
    assert sum(total for _, total in watched.by_class.values()) == 40
    assert watched.summary.attained == sum(kept for kept, _ in watched.by_class.values())
    assert watched.as_json(detailed=False)["slo_classes"]["bulk"]["ttft_ms"] is None
    assert len([line for line in watched.lines() if line.startswith("class")]) == 2


def test_a_trace_holds_every_step_and_transfer(watched: SimulatedRun) -> None:
    events = [event for event in simulated_events(watched) if isinstance(event, TraceEvent)]
    steps = [event for event in events if event.process == "engines"]
    assert {event.track for event in steps} == {"prefill-0", "decode-0"}
    prompts = sum(event.args["prefill_tokens"] for event in steps if event.track == "prefill-0")
    assert prompts == sum(len(one.asked.prompt_token_ids) for one in watched.outcomes)
    answers = sum(event.args["steps"] * event.args["decode_rows"] for event in steps)
    assert answers == sum(one.asked.output_tokens - 1 for one in watched.outcomes)
    moved = [event for event in events if event.process == "KV on its way"]
    assert sum(event.args["bytes"] for event in moved) == sum(one.transferred_bytes for one in watched.outcomes)


def test_samples_show_queues_and_kv(watched: SimulatedRun) -> None:
    assert watched.recorder is not None
    assert len(watched.recorder.samples) > 100
    times = [at_s for at_s, _, _ in watched.recorder.samples]
    assert times == sorted(times)
    assert max(workers[1].running for _, _, workers in watched.recorder.samples) > 1
    assert all(0 <= one.used_blocks <= one.num_blocks for _, _, workers in watched.recorder.samples for one in workers)


def test_watching_changes_nothing() -> None:
    def times(run: SimulatedRun) -> list[tuple[float | None, float | None]]:
        return [(one.first_token_s, one.last_token_s) for one in run.outcomes]

    assert times(simulation().run(record_all=True)) == times(simulation().run())


def test_a_stopped_run_reports_what_has_ended() -> None:
    result = simulation(num_requests=200).run(on_progress=lambda now_s, ended, planned: ended >= 50)
    assert result.stopped
    assert 50 <= len(result.outcomes) == result.summary.completed < 200
    assert "PARTIAL: stopped when" in result.notes[-1]


def test_the_first_ctrl_c_stops_a_run_and_the_second_is_the_shells(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with watched_run(Display(), "requests") as watch:
        assert watch(1.0, 5, 10) is False
        signal.raise_signal(signal.SIGINT)
        assert watch(2.0, 6, 10) is True
        assert signal.getsignal(signal.SIGINT) is before
    assert watch.exit_code == 130
    assert capsys.readouterr().out == ""


def found_by_sweep(**fields: Any) -> tuple[float | None, list[SweepPoint]]:
    points: list[SweepPoint] = []
    plan = SweepPlan(target=0.9, seeds=2, duration_s=6.0, resolution=0.3, max_points=8, start_rate=8.0)
    quick = {"workload__input_tokens": 300, "workload__output_tokens": 8, "prefix_cache": False}
    result = sweep(simulation(**quick, **fields), plan, on_point=points.append)
    return None if result.best is None else result.best.rate, points


def test_a_sweep_finds_the_knee_under_the_same_seeds_at_every_rate() -> None:
    promise = {"interactive": {"ttft_s": 0.1, "tpot_s": 0.05}}
    best, points = found_by_sweep(workload__slo_classes=promise)
    assert best is not None
    failed = min(point.rate for point in points if not point.keeps(0.9))
    assert best < failed <= 1.3 * best
    assert all(run.seed == place for point in points for place, run in enumerate(point.runs))


def test_a_sweep_judges_the_class_that_fares_worst() -> None:
    classes = {"chat": {"share": 0.5, "ttft_s": 0.01}, "bulk": {"share": 0.5, "ttft_s": 60.0}}
    best, points = found_by_sweep(workload__slo_classes=classes, router__refuse=False)
    assert best is None
    assert points[0].attainment < 0.1


def test_a_sweep_without_a_promise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"goodput: is missing; allowed: with sweep"):
        sweep(simulation(), SweepPlan())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--num-prompts", "0"), "--num-prompts: 0 is not allowed; allowed: at least 1"),
        (("--request-rate", "0"), "--request-rate: 0.0 is not allowed; allowed: above 0"),
        (("--request-rate", "nan"), "--request-rate: nan is not allowed; allowed: a finite number"),
        (("--duration", "-1"), "--duration: -1.0 is not allowed; allowed: above 0"),
        (("--decode", "0"), "--decode: 0 is not allowed; allowed: at least 1, or mixed workers"),
        (("--hardware", "tpu"), "--hardware: 'tpu' is not allowed"),
        (("--goodput", "e2el:5"), "--goodput: 'e2el:5' is not allowed; allowed: ttft:MS, tpot:MS"),
        (("--dataset-path", "/nowhere.csv"), "--dataset-path: '/nowhere.csv' is not allowed"),
        (("--arrivals", "trace"), "--dataset-path: is missing; allowed: the file of a trace"),
        (("--random-input-len", "9000"), "--random-input-len: '9128 tokens of prompt and answer' is not allowed"),
        (("--config", "/nowhere.yaml"), "--config: '/nowhere.yaml' is not allowed; allowed: a readable YAML file"),
        (
            ("--slo-class", "chat:x"),
            "--slo-class: 'chat:x' is not allowed; allowed: NAME:SHARE:ttft:MS:tpot:MS, e.g. chat",
        ),
        (("--slo-class", "chat:1:ttft"), "--slo-class: 'chat:1:ttft' is not allowed; allowed: NAME"),
        (("--slo-class", "chat:1:itl:5"), "--slo-class: 'itl:5' is not allowed; allowed: ttft:MS"),
        (("--slo-class", "chat:0.5:ttft:5"), "--slo-class: 'shares that add up to 0.5' is not allowed"),
        (("--slo-class", "a:1", "--goodput", "ttft:5"), "--slo-class: 'a:1' is not allowed; allowed: without goodput"),
        (("--config", "x.yaml", "--cluster", "y.yaml"), "--cluster: 'y.yaml' is not allowed beside --config"),
        (("--fail", "decode-0"), "--fail: 'decode-0' is not allowed; allowed: e.g. decode-0@30"),
        (("--fail", "decode-7@3"), "--fail: worker 'decode-7' is not allowed; allowed: prefill-0, decode-0"),
        (("--fail", "decode-0@9-3"), "--fail: decode-0 at 9 s, back at 3 s is not allowed"),
        (("--save-requests", "/nowhere/r.csv"), "--save-requests: '/nowhere/r.csv' is not allowed"),
        (("--save-trace", "/"), "--save-trace: '/' is not allowed; allowed: a file in a folder that exists"),
        (("--save-plot", "x.txt"), "--save-plot: 'x.txt' is not allowed"),
        (("--sweep", "--save-requests", "r.csv"), "--save-requests: is not allowed with sweep; allowed: one run"),
        (("--sweep",), "--goodput: is missing; allowed: with sweep"),
        (("--metric-percentiles", "x"), "--metric-percentiles: 'x' is not allowed"),
        (("--metric-percentiles", "101"), "--metric-percentiles: '101' is not allowed; allowed: 0 to 100, e.g. 50,99"),
    ],
)
def test_wrong_options_are_one_line_and_named(
    argv: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(*argv) == 2
    assert message in capsys.readouterr().err


def test_who_lost_a_worker_is_tried_again_or_given_up() -> None:
    back = simulation(failures=[{"worker": "decode-0", "at_s": 3.0, "back_s": 4.0}]).run(record_all=True)
    assert back.summary.completed == 40
    again = sum(one.tries > 1 for one in back.outcomes)
    assert again > 0
    assert back.lines() == [f"tried again {again} request{'' if again == 1 else 's'}"]
    assert back.recorder is not None
    down = [at_s for at_s, _, workers in back.recorder.samples if not workers[1].up]
    assert down
    assert all(3.0 <= at_s <= 4.0 for at_s in down)
    gone = simulation(failures=[{"worker": "decode-0", "at_s": 3.0}], router__unready_wait_s=1.0).run()
    assert gone.summary.failed == sum(bool(one.refused or one.failed) for one in gone.outcomes) > 0
    assert gone.summary.completed + gone.summary.failed == 40


def test_who_was_refused_is_told() -> None:
    result = simulation(router__max_waiting=1, rate=1000.0).run()
    refused: list[Outcome] = [one for one in result.outcomes if one.refused]
    assert refused
    assert result.summary.failed == len(refused)
    assert result.lines()[0].startswith(f"refused     {len(refused)} ")
    assert result.as_json(detailed=False)["refused"] == result.refused == len(refused)
    assert f"{len(refused)} refused, 0 failed" in table(
        result.summary, metrics=METRICS, client=False, refused=result.refused
    )


def test_a_rate_that_is_missing_names_the_arrivals_that_need_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["simulate", *FLAGS[:-2], "--dataset-path", str(trace_file(tmp_path, 40))]) == 2
    assert (
        "--request-rate: is missing; allowed: requests per second; arrivals as a file has them (--arrivals trace)"
        in (capsys.readouterr().err)
    )


def test_a_replay_has_its_own_rate_whatever_a_file_says_of_another_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, scenario = trace_file(tmp_path, 40), tmp_path / "scenario.yaml"
    scenario.write_text("{model: opt-13b, hardware: a100-80g, mixed: 1, rate: 13.7}")
    argv = ["simulate", "--config", str(scenario), "--dataset-path", str(file), "--arrivals", "trace"]
    assert cli.run(argv) == 0
    assert "trace as recorded" in capsys.readouterr().out
    assert cli.run([*argv, "--request-rate", "4"]) == 0
    assert "trace at 4/s" in capsys.readouterr().out


def test_a_run_that_lacks_much_of_its_file_warns_beside_the_numbers(tmp_path: Path) -> None:
    file = trace_file(tmp_path, 40, longest=9000)
    lacks = simulation(workload__lengths=str(file)).run()
    assert lacks.lines()[0] == (
        "WARNING     50% of the file's requests are left out, 20 of 40: longer than the context of 2048 tokens or the "
        "caps; all of the above is of the others alone"
    )
    assert not simulation(workload__lengths=str(trace_file(tmp_path, 40))).run().lines()


def test_a_file_whose_arrivals_go_backwards_is_told(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,input_tokens,output_tokens\n5,30,4\n1,30,4\n7,30,4\n")
    replay = {"workload__lengths": str(file), "workload__arrivals": "trace", "num_requests": 3}
    assert "taken by arrival: 1 request of the file came before the one above" in simulation(**replay).run().notes
    assert not simulation(workload__lengths=str(file)).run().notes, "its times are not used"


def test_workers_beside_a_clusters_own_are_refused(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "{router: {model: smollm2-135m}, mixed: 2, prefill: 0, decode: 0, engine: {device: cpu, model: smollm2-135m}}"
    )
    given = dict.fromkeys(("config", "prefill", "decode", "mixed")) | {"cluster": str(cluster)}
    with pytest.raises(
        ValueError, match=r"prefill.workers: 2 is not allowed; allowed: 0, or with --mixed 0 .* 2 x mixed"
    ):
        of_cluster({**given, "prefill": 2})
    assert of_cluster({**given, "mixed": 3})["mixed.workers"] == 2
    assert of_cluster({**given, "mixed": 0, "prefill": 1, "decode": 1})["prefill.workers"] == 0


def trace_file(folder: Path, count: int, *, longest: int = 60) -> Path:
    """Every second request is of 50 tokens, the others of `longest`."""
    path = folder / f"{longest}.csv"
    rows = "".join(f"{place * 0.5},{longest if place % 2 else 50},4\n" for place in range(count))
    path.write_text(f"arrival_s,input_tokens,output_tokens\n{rows}")
    return path


def test_a_picture_tells_what_came_from_what_was_served_and_refused_from_failed() -> None:
    assert title_of("opt", 13.7, 11.614) == "opt, virtual time: 13.7 requests/s came, 11.61 requests/s served"
    assert title_of("opt", "as recorded", 2.0) == "opt, virtual time: as recorded, 2.00 requests/s served"
    assert (lost_text(51, 51), lost_text(2, 5), lost_text(0, 3)) == ("51 refused", "2 refused, 3 failed", "3 failed")
