"""The router's benchmark: its client counts what came, its workers are workers to a real router."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest
from tandem.cluster.bench.processes import addresses_of, end
from tandem.cluster.bench.router import RouterBenchOptions, run_router_bench, show
from tandem.cluster.bench.router_load import HttpConnection, Shape, Tally


class Wire(asyncio.Transport):
    """Answers every request with the next parts of a script."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        super().__init__()
        self.answers = answers
        self.connection: HttpConnection | None = None

    def write(self, data: Any) -> None:
        assert self.connection is not None
        for part in self.answers.pop(0):
            asyncio.get_running_loop().call_soon(self.connection.data_received, part)


def tally_of(answers: list[list[bytes]], *, stream: bool) -> Tally:
    async def run() -> Tally:
        wire, tally = Wire(list(answers)), Tally()
        wire.connection = HttpConnection("h", "m", Shape(prompt_tokens=1, output_tokens=2, stream=stream))
        wire.connection.connection_made(wire)
        for _ in answers:
            await asyncio.wait_for(wire.connection.ask(tally), 10)
        return tally

    return asyncio.run(run())


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'b\r\ndata: {"a"}\r\n'
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nno"


def test_events_are_counted_and_the_end_is_found_in_pieces() -> None:
    tally = tally_of([[HEAD, EVENT, EVENT + b"0\r\n", b"\r\n"], [HEAD + EVENT + b"0\r\n\r\n"]], stream=True)
    assert (tally.requests, tally.events, tally.failed, len(tally.ttfts_s)) == (2, 3, 0, 2)


def test_a_refusal_is_a_failure_in_both_shapes() -> None:
    for stream in (True, False):
        tally = tally_of([[REFUSAL, b"pe"]], stream=stream)
        assert (tally.requests, tally.failed) == (1, 1)


def test_a_whole_answer_ends_with_its_length() -> None:
    tally = tally_of([[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{", b"}"]], stream=False)
    assert (tally.requests, tally.failed) == (1, 0)


def test_values_that_are_not_allowed_are_named() -> None:
    with pytest.raises(ValueError, match="concurrency: 0 is not allowed; allowed: 1 to 1024"):
        RouterBenchOptions(concurrency=0)
    with pytest.raises(ValueError, match="doors: 'tcp' is not allowed; allowed: http, grpc"):
        RouterBenchOptions(doors=("tcp",))


def test_a_real_router_is_measured(tmp_path: Any) -> None:
    options = RouterBenchOptions(seconds=0.1, concurrency=4, output_tokens=(2, 5), low_load_requests=10)
    told: list[str] = []
    result = asyncio.run(run_router_bench(options, told.append))
    assert [(row.door, row.stream, row.output_tokens) for row in result.rows] == [
        *(("http", True, 2), ("http", True, 5), ("http", False, 2), ("http", False, 5)),
        *(("grpc", True, 2), ("grpc", True, 5)),
    ]
    assert len(told) == len(result.rows) + 2
    for row in result.rows:
        assert row.requests > 0
        assert row.failed == 0
        assert row.cpu_ms_per_request > 0
    assert {added.door for added in result.added} == {"http", "grpc"}
    assert "one more streamed token over http" in show(result)
    result.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["options"]["concurrency"] == 4


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('half a line', end='', flush=True); import time; time.sleep(60)", "did not serve within 0.2 s"),
        ("raise SystemExit(3)", "ended with 3 before it served"),
    ],
)
def test_a_process_that_says_nothing_is_not_waited_for(program: str, words: str) -> None:
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        with pytest.raises(RuntimeError, match=f"^it {words}$"):
            addresses_of(process, "it", 0.2 if "within" in words else 60.0)
    finally:
        end(process)
