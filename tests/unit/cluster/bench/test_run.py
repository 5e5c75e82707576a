"""Whole runs over HTTP against a small server of another make: no /tokenize, connections kept or dropped."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tandem.cluster.bench.client import HttpSender, Target
from tandem.cluster.bench.options import BenchOptions
from tandem.cluster.bench.run import run_bench
from tandem.cluster.bench.server import COMMON_IDS, ServerUnusable
from tandem.cluster.workload.datasets import BenchRequest


class Server:
    """Speaks HTTP/1.1 over kept connections; `drops`: closes each after one answer, without having said so."""

    def __init__(self, *, drops: bool = False, refuses: bool = False) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.connections = 0
        self._drops = drops
        self._refuses = refuses
        self._tasks: list[asyncio.Task[None] | None] = []

    async def run(self, work: Any) -> Any:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        async with server:
            result = await work(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await asyncio.gather(*(task for task in self._tasks if task))
            return result

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.append(asyncio.current_task())
        self.connections += 1
        try:
            while not reader.at_eof():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                lines = dict(line.split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
                body = await reader.readexactly(int(lines.get("content-length", "0")))
                writer.write(self._answer(head.split()[1], lines, body))
                await writer.drain()
                if self._drops or lines.get("connection") == "close":
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()
        await writer.wait_closed()

    def _answer(self, path: str, head: dict[str, str], body: bytes) -> bytes:
        if path == "/v1/models":
            return _plain(200, {"data": [{"id": "other"}]})
        if path != "/v1/completions" or self._refuses:
            return _plain(404, {"error": {"message": "nothing here"}})
        request = json.loads(body)
        self.bodies.append(request)
        self.names.append(head.get("x-request-id", ""))
        piece = b'data: {"choices": [{"text": "a"}]}\n\n' * request["max_tokens"] + b"data: [DONE]\n\n"
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(piece), piece)


def _plain(status: int, message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def options(url: str, **changes: Any) -> BenchOptions:
    lengths = {"random_input_len": 6, "random_output_len": 3}
    return BenchOptions(base_url=url, dataset_name="random", num_prompts=4, seed=3, **lengths, **changes)


def test_a_server_of_another_make_is_measured() -> None:
    server = Server()
    result = asyncio.run(server.run(lambda url: run_bench(options(url, extra_body={"top_k": 5}, num_warmups=2))))
    assert [record.error for record in result.records] == [""] * 4
    assert (result.summary.total_input_tokens, result.summary.total_output_tokens) == (24, 12)
    assert result.facts["model_id"] == "other"
    assert "random token ids are 1000 to 8999" in result.notes[0]
    warm, sent = server.bodies[:2], server.bodies[2:]
    assert all(set(body["prompt"]) <= set(COMMON_IDS) for body in server.bodies)
    assert not {tuple(body["prompt"]) for body in warm} & {tuple(body["prompt"]) for body in sent}
    assert sent[0]["ignore_eos"] is True
    assert sent[0]["top_k"] == 5
    assert sorted(server.names[2:]) == [f"{result.name}-{place}" for place in range(4)]


def test_a_vocabulary_that_is_named_is_used() -> None:
    server = Server()
    asyncio.run(server.run(lambda url: run_bench(options(url, vocab_size=40))))
    used = {token for body in server.bodies for token in body["prompt"]}
    assert used
    assert used <= set(range(10, 40))


async def three(url: str) -> list[str]:
    sender = HttpSender(Target(base_url=url, model="m"))
    records = []
    for _ in range(3):
        records.append(await sender.send(BenchRequest(prompt="x", max_tokens=2), 0.0))
        await asyncio.sleep(0.02)  # time for the other side to drop the connection
    await sender.close()
    return [record.error for record in records]


@pytest.mark.parametrize(("drops", "connections"), [(False, 1), (True, 3)])
def test_connections_are_used_again_and_dropped_ones_replaced(drops: bool, connections: int) -> None:
    server = Server(drops=drops)
    assert asyncio.run(server.run(three)) == [""] * 3
    assert server.connections == connections
    assert len(server.bodies) == 3


def test_a_server_that_refuses_the_warm_up_is_unusable() -> None:
    with pytest.raises(ServerUnusable, match="/v1/completions: HTTP 404: nothing here"):
        asyncio.run(Server(refuses=True).run(lambda url: run_bench(options(url))))
