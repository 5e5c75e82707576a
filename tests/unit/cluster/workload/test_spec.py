"""Workloads as they are written down: common random numbers, replay, lengths, classes, and refusals by name."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.config_schema import ConfigError, parse
from tandem.cluster.workload.spec import Row, WorkloadSpec, draw, load

TRACE = "arrival_s,input_tokens,output_tokens,prefix_hashes\n0,1000,10,1 2\n1,1100,20,1 3\n5,90,5,\n6,700,8,1 2\n"
POOL = "arrival_s,input_tokens,output_tokens\n,10,1\n,20,2\n,30,3\n"


def spec(**fields: Any) -> WorkloadSpec:
    return parse(WorkloadSpec, fields)


def drawn(fields: dict[str, Any], seed: int = 1, **how: Any) -> list[Row]:
    asked = {"rate": 2.0, "seconds": None, "num_requests": None, **how}
    return draw(spec(**fields), seed=seed, **asked)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


@pytest.fixture
def pool(tmp_path: Path) -> str:
    path = tmp_path / "pool.csv"
    path.write_text(POOL)
    return str(path)


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "constant"])
def test_another_rate_changes_nothing_but_the_pace(arrivals: str) -> None:
    burstiness = {"burstiness": 0.3} if arrivals == "gamma" else {}
    fields = {"arrivals": arrivals, "range_ratio": 0.5, **burstiness}
    slow, fast = (drawn(fields, rate=rate, num_requests=200) for rate in (1.0, 4.0))
    assert [row.arrival_s for row in fast] == pytest.approx([row.arrival_s / 4 for row in slow])
    assert [(row.input_tokens, row.output_tokens) for row in fast] == [
        (row.input_tokens, row.output_tokens) for row in slow
    ]


def test_fewer_requests_are_the_first_of_more(pool: str) -> None:
    for fields in ({"range_ratio": 0.5}, {"lengths": pool}):
        few, many = (drawn(fields, num_requests=count) for count in (7, 50))
        assert few == many[:7]
    assert drawn({}, seconds=10.0) == drawn({}, num_requests=len(drawn({}, seconds=10.0)))


def test_seeds_differ_and_repeat(pool: str) -> None:
    assert drawn({"lengths": pool}, num_requests=20) == drawn({"lengths": pool}, num_requests=20)
    assert drawn({"lengths": pool}, num_requests=20) != drawn({"lengths": pool}, seed=2, num_requests=20)


def test_arrivals_have_the_rate_and_the_burstiness_that_were_asked_for() -> None:
    for fields, variation in (({}, 1.0), ({"arrivals": "gamma", "burstiness": 0.25}, 2.0)):
        times = [row.arrival_s for row in drawn(fields, rate=5.0, num_requests=20_000)]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean
        assert mean == pytest.approx(0.2, rel=0.05)
        assert spread == pytest.approx(variation, rel=0.05)
    assert [row.arrival_s for row in drawn({"arrivals": "constant"}, seconds=2.0)] == [0.0, 0.5, 1.0, 1.5]


def test_a_pool_gives_every_length_once_before_any_twice(pool: str) -> None:
    rows = drawn({"lengths": pool}, num_requests=6)
    assert sorted(row.input_tokens for row in rows[:3]) == sorted(row.input_tokens for row in rows[3:]) == [10, 20, 30]
    assert all(row.output_tokens == row.input_tokens // 10 for row in rows)


def test_a_trace_is_replayed_as_recorded_once(trace: str) -> None:
    rows = drawn({"lengths": trace, "arrivals": "trace"}, seed=0, rate=None)
    assert [row.arrival_s for row in rows] == [0.0, 1.0, 5.0, 6.0]
    assert [row.hash_ids for row in rows] == [(1, 2), (1, 3), (), (1, 2)]
    assert {row.hash_tokens for row in rows} == {512}


def test_a_trace_goes_round_at_another_rate_and_shares_nothing_with_its_first_round(trace: str) -> None:
    # Four requests in 8 s, the mean gap behind the last one included: 0.5 a second as recorded.
    rows = drawn({"lengths": trace, "arrivals": "trace"}, seed=0, rate=1.0, seconds=7.0)
    assert [row.arrival_s for row in rows] == pytest.approx([0.0, 0.5, 2.5, 3.0, 4.0, 4.5, 6.5])
    assert [row.input_tokens for row in rows[:3]] == [row.input_tokens for row in rows[4:]]
    assert not {item for row in rows[:4] for item in row.hash_ids} & {item for row in rows[4:] for item in row.hash_ids}


def test_another_seed_begins_elsewhere_in_the_trace(trace: str) -> None:
    starts = {drawn({"lengths": trace, "arrivals": "trace"}, seed=seed, rate=None)[0].input_tokens for seed in range(9)}
    assert len(starts) > 1
    for seed in range(9):
        rows = drawn({"lengths": trace, "arrivals": "trace"}, seed=seed, rate=None)
        assert sorted(row.input_tokens for row in rows) == [90, 700, 1000, 1100]
        assert rows[0].arrival_s == 0.0


def test_what_shares_prefixes_keeps_its_order_under_other_arrivals(trace: str) -> None:
    rows = drawn({"lengths": trace}, seed=0, num_requests=4)
    assert [row.input_tokens for row in rows] == [1000, 1100, 90, 700]
    shuffled = drawn({"lengths": trace, "order": "shuffled"}, seed=0, num_requests=400)
    assert [row.input_tokens for row in shuffled[:4]] != [row.input_tokens for row in shuffled[4:8]]


def test_caps_clip_or_drop_and_the_context_drops(trace: str) -> None:
    clipped = load(spec(lengths=trace, max_input_tokens=800), max_model_len=805)
    assert [row.input_tokens for row in clipped.pool] == [90, 700]
    assert (clipped.clipped, clipped.dropped) == (0, 2)
    assert load(spec(lengths=trace, max_input_tokens=800)).clipped == 2
    dropped = load(spec(lengths=trace, max_input_tokens=800, over_length="drop"))
    assert [row.input_tokens for row in dropped.pool] == [90, 700]


def test_classes_get_their_shares() -> None:
    classes = {"chat": {"share": 0.75, "ttft_s": 1.0}, "bulk": {"share": 0.25}}
    rows = drawn({"slo_classes": classes}, num_requests=4000)
    assert sum(row.slo_class == "chat" for row in rows) == pytest.approx(3000, abs=100)
    assert {row.slo_class for row in drawn({}, num_requests=3)} == {"interactive"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arivals": "poisson"}, "arivals: 'arivals' is not allowed; allowed: a known key; did you mean arrivals?"),
        (
            {"arrivals": "uniform"},
            "arrivals: 'uniform' is not allowed; allowed: one of poisson, gamma, constant, trace",
        ),
        ({"arrivals": "trace"}, "lengths: is missing"),
        ({"burstiness": 0.0, "arrivals": "gamma"}, "burstiness: 0.0 is not allowed; allowed: above 0"),
        ({"burstiness": 2.0}, "burstiness: 2.0 is not allowed; allowed: 1, or any where arrivals are gamma"),
        ({"input_tokens": 0}, "input_tokens: 0 is not allowed; allowed: at least 1"),
        ({"input_tokens": "many"}, "input_tokens: 'many' is not allowed; allowed: a whole number"),
        ({"range_ratio": 1.0}, "range_ratio: 1.0 is not allowed"),
        ({"max_input_tokens": 5}, "max_input_tokens: 5 is not allowed; allowed: nothing without a file of lengths"),
        ({"order": "recorded"}, "order: 'recorded' is not allowed; allowed: nothing without a file of lengths"),
        ({"lengths": "x.csv", "output_tokens": 5}, "output_tokens: 5 is not allowed; allowed: nothing beside a"),
        ({"lengths": "x.csv", "range_ratio": 0.5}, "range_ratio: 0.5 is not allowed; allowed: 0 beside a file"),
        ({"lengths": "x.csv", "arrivals": "trace", "order": "shuffled"}, "order: 'shuffled' is not allowed"),
        ({"over_length": "cut"}, "over_length: 'cut' is not allowed; allowed: one of clip, drop"),
        ({"slo_classes": {"a": {"share": 0.5}}}, "slo_classes: 'shares that add up to 0.5' is not allowed"),
        ({"slo_classes": {"a": {"ttft_s": 0}}}, "slo_classes.a.ttft_s: 0 is not allowed; allowed: above 0"),
        ({"slo_classes": {"a": {"ttft": 1}}}, "slo_classes.a.ttft: 'ttft' is not allowed; allowed: a known key; did"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        spec(**fields)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rate": 0.0, "num_requests": 5}, "rate: 0.0 is not allowed; allowed: a finite number above 0"),
        ({"rate": -1.0, "num_requests": 5}, "rate: -1.0 is not allowed"),
        ({"rate": math.inf, "num_requests": 5}, "rate: inf is not allowed"),
        ({"rate": None, "num_requests": 5}, "rate: is missing"),
        ({"rate": 1.0}, "num_requests: is missing"),
        ({"rate": 1.0, "num_requests": 0}, "num_requests: 0 is not allowed; allowed: 1 to"),
        ({"rate": 1.0, "seconds": 0.0}, "seconds: 0.0 is not allowed"),
        ({"rate": 1e6, "seconds": 1e6}, "seconds: 'about"),
        ({"rate": 1.0, "num_requests": 5, "seed": -1}, "seed: -1 is not allowed; allowed: at least 0"),
    ],
)
def test_wrong_draws_are_refused_by_name(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        drawn({}, **how)
    assert str(refused.value).startswith(message)


def test_unusable_files_are_refused_by_name(tmp_path: Path, pool: str) -> None:
    with pytest.raises(ConfigError, match=r"lengths: '.*nowhere.csv' is not allowed; allowed: a file that can be read"):
        load(spec(lengths=str(tmp_path / "nowhere.csv")))
    empty, odd = tmp_path / "empty.csv", tmp_path / "odd.csv"
    empty.write_text("arrival_s,input_tokens,output_tokens\n")
    odd.write_text("arrival_s,input_tokens,output_tokens\n1,-5,3\n")
    with pytest.raises(ValueError, match=r"empty.csv' has no requests"):
        load(spec(lengths=str(empty)))
    with pytest.raises(ValueError, match=r"odd.csv:2: input_tokens is '-5'; allowed: an integer from 1"):
        load(spec(lengths=str(odd)))
    with pytest.raises(ConfigError, match=r"lengths: .* a file with a request within the caps and 5 tokens"):
        load(spec(lengths=pool), max_model_len=5)
    with pytest.raises(ConfigError, match=r"arrivals: 'trace' is not allowed; .*pool.csv has lengths only"):
        drawn({"lengths": pool, "arrivals": "trace"})
    with pytest.raises(ConfigError, match=r"input_tokens: '640 tokens of prompt and answer' .* at most 100"):
        load(spec(), max_model_len=100)


def test_a_trace_that_comes_all_at_once_has_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n3,10,1\n3,20,2\n")
    fields = {"lengths": str(path), "arrivals": "trace"}
    assert [row.arrival_s for row in drawn(fields, rate=None)] == [0.0, 0.0]
    with pytest.raises(ConfigError, match=r"rate: 2\.0 is not allowed; allowed: none: all requests of"):
        drawn(fields, rate=2.0)


def test_a_file_that_was_written_anew_is_read_anew(pool: str) -> None:
    before = load(spec(lengths=pool))
    Path(pool).write_text(POOL + ",40,4\n")
    assert (len(before.pool), len(load(spec(lengths=pool)).pool)) == (3, 4)


@pytest.mark.parametrize("name", ["azure2023_conv", "mooncake_conversation", "sharegpt_distserve_opt_poisson16rps"])
def test_public_traces_can_be_replayed(shared_data: Path, name: str) -> None:
    fields = {"lengths": str(shared_data / "workloads" / f"{name}.csv.gz"), "arrivals": "trace"}
    rows = drawn(fields, seed=0, rate=10.0, seconds=60.0)
    assert 300 < len(rows) < 1200
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in itertools.pairwise(rows))
    assert bool(rows[0].hash_ids) == name.startswith("mooncake")
