"""Options are checked in one place, and say what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tandem.cluster.bench.client import CHAT, COMPLETIONS
from tandem.cluster.bench.options import BenchOptions, parse_headers
from tandem.cluster.bench.sweep_load import SweepPlan

RAMP: dict[str, Any] = {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1.0, "ramp_up_end_rps": 9.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_name": "sharegpt"}, "dataset_name: 'sharegpt' is not allowed; allowed: prompts, random, trace"),
        ({"dataset_name": "trace"}, "dataset_path: is missing"),
        ({"dataset_name": "random", "dataset_path": "x"}, "dataset_path: 'x' is not allowed"),
        ({"backend": "tgi"}, "backend: 'tgi' is not allowed; allowed: openai, openai-chat, tandem-grpc"),
        ({"backend": "openai-chat", "dataset_name": "random"}, "backend: openai-chat takes text"),
        ({"backend": "openai-chat", "endpoint": COMPLETIONS}, "endpoint: '/v1/completions' is not allowed"),
        ({"backend": "tandem-grpc", "endpoint": CHAT}, "endpoint: .* allowed with HTTP backends"),
        ({"backend": "tandem-grpc", "extra_body": {"a": 1}}, "extra_body: is not allowed"),
        ({"over_length": "cut"}, "over_length: 'cut' is not allowed; allowed: clip, drop"),
        ({"percentile_metrics": ("ttft", "speed")}, "percentile_metrics: 'speed' is not allowed"),
        ({"num_prompts": 0}, "num_prompts: 0 is not allowed; allowed: 1 to"),
        ({"output_len": 0}, "output_len: 0 is not allowed"),
        ({"num_warmups": -1}, "num_warmups: -1 is not allowed"),
        ({"max_concurrency": 0}, "max_concurrency: 0 is not allowed"),
        ({"max_input_len": 0}, "max_input_len: 0 is not allowed"),
        ({"vocab_size": 0}, "vocab_size: 0 is not allowed"),
        ({"percentiles": (101.0,)}, "metric_percentiles: 101.0 is not allowed"),
        ({"random_range_ratio": 1.0}, "random_range_ratio: 1.0 is not allowed; allowed: 0 to below 1"),
        ({"rate_scale": 0.0}, "rate_scale: 0.0 is not allowed"),
        ({"ramp_up_strategy": "sudden"}, "ramp_up_strategy: 'sudden' is not allowed; allowed: linear, exponential"),
        ({**RAMP, "ramp_up_end_rps": None}, "ramp_up_end_rps: is missing; allowed with"),
        ({**RAMP, "ramp_up_start_rps": 0.0}, "ramp_up_start_rps: 0.0 is not allowed"),
        ({"request_rate": 0.0}, "request_rate: 0.0 is not allowed; allowed: above 0, or inf"),
        ({"burstiness": math.nan}, "burstiness: nan is not allowed"),
        ({"temperature": math.nan}, "temperature: nan is not allowed; allowed: 0 or more"),
        ({"base_url": "127.0.0.1:8000"}, "base_url: '127.0.0.1:8000' is not allowed; allowed: http://host:port"),
        ({"ramp_up_start_rps": 1.0}, "ramp_up_start_rps: 1.0 is not allowed without ramp_up_strategy"),
        ({**RAMP, "request_rate": 5.0}, "request_rate: 5 is not allowed with ramp_up_strategy"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BenchOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": 0.0}, "attainment_target: 0.0"),
        ({"target": 90.0}, "attainment_target: 90.0 is not allowed; allowed: above 0, at most 1"),
        ({"seeds": 0}, "sweep_seeds: 0"),
        ({"duration_s": 0.0}, "sweep_duration: 0.0"),
        ({"timeout_s": math.inf}, "sweep_timeout: inf"),
        ({"rates": (1.0, -2.0)}, "sweep_rates: -2.0"),
        ({"start_rate": 0.0}, "request_rate: 0.0"),
        ({"max_points": 0}, "sweep_max_points: 0"),
    ],
)
def test_a_sweep_is_checked_too(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SweepPlan(**changes)


@pytest.mark.parametrize(
    ("changes", "backend", "url", "path"),
    [
        ({}, "openai-chat", "http://127.0.0.1:8000", CHAT),
        ({"dataset_name": "random"}, "openai", "http://127.0.0.1:8000", COMPLETIONS),
        ({"endpoint": "/api/v1/completions"}, "openai", "http://127.0.0.1:8000", "/api/v1/completions"),
        ({"base_url": "http://h:1/v1/"}, "openai-chat", "http://h:1", CHAT),
        ({"backend": "tandem-grpc"}, "tandem-grpc", "127.0.0.1:8001", ""),
    ],
)
def test_what_is_left_out_follows_from_the_rest(changes: dict[str, Any], backend: str, url: str, path: str) -> None:
    options = BenchOptions(**changes)
    assert (options.chosen_backend, options.url, options.path) == (backend, url, path)


def test_headers() -> None:
    assert parse_headers(["a=b=c"], "batch") == (("x-slo-class", "batch"), ("a", "b=c"))
    with pytest.raises(ValueError, match="header: 'a' is not allowed; allowed: KEY=VALUE"):
        parse_headers(["a"])
