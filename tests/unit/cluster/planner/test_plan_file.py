"""plan.yaml: a cluster's configuration that loads, says what was predicted, and can be compared by diff."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_cases import evaluated, mixed, opt, result, split
from tandem.cluster.config import ClusterConfig, ConfigError, check_served
from tandem.cluster.config_file import load_config
from tandem.cluster.latency.links import LinkTerms
from tandem.cluster.latency.measured import MeasuredProfile, MeasuredStep, Measurement
from tandem.cluster.latency.profile import DecodeTerms, StepProfile, read_profile
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.planner.nodes import gpus_of
from tandem.cluster.planner.plan_file import PlanFile, device_of, plan_file
from tandem.cluster.planner.problem import Problem, load_problem
from tandem.cluster.planner.result import Affinity, Evaluation
from tandem.cluster.planner.setting import setting_of
from tandem.cluster.sim.compose import cluster_spec
from tandem.cluster.sim.from_cluster import cluster_values
from tandem.cluster.sim.scenario import read_scenario
from tandem.cluster.types import Role

DECODE = DecodeTerms(step_s=0.01, row_s=1e-4, context_token_s=1e-6)
STEPS = StepProfile(prefill_step_s=0.02, prefill_token_s=1e-4, decode=DECODE, large_decode=DECODE, large_batch_rows=1)


def written(problem: Problem, chosen: Evaluation, **options: Any) -> PlanFile:
    return plan_file(problem, setting_of(problem), result(disaggregated=chosen), chosen, **options)


def loaded(folder: Path, file: PlanFile) -> ClusterConfig:
    file.save(folder / "plan.yaml")
    return load_config(folder / "plan.yaml")


def profiled(folder: Path, **changes: Any) -> Problem:
    """A laptop that was measured with two threads."""
    values: dict[str, Any] = {
        "model": "smollm2-135m",
        "model_config": CONFIGS["smollm2-135m"],
        "device": "cpu",
        "dtype": "bfloat16",
        "threads": 1,
        "block_size": 32,
        "kv_token_bytes": 23040,
        "machine": "a laptop",
        "memory_bytes": 8 * 2**30,
        "steps": {"p": MeasuredStep(prefill_tokens=64, prefill_squares=4096, times_s=(0.01, 0.011))},
        "links": {"mapped": LinkTerms(bandwidth_gb_s=2.0)},
        "engine_overhead_s": 0.001,
    }
    profile = MeasuredProfile(steps=STEPS, measured=Measurement(**(values | changes)))
    profile.save(folder / "laptop.json")
    wanted = {
        "profile": str(folder / "laptop.json"),
        "gpus_per_node": 2,
        "workload.input_tokens": 64,
        "workload.output_tokens": 16,
        "workload.slo_classes": {"chat": {"ttft_s": 1.0, "tpot_s": 0.2}},
    }
    return load_problem(None, wanted)


def test_a_disaggregated_plan_is_a_cluster(tmp_path: Path) -> None:
    config = loaded(tmp_path, written(opt(), evaluated(split(1, 2), 6.0)))
    assert (config.prefill, config.decode, config.mixed) == (1, 2, 0)
    prefill, decode = config.engine_of(Role.PREFILL), config.engine_of(Role.DECODE)
    assert (prefill.device, prefill.model, prefill.tensor_parallel) == ("paced", "dummy:opt-13b", 2)
    assert decode.tensor_parallel == 1
    assert prefill.kv_cache_bytes > 2 * decode.kv_cache_bytes, "two devices, one set of weights"
    assert decode.kv_cache_bytes % (16 * 2 * 40 * 5120 * 2) == 0, "whole blocks"
    assert config.router.slo == replace(config.router.slo, ttft_s=0.25, tpot_s=0.1)
    assert config.router.slo_classes["chat"].tpot_s == 0.1
    assert config.worker_cpus * 3 < 2, "any plan starts on two cores"


def test_what_was_predicted_goes_with_it(tmp_path: Path) -> None:
    plan = loaded(tmp_path, written(opt(), evaluated(split(), 6.0))).router.plan
    assert plan is not None
    assert (plan.predicted_attainment, plan.predicted_by_class, plan.rate) == (0.912, {"chat": 0.912}, 6.0)
    assert (plan.ttft_ms.p50, plan.ttft_ms.p99, plan.tpot_ms.p90) == (81.23, 400.0, 31.0)
    assert plan.goodput_per_gpu == 2.0
    assert plan.placement == "1 x prefill TP 2 + 1 x decode TP 1"
    assert "512 tokens in, 64 out" in str(plan.workload)
    assert "seeds 0 to 2" in str(plan.made_with)
    bare = written(opt(), replace(evaluated(split(), 6.0), prediction=None))
    [plan_text] = [bare.text[bare.text.index("\nplan:") :]]
    assert "predicted_attainment" not in plan_text


def test_what_was_asked_is_simulated_again_without_a_word_more(tmp_path: Path) -> None:
    (tmp_path / "pool.csv").write_text("arrival_s,input_tokens,output_tokens\n,100,20\n")
    classes = {"chat": {"share": 0.75, "ttft_s": 0.25, "tpot_s": 0.1}, "bulk": {"share": 0.25, "ttft_s": 2.0}}
    workload = {"lengths": str(tmp_path / "pool.csv"), "arrivals": "gamma", "burstiness": 0.5, "slo_classes": classes}
    problem = load_problem(
        None,
        {"model": "opt-13b", "hardware": "h100", "gpus_per_node": 4, "inter_node": "25Gbps", "workload": workload},
    )
    config = loaded(tmp_path, written(problem, evaluated(split(), 6.0)))
    scenario = read_scenario(None, cluster_values(config))
    assert (scenario.hardware, scenario.gpus_per_node, scenario.inter_node) == ("h100", 4, problem.inter_node)
    asked = {name: replace(one, queue_share=None) for name, one in scenario.workload.slo_classes.items()}
    assert replace(scenario.workload, slo_classes=asked) == problem.workload
    assert scenario.rate == 6.0
    text = written(problem, evaluated(split(), 6.0)).text
    assert "null" not in text[text.index("\n  problem:") :]
    assert [(role.value, pool.tensor_parallel) for role, pool in scenario.pools] == [("prefill", 2), ("decode", 1)]


def test_a_plans_file_is_planned_again(tmp_path: Path) -> None:
    """`tandem plan --config plan.yaml`: the same question, flags over it; a cluster's file says what is missing."""
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("arrival_s,input_tokens,output_tokens\n,100,10\n,300,40\n")
    lengths_alone = {"workload__input_tokens": None, "workload__output_tokens": None, "workload__lengths": str(lengths)}
    problem = opt(**lengths_alone, inter_node="25Gbps", search__max_pipeline_stages=1, search__seeds=9)
    path = tmp_path / "plan.yaml"
    written(problem, evaluated(split(), 6.0)).save(path)
    assert load_problem(path, {"search.seeds": 9}) == problem
    assert load_problem(path, {"rate": 3.0}).rate == 3.0
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("model: smollm2-135m\nrouter: {http_port: 0}\n")
    with pytest.raises(ValueError, match=r"plan\.problem: .* a cluster's, which does not say what it was planned for"):
        load_problem(cluster)


def test_a_plan_of_a_profile_is_simulated_with_it(tmp_path: Path) -> None:
    problem = profiled(tmp_path)
    config = loaded(tmp_path, written(problem, evaluated(split(prefill_tp=1), 3.0)))
    scenario = read_scenario(None, cluster_values(config))
    assert (scenario.profile, scenario.hardware) == (problem.profile, None)
    assert scenario.device().source == problem.device().source


def test_a_colocated_plan_is_one_pool(tmp_path: Path) -> None:
    config = loaded(tmp_path, written(opt(), evaluated(mixed(4, 256), 5.0)))
    assert (config.prefill, config.decode, config.mixed) == (0, 0, 4)
    assert config.engine_of(Role.MIXED).max_batched_tokens == 256


def test_the_paced_workers_take_what_the_roofline_says(tmp_path: Path) -> None:
    problem = opt()
    config = loaded(tmp_path, written(problem, evaluated(split(), 6.0)))
    for role, tensor in ((Role.PREFILL, 2), (Role.DECODE, 1)):
        path = config.engine_of(role).paced_profile
        assert path is not None
        costs = problem.device().source.costs(tensor, 1)
        for shape in ((512, 512**2, 0, 0), (0, 0, 16, 16 * 600)):
            assert read_profile(path).step_time_s(*shape) == pytest.approx(costs.step_time_s(*shape), rel=0.15)


def test_a_profiled_engine_is_served_as_it_was_measured(tmp_path: Path) -> None:
    problem = profiled(tmp_path, quantization="w8a8")
    chosen = evaluated(split(prefill_tp=1), 3.0)
    config = loaded(tmp_path, written(problem, chosen))
    engine = config.engine_of(Role.PREFILL)
    assert (engine.model, engine.device, engine.threads, engine.block_size) == ("smollm2-135m", "cpu", 1, 32)
    assert (engine.quantization, engine.paced_profile) == ("w8a8", None)
    assert engine.kv_cache_bytes < 4 * 2**30, "what one of two workers has of the machine"
    rehearsal = loaded(tmp_path, written(problem, chosen, device="paced"))
    assert (rehearsal.engine.device, rehearsal.engine.model) == ("paced", "dummy:smollm2-135m")
    path = rehearsal.engine_of(Role.DECODE).paced_profile
    assert path is not None
    assert read_profile(path) == STEPS, "without the engine's overhead: real workers have their own"


def test_a_plan_with_a_pipeline_is_simulated_and_not_served(tmp_path: Path) -> None:
    deep = split()
    deep = replace(deep, pools=(deep.pools[0], replace(deep.pools[1], pipeline_stages=2)))
    file = written(opt(), evaluated(deep, 6.0))
    config = loaded(tmp_path, file)
    with pytest.raises(ConfigError, match=r"decode\.engine\.pipeline_stages: 2 .*cannot serve pipelines.*--max-pp 1"):
        check_served(config)
    scenario = read_scenario(None, cluster_values(config))
    assert scenario.decode.pipeline_stages == 2
    assert [one.costs.pipeline_stages for one in cluster_spec(scenario).workers] == [1, 2]
    assert "start with" not in file.text
    assert "\n# simulate    tandem simulate --cluster plan.yaml" in file.text


def test_the_head_says_how_it_was_made() -> None:
    text = written(opt(), evaluated(split(), 6.0), command=["tandem", "plan", "--model", "opt 13b"]).text
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert "1 x prefill TP 2 + 1 x decode TP 1" in head[0]
    joined = "\n".join(head)
    assert "tandem plan --model 'opt 13b'" in joined
    assert "node-0    prefill-0, decode-0" in joined
    assert "computes nothing" in joined
    assert head[-1] == "# start with  tandem serve --config plan.yaml"
    assert "simulate    tandem simulate --cluster plan.yaml --no-refuse  (as predicted: nobody is refused" in joined
    assert "TTFT 250 ms and TPOT 100 ms" in joined
    assert max(map(len, text.splitlines())) <= 120
    assert "on nodes" not in joined
    assert "\n# on nodes    nodes: {prefill-0: [10.0.0.1]}" in written(opt(nodes=2), evaluated(split(), 6.0)).text


def test_two_plans_differ_where_they_differ() -> None:
    one, same, other = (
        written(opt(), evaluated(split(1, count), goodput, prediction=None)).text.splitlines()
        for count, goodput in ((1, 6.0), (1, 6.0), (2, 6.0))
    )
    assert one == same
    keys = [line.split(":")[0] for line in one if not line.startswith("#")]
    assert keys == [line.split(":")[0] for line in other if not line.startswith("#")], "the same keys in the same order"


@pytest.mark.parametrize(("dtype", "said"), [("float16", " (served as bfloat16, of the same size)"), ("bfloat16", "")])
def test_the_precision_that_was_planned_is_the_one_that_is_simulated(tmp_path: Path, dtype: str, said: str) -> None:
    """Engines have no float16: the file says what they have instead."""
    file = written(opt(dtype=dtype), evaluated(split(), 6.0))
    config = loaded(tmp_path, file)
    assert f"B parameters, {dtype}{said}\n" in file.text
    assert config.engine.dtype == "bfloat16"
    scenario = read_scenario(None, cluster_values(config))
    assert (scenario.dtype, scenario.kv_dtype) == (dtype, dtype)
    held = cluster_spec(scenario).workers[0]
    assert held.num_blocks * held.block_bytes == config.engine_of(Role.PREFILL).kv_cache_bytes


def test_several_classes_each_have_their_promise(tmp_path: Path) -> None:
    classes = {
        "gold": {"share": 0.25, "ttft_s": 0.1, "queue_share": 0.7},
        "chat": {"share": 0.75, "ttft_s": 0.25, "tpot_s": 0.1},
    }
    router = loaded(tmp_path, written(opt(workload__slo_classes=classes), evaluated(split(), 6.0))).router
    assert (router.slo.ttft_s, router.slo.tpot_s) == (0.25, 0.1), "who names no class is like most"
    assert (router.slo_classes["gold"].ttft_s, router.slo_classes["gold"].tpot_s) == (0.1, None)
    assert router.slo_classes["gold"].share == 0.7


def test_a_plan_for_gpus_that_compute(tmp_path: Path) -> None:
    config = loaded(tmp_path, written(opt(), evaluated(split(), 6.0), device="cuda"))
    engine = config.engine_of(Role.PREFILL)
    assert (engine.device, engine.paced_profile) == ("cuda", None)
    assert [worker.engine.gpus for worker in config.workers()] == [(0, 1), (2,)], "each on its own"
    assert engine.kv_cache_bytes > 2**30
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("planned", ["fp8", "int8"])
def test_narrow_kv_that_was_planned_takes_the_memory_that_was_planned(tmp_path: Path, planned: str) -> None:
    """Twice the blocks in the same bytes; as wide KV they would not fit."""
    narrow, wide = (written(opt(kv_dtype=dtype), evaluated(split(), 6.0), device="cuda") for dtype in (planned, None))
    expected = loaded(tmp_path, wide).engine_of(Role.DECODE)
    config = loaded(tmp_path, narrow)
    found = config.engine_of(Role.DECODE)
    assert (expected.kv_cache_dtype, found.kv_cache_dtype) == ("auto", "fp8")
    assert abs(found.kv_cache_bytes - expected.kv_cache_bytes) <= 16 * 2 * 40 * 5120 * 2
    assert read_scenario(None, cluster_values(config)).kv_dtype == "fp8"
    rehearsed = loaded(tmp_path, written(opt(kv_dtype=planned), evaluated(split(), 6.0)))
    assert rehearsed.engine.kv_cache_dtype == "auto"


def test_stages_take_gpus_of_the_nodes_that_they_are_planned_on() -> None:
    """Two cells of two stages: one stage of a cell fills a node of two GPUs, both of them one of four."""
    candidate = split(2, 2, 1, 1, affinity=Affinity.LOW, cells=2)
    deep = replace(candidate, pools=tuple(replace(pool, pipeline_stages=2) for pool in candidate.pools))
    small, large = (setting_of(opt(nodes=4, gpus_per_node=size)) for size in (2, 4))
    assert gpus_of(small, deep) == {Role.PREFILL: (0, 0, 0, 0), Role.DECODE: (1, 1, 1, 1)}
    assert gpus_of(large, deep) == {Role.PREFILL: (0, 2, 0, 2), Role.DECODE: (1, 3, 1, 3)}
    two_nodes = setting_of(opt(nodes=2, gpus_per_node=2))
    assert gpus_of(two_nodes, split(1, 2)) == {Role.PREFILL: (0, 1), Role.DECODE: (0, 1)}


def test_a_rehearsal_says_how_it_is_written_for_gpus(tmp_path: Path) -> None:
    advice = "# on GPUs     tandem plan --config plan.yaml --device cuda --output plan.yaml"
    assert advice in written(opt(), evaluated(split(), 6.0)).text.splitlines()
    assert advice not in written(opt(), evaluated(split(), 6.0), device="cuda").text
    laptop = written(profiled(tmp_path), evaluated(split(prefill_tp=1), 3.0), device="paced")
    assert "on GPUs" not in laptop.text


def test_a_device_that_there_is_not() -> None:
    assert device_of(opt()) == "paced"
    assert device_of(opt(model="smollm2-135m", hardware="cpu-avx2")) == "cpu"
    assert device_of(opt(), "cpu") == "cpu"
    assert device_of(opt(), "cuda") == "cuda"
    with pytest.raises(ConfigError, match="device: 'tpu' is not allowed; allowed: one of cpu, cuda, paced"):
        device_of(opt(), "tpu")
