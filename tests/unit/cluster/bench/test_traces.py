"""Recorded loads: both formats, shared prefixes, and errors that name file, line and field."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.bench import run as bench_run
from tandem.cluster.bench.run import BenchOptions, run_bench
from tandem.cluster.bench.text_file import numbered_lines
from tandem.cluster.bench.traces import (
    BLOCK_TOKENS,
    TraceRequest,
    arrival_times_of,
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


def test_prompts_share_the_blocks_that_the_trace_shares() -> None:
    def row(tokens: int, *blocks: int) -> TraceRequest:
        return TraceRequest(arrival_s=0.0, input_tokens=tokens, output_tokens=5, block_ids=blocks)

    trace = (row(1000, 1, 2), row(1100, 1, 2, 3), row(700, 1, 9), row(600), row(5000))
    pairs = trace_requests(trace, range(500), 0, 2000)
    prompts = [request.prompt for _, request in pairs]
    assert [len(prompt) for prompt in prompts] == [1000, 1100, 700, 600]
    assert prompts[0] == prompts[1][:1000]
    assert prompts[0][:BLOCK_TOKENS] == prompts[2][:BLOCK_TOKENS]
    assert prompts[0][BLOCK_TOKENS:700] != prompts[2][BLOCK_TOKENS:]
    assert all(request.max_tokens == 5 and request.ignore_eos for _, request in pairs)


def test_a_run_replays_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,10,2\n1.5,9000,3\n2.5,20,3\n")
    answers = {"/v1/models": {"data": [{"id": "m", "max_model_len": 512}]}, "/tokenize": {"tokens": [1, 2, 3]}}
    monkeypatch.setattr(bench_run, "ask", lambda base, path, *a, **k: answers[path])
    seen: list[Any] = []

    async def load(target: Any, requests: Any, arrivals: Any, **_: Any) -> list[Any]:
        seen.extend([len(requests), arrivals])
        return []

    monkeypatch.setattr(bench_run, "run_load", load)
    options = BenchOptions(dataset_name="trace", dataset_path=str(path), num_warmups=0)
    result = asyncio.run(run_bench(options))
    assert seen == [2, (0.0, 2.5)]
    assert result.facts["num_prompts"] == 2
    with pytest.raises(ValueError, match="dataset_path: is missing"):
        BenchOptions(dataset_name="trace")
