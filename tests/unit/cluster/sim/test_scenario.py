"""Simulations as they are written down: what they come to, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.config_schema import ConfigError
from tandem.cluster.latency.memory import DoesNotFit
from tandem.cluster.latency.profile import StepProfile
from tandem.cluster.sim.compose import cluster_spec, draw_rows, read_workload
from tandem.cluster.sim.scenario import Scenario, read_scenario
from tandem.cluster.types import Role, StepTimeCoefficients

SPLIT = {"model": "opt-13b", "hardware": "a100-80g", "prefill": {"workers": 2, "tensor_parallel": 2}, "decode": 3}


def scenario(**fields: Any) -> Scenario:
    tree: dict[str, Any] = {"prefill.workers": 1, "decode.workers": 1, "model": "opt-13b", "hardware": "a100-80g"}
    return read_scenario(None, tree | {name.replace("__", "."): value for name, value in fields.items()})


def simulated(fields: dict[str, Any]) -> None:
    found = scenario(**fields)
    cluster_spec(found)
    draw_rows(found, read_workload(found, found.device()))


def test_a_file_and_flags_that_win_over_it(tmp_path: Path) -> None:
    path = tmp_path / "split.yaml"
    path.write_text(
        "model: opt-13b\nhardware: a100-80g\nprefill: {workers: 2, tensor_parallel: 2, max_batched_tokens: 4096}\n"
        "decode: 3\nintra_node: 300GB/s\ninter_node: {bandwidth_gb_s: 1.5, latency_us: 50}\n"
        "router: {refuse: false}\nworkload: {input_tokens: 100, slo_classes: {chat: {ttft_s: 0.2, tpot_s: 0.1}}}\n"
        "rate: 3\nnum_requests: 7\n"
    )
    found = read_scenario(path, {"decode.workers": 4, "workload.output_tokens": 9})
    spec = cluster_spec(found)
    assert [(one.worker_id, one.role, one.node) for one in spec.workers] == [
        ("prefill-0", Role.PREFILL, "node-0"),
        ("prefill-1", Role.PREFILL, "node-0"),
        *((f"decode-{number}", Role.DECODE, "node-0") for number in range(4)),
    ]
    assert {one.max_batched_tokens for one in spec.workers[:2]} == {4096}
    assert spec.workers[0].num_blocks > spec.workers[2].num_blocks
    assert (spec.inside.bandwidth_gb_s, spec.between.bandwidth_gb_s, spec.between.latency_us) == (300.0, 1.5, 50.0)
    assert not spec.router.refuses
    assert {name: promise.ttft_s for name, promise in spec.router.promises.items()} == {"chat": 0.2}
    rows = draw_rows(found, read_workload(found, found.device()))
    assert [(row.input_tokens, row.output_tokens, row.slo_class) for row in rows] == [(100, 9, "chat")] * 7


def test_nodes_are_filled_one_after_another() -> None:
    spec = cluster_spec(scenario(prefill__workers=3, prefill__tensor_parallel=2, decode__workers=2, gpus_per_node=4))
    assert [one.node for one in spec.workers] == ["node-0", "node-0", "node-1", "node-1", "node-1"]
    wide = cluster_spec(scenario(prefill__tensor_parallel=8, decode__workers=2, gpus_per_node=4))
    assert len({one.node for one in wide.workers}) == 2
    named = cluster_spec(scenario(decode__node="other"))
    assert [one.node for one in named.workers] == ["node-0", "other"]


def test_a_pool_may_have_its_own_memory_and_profile(tmp_path: Path) -> None:
    profile = StepProfile.linear(StepTimeCoefficients(step_s=0.5))
    profile.save(tmp_path / "steps.json")
    path = tmp_path / "cpu.yaml"
    path.write_text(
        "model: smollm2-135m\nhardware: cpu-avx2\nmax_model_len: 2048\n"
        "mixed: {profile: steps.json, kv_cache_bytes: 256MiB}\n"
    )
    [worker] = cluster_spec(read_scenario(path)).workers
    assert worker.costs == profile
    assert worker.num_blocks == 2**28 // worker.block_bytes
    assert worker.max_model_len == 2048


def test_a_trace_is_replayed_faster(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,1\n4,10,1\n6,10,1\n")
    found = scenario(workload__lengths=str(trace), workload__arrivals="trace", rate_scale=2.0)
    rows = draw_rows(found, read_workload(found, found.device()))
    assert [row.arrival_s for row in rows] == [0.0, 2.0, 3.0]


def test_without_a_bound_a_thousand_requests_come() -> None:
    found = scenario(rate=5.0)
    assert len(draw_rows(found, read_workload(found, found.device()))) == 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "model: is missing"),
        ({"hardware": None}, "hardware: is missing"),
        ({"hardware": "a10"}, "hardware: 'a10' is not allowed; allowed: did you mean a100-80g?"),
        ({"model": "opt-31b"}, "model 'opt-31b' is not known (did you mean 'opt-30b'?)"),
        ({"modle": "opt-13b"}, "modle: 'modle' is not allowed; allowed: a known key; did you mean model?"),
        ({"prefill__workers": 0}, "prefill.workers: 0 is not allowed; allowed: at least 1, or mixed workers"),
        ({"failures": [{"worker": "decode-0"}]}, "failures[0].at_s: is missing"),
        ({"failures": [{"worker": "decode-0", "at_s": -1}]}, "failures[0].at_s: -1 is not allowed"),
        ({"failures": [{"worker": "d", "at": 1}]}, "failures[0].at: 'at' is not allowed; allowed: a known key; did"),
        ({"failures": "decode-0"}, "failures: 'decode-0' is not allowed; allowed: a list"),
        ({"decode__wrkers": 2}, "decode.wrkers: 'wrkers' is not allowed; allowed: a known key; did you mean workers?"),
        ({"decode__workers": -1}, "decode.workers: -1 is not allowed; allowed: at least 0"),
        ({"decode__batching": "orca"}, "decode.batching: 'orca' is not allowed; allowed: one of iteration, request"),
        ({"decode__tensor_parallel": 3}, "decode.tensor_parallel: 3 is not allowed for opt-13b with 40 heads"),
        ({"decode__kv_cache_bytes": "1MiB"}, "decode.kv_cache_bytes: 1048576 is not allowed; allowed: at least"),
        (
            {"decode__kv_cache_bytes": 2**49},
            "decode.kv_cache_bytes: '42949672 blocks' is not allowed; allowed: at most",
        ),
        ({"intra_node": "fast"}, "intra_node: 'fast' is not allowed; allowed:"),
        ({"router__overhead_s": -1}, "router.overhead_s: -1 is not allowed; allowed: at least 0"),
        ({"workload__arrivals": "uniform"}, "workload.arrivals: 'uniform' is not allowed"),
        ({"workload__slo_classes": {"A B": {}}}, "workload.slo_classes: 'A B' is not allowed; allowed: names"),
        ({"workload__input_tokens": 5000}, "workload.input_tokens: '5128 tokens of prompt and answer' is not allowed"),
        ({"workload__lengths": "/nowhere.csv"}, "workload.lengths: '/nowhere.csv' is not allowed"),
        ({"rate": 0}, "rate: 0 is not allowed; allowed: above 0"),
        ({"rate": "fast"}, "rate: 'fast' is not allowed; allowed: a finite number"),
        ({"rate": 1.0, "rate_scale": 2.0}, "rate_scale: 2.0 is not allowed; allowed: 1, or any where arrivals"),
        ({"seconds": -5}, "seconds: -5 is not allowed; allowed: above 0"),
        ({"num_requests": 0}, "num_requests: 0 is not allowed; allowed: at least 1"),
        ({"seed": -1}, "seed: -1 is not allowed; allowed: at least 0"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).") as refused:
        simulated(fields)
    assert str(refused.value).startswith(message)


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(DoesNotFit, match=r"prefill: opt-66b .* does not fit: 80.00 GiB of a100-80g x 0.9"):
        cluster_spec(scenario(model="opt-66b"))


def test_no_rate_is_refused_where_nothing_was_recorded() -> None:
    found = scenario()
    with pytest.raises(ConfigError, match=r"rate: is missing; allowed: requests per second"):
        draw_rows(found, read_workload(found, found.device()))
    assert draw_rows(replace(found, rate=1.0, num_requests=1), read_workload(found, found.device()))[0].arrival_s == 0.0


def test_a_step_is_as_large_for_all_pools_but_those_that_say_otherwise() -> None:
    spec = cluster_spec(scenario(max_batched_tokens=1024, decode__max_batched_tokens=300))
    assert [(one.role, one.max_batched_tokens) for one in spec.workers] == [(Role.PREFILL, 1024), (Role.DECODE, 300)]
