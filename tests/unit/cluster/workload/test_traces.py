"""Recorded loads: both formats, shared prefixes, and errors that name file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.workload import Workload, make_workload
from tandem.cluster.workload.text_file import numbered_lines
from tandem.cluster.workload.traces import (
    BLOCK_TOKENS,
    TraceRequest,
    arrival_times_of,
    block_tokens_of,
    draw_rows,
    fit_trace,
    read_trace,
    trace_requests,
)

ROW = {"timestamp": 27500, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}
HEAD = "arrival_s,input_tokens,output_tokens,prefix_hashes\n"


def test_mooncake_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    later = {**ROW, "timestamp": 30000.0, "hash_ids": []}
    path.write_bytes(gzip.compress(f"{json.dumps(later)}\n\n{json.dumps(ROW)}\n".encode()))
    assert read_trace(path) == (
        TraceRequest(arrival_s=0.0, input_tokens=6955, output_tokens=52, block_ids=(46, 47, 48)),
        TraceRequest(arrival_s=2.5, input_tokens=6955, output_tokens=52),
    )
    assert len(read_trace(path, 1)) == 1


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEAD}5.5,10,2,1 2\n6.0,20,3,\n")
    assert read_trace(path) == (
        TraceRequest(arrival_s=0.0, input_tokens=10, output_tokens=2, block_ids=(1, 2)),
        TraceRequest(arrival_s=0.5, input_tokens=20, output_tokens=3),
    )
    path.write_text("arrival_s,input_tokens,output_tokens\n,10,2\n,20,3\n")
    assert [row.arrival_s for row in read_trace(path)] == [None, None]
    assert arrival_times_of(read_trace(path)) is None


def lines(**changes: Any) -> str:
    row = {**ROW, **changes}
    return json.dumps({name: value for name, value in row.items() if value != "absent"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no requests"),
        (HEAD, "has no requests"),
        ("a,b\n1,2", r"t:1 has no column 'arrival_s'; allowed: JSON lines, or CSV"),
        (f"{HEAD}1,2", r"t:2 has 2 columns, its head 4"),
        (f"{HEAD}x,2,3,", r"t:2: arrival_s is 'x'; allowed: seconds"),
        (f"{HEAD}nan,2,3,", r"t:2: arrival_s is nan; allowed: a number from 0"),
        (f"{HEAD}-1,2,3,", r"t:2: arrival_s is -1\.0"),
        (f"{HEAD}1,0,3,", r"t:2: input_tokens is 0; allowed: an integer from 1"),
        (f"{HEAD}1,²,3,", r"t:2: input_tokens is '²'"),
        (f"{HEAD}1,{'9' * 5000},3,", r"t:2: input_tokens is '9999"),
        (f"{HEAD}1,2,3,x", r"t:2: prefix_hashes is 'x'"),
        (f'{HEAD}1,2,3,"x', r"t:2 is not CSV"),
        (f"{HEAD}1,2,3,\n,2,3,", r"has arrival times for 1 of 2 requests"),
        ("{", r"t:1 is not JSON"),
        ("{" + '"a":[' * 50_000, r"t:1 is not JSON"),
        (f"{lines()}\n3", r"t:2 is no object"),
        (lines(timestamp="0"), r"t:1: timestamp is '0'; allowed: a number"),
        (lines(timestamp=True), r"t:1: timestamp is True"),
        (lines(timestamp=10**4000), r"t:1: timestamp is 13288 bits long"),
        (lines(input_length="absent"), r"t:1: input_length is missing; allowed: an integer from 1"),
        (lines(input_length=2**60), r"t:1: input_length is 1152921504606846976"),
        (lines(output_length=0), r"t:1: output_length is 0"),
        (lines(output_length=1.5), r"t:1: output_length is 1\.5"),
        (lines(hash_ids={"a": 1}), r"t:1: hash_ids is \{'a': 1\}; allowed: a list"),
        (lines(hash_ids=[-1]), r"t:1: hash_ids is -1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_trace(path)


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"0" * 2**24))
    with pytest.raises(ValueError, match="is over 1000 bytes"):
        list(numbered_lines(path, 1000))
    path.write_bytes(gzip.compress(b"a\n" * 100)[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        list(numbered_lines(path))


def row(tokens: int, *blocks: int, output: int = 5) -> TraceRequest:
    return TraceRequest(arrival_s=0.0, input_tokens=tokens, output_tokens=output, block_ids=blocks)


def test_prompts_share_the_blocks_that_the_trace_shares() -> None:
    trace = (row(1000, 1, 2), row(1100, 1, 2, 3), row(700, 1, 9), row(600))
    requests = trace_requests(trace, range(500), 0)
    prompts = [request.prompt for request in requests]
    assert [len(prompt) for prompt in prompts] == [1000, 1100, 700, 600]
    assert prompts[0] == prompts[1][:1000]
    assert prompts[0][:BLOCK_TOKENS] == prompts[2][:BLOCK_TOKENS]
    assert prompts[0][BLOCK_TOKENS:700] != prompts[2][BLOCK_TOKENS:]
    assert all(request.max_tokens == 5 and request.ignore_eos for request in requests)


def test_a_block_is_as_long_as_the_lengths_say() -> None:
    assert block_tokens_of([row(6758, *range(14)), row(7322, *range(14)), row(100)]) == 512
    assert block_tokens_of([row(2358, *range(36)), row(1034, *range(16))]) == 64
    assert block_tokens_of([row(100)]) == BLOCK_TOKENS
    prompts = [r.prompt for r in trace_requests((row(150, 1, 2), row(200, 1, 2, 3)), range(500), 0, 64)]
    assert prompts[0][:128] == prompts[1][:128]
    assert prompts[0][128:] != prompts[1][128:150]


def test_caps_clip_or_drop_and_the_context_always_drops() -> None:
    trace = (row(100, output=10), row(300, output=10), row(100, output=90), row(900, output=10))
    clipped = fit_trace(trace, max_model_len=1000, max_input_tokens=200, max_output_tokens=50)
    assert [(r.input_tokens, r.output_tokens) for r in clipped.rows] == [(100, 10), (200, 10), (100, 50), (200, 10)]
    assert (clipped.clipped, clipped.dropped) == (3, 0)
    shared = fit_trace((row(300, 1, 2), row(100, 1, output=90)), max_model_len=1000, max_input_tokens=200)
    assert [r.block_ids for r in shared.rows] == [(), (1,)]
    dropped = fit_trace(trace, max_model_len=1000, max_input_tokens=200, max_output_tokens=50, clip=False)
    assert (dropped.rows, dropped.clipped, dropped.dropped) == (trace[:1], 0, 3)
    assert fit_trace(trace, max_model_len=310).rows == trace[:3]


def test_lengths_without_times_are_drawn_each_once_before_any_twice() -> None:
    rows = tuple(row(size) for size in range(1, 6))
    drawn = draw_rows(rows, 12, seed=1)
    assert len(drawn) == 12
    assert sorted(r.input_tokens for r in drawn[:5]) == sorted(r.input_tokens for r in drawn[5:10]) == [1, 2, 3, 4, 5]
    assert draw_rows(rows, 5, seed=1) != draw_rows(rows, 5, seed=2)


def test_recorded_times_scale() -> None:
    rows = [TraceRequest(arrival_s=at_s, input_tokens=1, output_tokens=1) for at_s in (2.0, 5.0)]
    assert arrival_times_of(rows, 2.0) == (0.0, 1.5)


def workload(path: Path, longest: int | None = None, **changes: Any) -> Workload:
    options = BenchOptions(dataset_name="trace", dataset_path=str(path), num_warmups=1, **changes)
    return make_workload(options, range(500), longest)


def test_a_trace_is_replayed_or_drawn_from(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,10,2\n1.5,9000,3\n2.5,20,3\n")
    replayed = workload(path, 512)
    assert [len(request.prompt) for request in replayed.requests] == [10, 20]
    assert replayed.arrivals_s == (0.0, 2.5)
    assert len(replayed.warmups) == 1
    assert replayed.warmups[0].prompt not in [request.prompt for request in replayed.requests]
    assert replayed.notes[0] == "1 of the trace's 3 requests were dropped: over the caps or the context"
    assert workload(path, 512, rate_scale=2.0).arrivals_s == (0.0, 1.25)
    assert (
        workload(path, max_input_len=15).notes[0]
        == "2 of the trace's 3 requests were clipped to the caps; clipped prompts share nothing"
    )

    drawn = workload(path, 512, request_rate=3.0, num_prompts=7)
    assert len(drawn.requests) == len(drawn.arrivals_s) == 7
    assert drawn.notes[-1] == "the trace's 2 lengths were used more than once"
    with pytest.raises(ValueError, match="rate_scale: 2 is not allowed"):
        workload(path, 512, rate_scale=2.0, request_rate=3.0)
    with pytest.raises(ValueError, match="no request fits into the caps and the model's context of 5 tokens"):
        workload(path, 5)


def test_a_pool_of_lengths_comes_at_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "pool.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n,10,2\n,20,3\n")
    drawn = workload(path, request_rate=10.0, num_prompts=200)
    assert len(drawn.arrivals_s) == 200
    assert drawn.arrivals_s[-1] == pytest.approx(19.9, rel=0.3)
    assert {len(request.prompt) for request in drawn.requests} == {10, 20}


def test_published_traces_are_read_as_they_are(tmp_path: Path) -> None:
    azure = tmp_path / "AzureLLMInferenceTrace_conv.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    later = tmp_path / "AzureLLMInferenceTrace_2024.csv"
    later.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59.5+00:00,7,1\n2024-05-11 00:00:01+00:00,8,2\n"
    )
    burst = tmp_path / "BurstGPT_1.csv"
    burst.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n6,GPT-4,90,0,90,API log\n45,ChatGPT,1087,230,1317,Conversation log\n"
    )
    found = {
        path: [(row.arrival_s, row.input_tokens, row.output_tokens) for row in read_trace(path)]
        for path in (azure, later, burst)
    }
    assert found[azure] == [(0.0, 374, 44), (pytest.approx(4.314579, abs=2e-6), 396, 109)]
    assert found[later] == [(0.0, 7, 1), (1.5, 8, 2)]
    assert found[burst] == [(0.0, 472, 18), (40.0, 1087, 230)]


def test_a_date_that_is_none_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,374,44\n")
    with pytest.raises(ValueError, match=r"azure.csv:2: TIMESTAMP is 'yesterday'; allowed: a date and time"):
        read_trace(path)
