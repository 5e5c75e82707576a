"""What a plan is asked for: from a file and flags, and what is wrong with it named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_cases import OPT, opt
from tandem.cluster.latency.links import KNOWN_LINKS, link_of
from tandem.cluster.latency.measured import MeasuredProfile, Measurement, PointErrors
from tandem.cluster.latency.profile import DecodeTerms, StepProfile
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.planner.problem import Problem, load_problem
from tandem.cluster.planner.setting import setting_of
from tandem.cluster.planner.words import loss_text, poor_text
from tandem.cluster.sim.deploy import DistServeCosts, MeasuredCosts, RooflineCosts

FILE = """
model: opt-13b
hardware: a100-80g
nodes: 2
gpus_per_node: 4
inter_node: 25Gbps
intra_node: {bandwidth_gb_s: 300, latency_us: 5}
memory_bytes: 40GiB
workload:
  lengths: pool.csv
  arrivals: gamma
  burstiness: 0.5
  slo_classes:
    chat: {share: 0.8, ttft_s: 0.25, tpot_s: 0.1}
    batch: {share: 0.2}
rate: 12
price_per_gpu_hour: 2.5
search: {seeds: 3, seed: 7, processes: 2, time_limit_s: 20}
"""
POOL = "arrival_s,input_tokens,output_tokens\n,100,20\n,300,40\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "problem.yaml"
    path.write_text(text)
    return path


def test_a_file_with_everything(tmp_path: Path) -> None:
    (tmp_path / "pool.csv").write_text(POOL)
    problem = load_problem(write(tmp_path, FILE), {"search.seeds": 4})
    assert (problem.gpus, problem.rate, problem.search.seeds, problem.search.seed) == (8, 12, 4, 7)
    inside, between = problem.links()
    assert (inside.bandwidth_gb_s, inside.latency_us, between.bandwidth_gb_s) == (300, 5, 3.125)
    device = problem.device()
    assert (device.facts.name, device.hardware.memory_bytes) == ("opt-13b", 40 * 2**30)
    assert device.hardware.devices_per_node == 4
    assert device.hardware.inter_node.bandwidth_gb_s == 3.125
    assert isinstance(device.source, RooflineCosts)
    assert {row.input_tokens for row in problem.requests().pool} == {100, 300}, "the file beside the problem's"


def test_what_is_not_said_is_the_hardwares(tmp_path: Path) -> None:
    problem = opt(gpus_per_node=None)
    assert (problem.nodes, problem.node_gpus, problem.gpus) == (1, 8, 8)
    assert problem.links()[0].bandwidth_gb_s == problem.device_hardware().intra_node.bandwidth_gb_s
    assert problem.attainment == 0.9
    assert problem.device().context_tokens == 2048


def test_a_profile_stands_for_the_roofline(tmp_path: Path) -> None:
    decode = DecodeTerms(step_s=0.01, row_s=1e-4, context_token_s=1e-6)
    steps = StepProfile(
        prefill_step_s=0.01, prefill_token_s=1e-4, decode=decode, large_decode=decode, large_batch_rows=1
    )
    steps.save(tmp_path / "steps.json")
    source = opt(profile=str(tmp_path / "steps.json")).device().source
    assert source == MeasuredCosts(profiles={(1, 1): steps})


def test_a_file_of_distserve(tmp_path: Path) -> None:
    path = tmp_path / "profiler.json"
    path.write_text(json.dumps({"facebook/opt-13b": {"1": {}}, "facebook/opt-66b": {"2": {}}}))
    assert opt(profile=str(path)).device().source == DistServeCosts(path=str(path), model="facebook/opt-13b")
    with pytest.raises(
        ValueError, match=r"model: 'opt-6\.7b' is not allowed; allowed: one that .* has: facebook/opt-1"
    ):
        opt(model="opt-6.7b", profile=str(path)).device()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, r"model: is missing; allowed: a registered name"),
    ({"hardware": None}, r"hardware: is missing; allowed: the name of a hardware file"),
    ({"workload.slo_classes": {}}, r"workload\.slo_classes: is missing; allowed: a class with a promise"),
    ({"workload.slo_classes": {"a": {"share": 1.0}}}, r"workload\.slo_classes: 'a' is not allowed"),
    ({"workload.slo_classes": {"a": {"ttft_s": 0}}}, r"workload\.slo_classes\.a\.ttft_s: 0 .* above 0"),
    ({"workload.slo_classes": {"a": {"tttf_s": 1}}}, r"workload\.slo_classes\.a\.tttf_s.*did you mean ttft_s"),
    ({"workload.slo_classes": {"a": {"ttft_s": 1, "share": 0.5}}}, r"workload\.slo_classes: .*0\.5.* add up to 1"),
    ({"workload.arrivals": "poison"}, r"workload\.arrivals: 'poison' .*poisson, gamma"),
    ({"workload.burstiness": 2}, r"workload\.burstiness: 2 .*gamma"),
    ({"workload": [1]}, r"workload: \[1\] is not allowed; allowed: a section"),
    ({"dtype": "bf16"}, r"dtype: 'bf16' .*one of float32, bfloat16"),
    ({"nodes": 0}, r"nodes: 0 .*at least 1"),
    ({"nodes": 1.5}, r"nodes: 1\.5 .*a whole number"),
    ({"nodes": 1000}, r"nodes: 1000 .*at most 1024 devices in all"),
    ({"gpus_per_node": "four"}, r"gpus_per_node: 'four' .*a whole number"),
    ({"inter_node": "nvlink9"}, r"inter_node: 'nvlink9' .*did you mean nvlink4.*ethernet-25g"),
    ({"inter_node": 25}, r"inter_node: 25 .*gigabits like 25Gbps"),
    ({"intra_node": {"bandwidth": 3}}, r"intra_node\.bandwidth.*did you mean bandwidth_gb_s"),
    ({"memory_bytes": "80 apples"}, r"memory_bytes: '80 apples' .*512MiB"),
    ({"utilization": 1.2}, r"utilization: 1\.2 .*above 0, at most 1"),
    ({"attainment": 90}, r"attainment: 90 .*above 0, at most 1"),
    ({"rate": 0}, r"rate: 0 .*above 0"),
    ({"price_per_gpu_hour": -1}, r"price_per_gpu_hour: -1 .*above 0"),
    ({"search.seeds": 1}, r"search\.seeds: 1 .*at least 2"),
    ({"search.processes": 0}, r"search\.processes: 0 .*at least 1"),
    ({"search.time_limit_s": 0}, r"search\.time_limit_s: 0 .*above 0"),
    ({"search": 5}, r"search: 5 .*a section"),
    ({"gpu_per_node": 4}, r"gpu_per_node.*did you mean gpus_per_node"),
]


@pytest.mark.parametrize(("changes", "error"), WRONG)
def test_what_is_wrong_is_named(changes: dict[str, Any], error: str) -> None:
    wanted = {name: value for name, value in {**OPT, **changes}.items() if value is not None}
    if "workload" in wanted:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("workload.")}
    with pytest.raises(ValueError, match=error):
        load_problem(None, wanted)


READ_LATER: list[tuple[dict[str, Any], str]] = [
    ({"model": "opt-14b"}, r"'opt-14b' is not known.*did you mean 'opt-13b'"),
    ({"hardware": "a100"}, r"hardware: 'a100' .*did you mean a100-80g"),
    ({"hardware": "/nowhere.yaml"}, r"hardware: '/nowhere\.yaml' .*a readable YAML file"),
    (
        {"profile": "/no where.json", "dtype": "float32", "block_size": 32},
        r"profile: .*it is not there\); measure it first.*: "
        r"tandem profile --model opt-13b --dtype float32 --block-size 32 --output '/no where\.json'$",
    ),
    ({"workload.input_tokens": 3000}, r"workload\.input_tokens: '3064 tokens of prompt.*at most 2048"),
    (
        {"workload.input_tokens": None, "workload.output_tokens": None, "workload.lengths": "/no.csv"},
        r"workload.*/no\.csv",
    ),
]


@pytest.mark.parametrize(("changes", "error"), READ_LATER)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], error: str) -> None:
    wanted = {name: value for name, value in {**OPT, **changes}.items() if value is not None}
    problem = load_problem(None, wanted)
    with pytest.raises(ValueError, match=error):
        setting_of(problem)


@pytest.mark.parametrize(("text", "error"), [("- 1", "problem: .*a section"), ("model: [", "problem: .*valid YAML")])
def test_a_file_that_is_none(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load_problem(write(tmp_path, text))


def test_a_problem_says_itself_again() -> None:
    from tandem.cluster.config_schema import parse, plain

    problem = opt(inter_node="ethernet-25g")
    assert parse(Problem, plain(problem)) == problem


@pytest.mark.parametrize(
    ("value", "gigabytes"),
    [("25Gbps", 3.125), ("200 Gb/s", 25.0), ("300GB/s", 300.0), ("pcie4", 25.2), ({"bandwidth_gb_s": 2}, 2.0)],
)
def test_links_by_any_name(value: Any, gigabytes: float) -> None:
    assert link_of(value).bandwidth_gb_s == gigabytes


def test_known_links_are_faster_by_generation() -> None:
    speeds = {name: link.bandwidth_gb_s for name, link in KNOWN_LINKS.items()}
    assert speeds["pcie3"] < speeds["pcie4"] < speeds["pcie5"]
    assert speeds["ethernet-25g"] == pytest.approx(25 / 8 * 0.94)
    assert speeds["ethernet-400g"] < 400 / 8


@pytest.mark.parametrize(("name", "gpus"), [("opt-13b-4xa100", 4), ("opt-66b-4x8", 32), ("laptop", 2)])
def test_the_examples_are_problems(repository: Path, name: str, gpus: int) -> None:
    problem = load_problem(repository / "deploy" / "plans" / f"{name}.yaml")
    assert problem.gpus == gpus
    assert problem.workload.classes["chat"].ttft_s
    if problem.profile is None:
        setting_of(problem)
    else:
        assert problem.profile == "laptop.json", "measured first, on the machine that is planned for"


def test_a_plan_for_poisson_arrivals_says_that_its_file_is_burstier(tmp_path: Path) -> None:
    def told(gaps: list[float], **fields: Any) -> str:
        file = tmp_path / "trace.csv"
        times = [sum(gaps[:place]) for place in range(len(gaps) + 1)]
        file.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{at_s},30,4\n" for at_s in times))
        lengths = {"workload__lengths": str(file), "workload__input_tokens": None, "workload__output_tokens": None}
        return loss_text(setting_of(opt(**(lengths | fields))))

    bursts = ([0.01] * 15 + [20.0]) * 4
    assert told(bursts).startswith("; THE FILE IS BURSTIER: its gaps vary by 3.84 of their mean, Poisson's by 1, and")
    assert "--arrivals trace replays them, --burstiness 0.0677 draws such gaps (gamma)" in told(bursts)
    assert (
        told(bursts, workload__arrivals="trace") == told(bursts, workload__arrivals="gamma") == told([1.0] * 60) == ""
    )
    assert told([0.0] * 10 + [1.0]) == "", "too few to say"


def test_a_plan_by_a_poor_profile_says_so() -> None:
    terms = DecodeTerms(step_s=0.01, row_s=0.003, context_token_s=4e-6)
    steps = StepProfile(
        prefill_step_s=0.01, prefill_token_s=0.003, decode=terms, large_decode=terms, large_batch_rows=1
    )

    def told(steps_p90: float, transfers_p90: float) -> str:
        kinds = {"all steps": steps_p90, "transfer grpc": transfers_p90}
        held_out = {name: PointErrors(median=0.01, p90=p90, worst=2.0, points=9) for name, p90 in kinds.items()}
        section = Measurement(
            model="smollm2-135m",
            model_config=CONFIGS["smollm2-135m"],
            device="cpu",
            dtype="bfloat16",
            block_size=16,
            kv_token_bytes=23040,
            steps={},
            held_out=held_out,
        )
        return poor_text(MeasuredProfile(steps=steps, measured=section))

    assert told(0.2, 0.4) == ""
    assert told(0.44, 0.4).startswith("; A POOR PROFILE: one point in ten that its fit had not seen was missed by more")
    assert "all steps 44 %, transfer grpc 111 %" in told(0.44, 1.11)
