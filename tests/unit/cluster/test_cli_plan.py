"""`tandem plan` as a command: options to a problem, what is refused before anything is searched, exit codes, files."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from tandem.cluster import cli_bench_validate, cli_plan
from tandem.cluster import processors as processors_module
from tandem.cluster.cli import run
from tandem.cluster.config_file import load_config
from tandem.cluster.planner import curves, search
from tandem.cluster.planner.problem import Problem, load_problem
from tandem.cluster.planner.result import Affinity, Candidate, Evaluation, Fate, Interval, PlanResult, Pool
from tandem.cluster.types import Role

MODEL = ["plan", "--model", "opt-13b", "--hardware", "a100-80g", "--gpus-per-node", "2", "--goodput", "ttft:250"]
CHOSEN = Evaluation(
    candidate=Candidate(
        pools=tuple(Pool(role=role, count=1) for role in (Role.PREFILL, Role.DECODE)), affinity=Affinity.HIGH
    ),
    fate=Fate.SIMULATED,
    goodput=Interval(mean=4.0, low=3.9, high=4.1),
    seeds=(3.9, 4.1),
)
FOUND = PlanResult(
    disaggregated=CHOSEN, colocated=None, difference=None, explored=(CHOSEN,), phases=(), seeds=(0, 1), wall_s=1.0
)
Told = list[Problem]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[PlanResult], Told]:
    """A search that hands back what a test says; what it is asked comes back in the list."""

    def answer(result: PlanResult) -> Told:
        asked: Told = []

        def plan(problem: Problem, progress: Callable[[str, float], None]) -> PlanResult:
            asked.append(problem)
            progress("everything", 1.0)
            return result

        monkeypatch.setattr(search, "plan", plan)
        monkeypatch.setattr(sys, "argv", ["tandem", *MODEL])
        return asked

    return answer


def pool_of(folder: Path) -> str:
    """A file of one request's lengths."""
    path = folder / "pool.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n,100,20\n")
    return str(path)


def test_options_are_a_problem(tmp_path: Path, found: Callable[[PlanResult], Told]) -> None:
    (tmp_path / "pool.csv").write_text("arrival_s,input_tokens,output_tokens\n,100,20\n")
    (tmp_path / "problem.yaml").write_text(
        "model: opt-66b\nhardware: a100-80g\nworkload: {input_tokens: 700, range_ratio: 0.5,"
        " slo_classes: {chat: {ttft_s: 1.0}}}\nattainment: 0.95\n"
    )
    asked = found(replace(FOUND, target_rate=3.0))
    options = ["--config", str(tmp_path / "problem.yaml"), "--model", "opt-13b", "--nodes", "2", "--gpus-per-node", "4"]
    options += ["--inter-node", "25Gbps", "--workload", str(tmp_path / "pool.csv"), "--burstiness", "0.5"]
    options += ["--slo-class", "chat:0.75:ttft:250:tpot:100", "--slo-class", "batch:0.25:tpot:500", "--price", "2"]
    options += ["--request-rate", "3", "--seeds", "3", "--processes", "1", "--time-limit", "9", "--max-pp", "1"]
    assert run(["plan", *options, "--memory", "40GiB"]) == cli_plan.RATE_NOT_KEPT
    [problem] = asked
    assert (problem.model, problem.gpus, problem.attainment, problem.rate) == ("opt-13b", 8, 0.95, 3.0)
    assert (problem.price_per_gpu_hour, problem.memory_bytes) == (2.0, 40 * 2**30)
    workload = problem.workload
    assert (workload.lengths, workload.input_tokens, workload.range_ratio) == (str(tmp_path / "pool.csv"), None, 0.0)
    assert (workload.arrivals.value, workload.burstiness) == ("gamma", 0.5)
    assert (workload.classes["chat"].share, workload.classes["chat"].ttft_s) == (0.75, 0.25)
    assert (workload.classes["batch"].ttft_s, workload.classes["batch"].tpot_s) == (None, 0.5)
    limits = problem.search
    assert (limits.seeds, limits.chosen_processes, limits.time_limit_s, limits.max_pipeline_stages) == (3, 1, 9.0, 1)


def test_a_workload_of_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "pool.csv").write_text("arrival_s,input_tokens,output_tokens\n,100,20\n")
    text = "workload: {lengths: pool.csv, slo_classes: {chat: {ttft_s: 1.0}}}\n"
    (tmp_path / "load.yaml").write_text(text)
    given: dict[str, Any] = dict.fromkeys([*cli_plan._PATHS, "goodput", "slo_class"])
    changes = cli_plan.overrides(given | {"workload": str(tmp_path / "load.yaml"), "goodput": None, "slo_class": None})
    problem = load_problem(None, {"model": "opt-13b", "hardware": "a100-80g", **changes})
    assert problem.workload.lengths == str(tmp_path / "pool.csv")
    assert problem.workload.classes["chat"].ttft_s == 1.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--goodput", "ttfb:9"], "--goodput: 'ttfb:9' is not allowed; allowed: ttft:MS, tpot:MS or both"),
        (["--goodput", "tpot:fast"], "--goodput: 'tpot:fast' is not allowed; allowed: tpot:MS, with milliseconds"),
        (["--goodput", "tpot"], "--goodput: 'tpot' is not allowed; allowed: tpot:MS, with milliseconds above 0"),
        (["--goodput", "tpot:0"], "--goodput: 'tpot:0' is not allowed; allowed: tpot:MS, with milliseconds above 0"),
        (["--gpus-per-node", "3.5"], "--gpus-per-node: '3.5' is not allowed; allowed: an integer"),
        (["--price", "dear"], "--price: 'dear' is not allowed; allowed: a number"),
        (["--max-model-len", "2049"], "--max-model-len: 2049 is not allowed; allowed: at most the model's own, 2048"),
        (["--max-model-len", "600"], "--max-model-len: 600 is not allowed; allowed: at least the workload's 640"),
        (["--slo-class", "chat:1:ttft:9"], "--slo-class: 'chat:1:ttft:9' is not allowed; allowed: without goodput"),
        (["--choose", "fastest"], "--choose: 'fastest' is not allowed; allowed: best, disaggregated, colocated"),
        (["--choose", "colocated"], "--choose: has no effect without --output"),
        (["--device", "cpu"], "--device: has no effect without --output or --validate"),
        (["--device", "tpu"], "--device: 'tpu' is not allowed; allowed: one of cpu, cuda, paced"),
        (["--report", "report.pdf"], "--report: 'report.pdf' is not allowed; allowed: a file that ends in .html, .png"),
        (["--output", "plan.json"], "--output: 'plan.json' is not allowed; allowed: a file that ends in .yaml or .yml"),
        (
            ["--output", "/nowhere/plan.yaml"],
            "--output: '/nowhere/plan.yaml' is not allowed; allowed: a file in a folder",
        ),
        (["--save-result", "/nowhere/r.json"], "--save-result: '/nowhere/r.json' is not allowed"),
        (["--validate"], "--validate: is not allowed here; allowed with one class that has a TTFT and a TPOT"),
        (["--validate", "--goodput", "tpot:9"], "--validate: is not allowed without a file of lengths"),
        (["--hardware", "a100"], "--hardware: 'a100' is not allowed; allowed: did you mean a100-80g?"),
        (["--model", "opt-14b"], "model 'opt-14b' is not known (did you mean 'opt-13b'?)"),
        (["--workload", "/no/lengths.csv"], "--workload: '/no/lengths.csv' is not allowed; allowed: a file that"),
        (["--workload", "/no/load.yaml"], "--workload: '/no/load.yaml' is not allowed; allowed: a readable YAML file"),
        (["--profile", "/no/profile.json"], "--profile: /no/profile.json cannot be read"),
        (["--inter-node", "wet string"], "--inter-node: 'wet string' is not allowed"),
        (["--seeds", "1"], "--seeds: 1 is not allowed; allowed: at least 2"),
        (["--attainment-target", "90"], "--attainment-target: 90.0 is not allowed; allowed: above 0, at most 1"),
        (
            ["--config", "/no/problem.yaml"],
            "--config: '/no/problem.yaml' is not allowed; allowed: a readable YAML file (No such file or directory)",
        ),
    ],
)
def test_what_is_wrong_is_refused_before_the_search(
    options: list[str], error: str, found: Callable[[PlanResult], Told], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = found(FOUND)
    assert run([*MODEL, *options]) == 2
    assert error in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--model", "opt-14b", "--hardware", "a100-80g"], "model 'opt-14b' is not known"),
        (["--model", "opt-13b", "--hardware", "a100-81g"], "--hardware: 'a100-81g' is not allowed"),
        (["--model", "opt-13b", "--hardware", "a100-80g"], "is missing; allowed: a class with a promise"),
    ],
)
def test_a_name_that_nobody_knows_is_told_before_a_promise_that_is_missing(
    options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *options]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("chat", "--slo-class: 'chat' is not allowed; allowed: NAME:SHARE:ttft:MS:tpot:MS"),
        ("chat:much:ttft:5", "--slo-class: 'chat:much:ttft:5' is not allowed"),
        ("chat:1", "--slo-class: 'chat' is not allowed; allowed: a class with a promise"),
        ("chat:0.5:ttft:5", "--slo-class: 'shares that add up to 0.5' is not allowed"),
    ],
)
def test_a_wrong_class_is_refused(text: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*MODEL[:-2], "--slo-class", text]) == 2
    assert error in capsys.readouterr().err


def test_exit_codes() -> None:
    assert cli_plan.exit_code(FOUND) == 0
    assert cli_plan.exit_code(replace(FOUND, disaggregated=None, infeasible="even one")) == cli_plan.INFEASIBLE
    assert cli_plan.exit_code(replace(FOUND, disaggregated=None)) == cli_plan.INFEASIBLE
    kept = replace(CHOSEN, keeps_target_rate=True)
    assert cli_plan.exit_code(replace(FOUND, disaggregated=kept, target_rate=3.0)) == 0
    assert cli_plan.exit_code(replace(FOUND, target_rate=9.0)) == cli_plan.RATE_NOT_KEPT
    cut = replace(FOUND, complete=False, colocated_decided=False)
    assert cli_plan.exit_code(cut) == cli_plan.exit_code(replace(cut, disaggregated=None)) == cli_plan.UNDECIDED
    assert cli_plan.exit_code(replace(FOUND, complete=False)) == 0, "only what stands beside the answer is missing"
    assert cli_plan.exit_code(replace(cut, interrupted=True)) == cli_plan.INTERRUPTED


def test_files_are_written(
    tmp_path: Path, found: Callable[[PlanResult], Told], capsys: pytest.CaptureFixture[str]
) -> None:
    found(FOUND)
    plan, saved = tmp_path / "plan.yaml", tmp_path / "found.json"
    assert run([*MODEL, "--output", str(plan), "--save-result", str(saved)]) == 0
    said = capsys.readouterr().out
    assert "Disaggregate: no colocated plan is possible here" in said
    assert f"start it    tandem serve --config {plan}" in said
    assert "rehearsal   its workers compute nothing" in said
    config = load_config(plan)
    assert (config.prefill, config.decode) == (1, 1)
    assert "tandem plan --model opt-13b" in plan.read_text().replace("\n#  ", "")
    whole = orjson.loads(saved.read_bytes())
    assert whole["problem"]["model"] == "opt-13b"
    assert whole["result"]["disaggregated"]["goodput"]["mean"] == 4.0


def test_what_is_not_there_is_not_written(
    tmp_path: Path, found: Callable[[PlanResult], Told], capsys: pytest.CaptureFixture[str]
) -> None:
    found(FOUND)
    plan = tmp_path / "plan.yaml"
    assert run([*MODEL, "--output", str(plan), "--choose", "colocated"]) == 0
    assert "not written" in capsys.readouterr().out
    assert not plan.exists()


def test_what_was_interrupted_is_shown_and_not_written(
    tmp_path: Path, found: Callable[[PlanResult], Told], capsys: pytest.CaptureFixture[str]
) -> None:
    found(replace(FOUND, complete=False, interrupted=True, colocated_decided=False))
    files = [tmp_path / name for name in ("plan.yaml", "found.json", "report.png")]
    options = zip(("--output", "--save-result", "--report"), map(str, files), strict=True)
    assert (
        run(
            [
                *MODEL,
                *(word for pair in options for word in pair),
                "--validate",
                "--goodput",
                "tpot:9",
                "--workload",
                pool_of(tmp_path),
            ]
        )
        == 130
    )
    said = capsys.readouterr().out
    assert "Undecided: the search was interrupted before it was known whether to disaggregate. So far: disagg" in said
    assert "an interruption ended the search" in said
    assert not any(path.exists() for path in files)
    assert all(f"not written {path}: interrupted" in said for path in files)


def test_the_answer_is_there_before_anything_more_is_simulated(
    tmp_path: Path,
    found: Callable[[PlanResult], Told],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found(FOUND)
    files = [tmp_path / name for name in ("plan.yaml", "found.json")]
    report = tmp_path / "report.html"
    said: list[str] = []

    def interrupted(*_: object, **__: object) -> PlanResult:
        assert all(path.exists() for path in files)
        said.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(curves, "with_curves", interrupted)
    options = ["--output", str(files[0]), "--save-result", str(files[1]), "--report", str(report)]
    assert run([*MODEL, *options]) == 130
    assert "Disaggregate: no colocated plan is possible here" in said[0]
    assert f"not drawn   {report}: interrupted" in capsys.readouterr().out
    assert not report.exists()


def test_what_serve_cannot_start_yet_is_said(
    tmp_path: Path, found: Callable[[PlanResult], Told], capsys: pytest.CaptureFixture[str]
) -> None:
    prefill, decode = CHOSEN.candidate.pools
    deep = replace(CHOSEN.candidate, pools=(prefill, replace(decode, pipeline_stages=2)))
    found(replace(FOUND, disaggregated=replace(CHOSEN, candidate=deep)))
    options = ["--gpus-per-node", "4", "--output", str(tmp_path / "plan.yaml")]
    assert run([*MODEL, *options]) == 0
    said = capsys.readouterr().out
    assert "tandem serve cannot start it: decode.engine.pipeline_stages: 2" in said
    assert "--max-pp 1" in said
    assert f"tandem simulate --cluster {tmp_path / 'plan.yaml'}" in said


@pytest.mark.parametrize(("available", "scale"), [(4, 1.0), (3, 2.0)])
def test_both_plans_are_validated_as_they_were_planned(
    tmp_path: Path,
    found: Callable[[PlanResult], Told],
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    scale: float,
) -> None:
    monkeypatch.setattr(processors_module, "processors", lambda: available)
    (tmp_path / "pool.csv").write_text("arrival_s,input_tokens,output_tokens\n,100,20\n")
    mixed = Candidate(pools=(Pool(role=Role.MIXED, count=2),), affinity=Affinity.COLOCATED)
    found(replace(FOUND, colocated=replace(CHOSEN, candidate=mixed)))
    asked: list[tuple[dict[str, Any], list[int]]] = []

    def validation(given: dict[str, Any]) -> None:
        configs = [load_config(path) for path in given["config"]]
        asked.append((given, [config.prefill + config.decode + config.mixed for config in configs]))

    monkeypatch.setattr(cli_bench_validate, "run_validation", validation)
    assert run([*MODEL, "--goodput", "tpot:100", "--workload", str(tmp_path / "pool.csv"), "--validate"]) == 0
    [(given, workers)] = asked
    assert workers == [2, 2]
    assert (given["device"], given["promise"], given["profile"]) == ("paced", "250:100", None)
    assert (given["time_scale"], given["stair_s"]) == (scale, 16.0 * scale), "a router, a load and two workers"
    options = set(inspect.signature(cli_bench_validate.validate).parameters) - {"context"}
    assert set(given) == options, "every option of the other command"
