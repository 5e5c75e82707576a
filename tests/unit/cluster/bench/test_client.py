"""The load generator against a small server of its own, and the reading of streams as a pure function."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from tandem.cluster.bench.client import CHAT, COMPLETIONS, HttpSender, Target, send
from tandem.cluster.bench.load import run_load
from tandem.cluster.bench.sse import read_events
from tandem.cluster.workload.datasets import BenchRequest
from tandem.cluster.workload.report import RequestRecord


def event(**message: object) -> bytes:
    return b"data: " + json.dumps(message).encode()


CHAT_EVENTS = [
    (1.0, event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])),
    (2.0, event(choices=[{"index": 0, "delta": {"content": "He"}, "finish_reason": None}])),
    (3.0, b": keep-alive"),
    (4.0, event(choices=[{"index": 0, "delta": {"content": "llo"}, "finish_reason": "stop"}])),
    (4.5, event(choices=[], usage={"prompt_tokens": 11, "completion_tokens": 3})),
    (5.0, b"data: [DONE]"),
]


def test_chat_stream() -> None:
    record = read_events(200, CHAT_EVENTS, "", due_s=0.4, sent_s=0.5)
    assert record.ok
    assert (record.first_token_s, record.last_token_s) == (2.0, 4.0)  # the role is no token, usage no output
    assert record.text == "Hello"
    assert (record.prompt_tokens, record.output_tokens) == (11, 3)
    assert record.tpot_s == 1.0


def test_completions_stream_without_usage() -> None:
    events = [(1.0, event(choices=[{"text": "a"}])), (2.0, event(choices=[{"text": "b"}])), (2.0, b"data: [DONE]")]
    record = read_events(200, events, "", due_s=0.0, sent_s=0.0)
    assert record.ok
    assert record.output_tokens == 2


NO_STREAM = "an event is not what such a stream is made of"


@pytest.mark.parametrize(
    ("status", "events", "error"),
    [
        (429, [(1.0, b'{"error": {"message": "full\\nnow"}}')], "HTTP 429: full now"),
        (500, [(1.0, b"oops")], "HTTP 500: oops"),
        (200, CHAT_EVENTS[:-1], "the stream had no end"),
        (200, [*CHAT_EVENTS[:2], (3.0, event(error={"message": "worker lost"})), CHAT_EVENTS[-1]], "worker lost"),
        (200, [(1.0, b"data: {")], NO_STREAM),
        (200, [(1.0, b"data: " + b"[" * 50_000)], NO_STREAM),
        (200, [(1.0, b"data: []")], NO_STREAM),
        (200, [(1.0, b'data: {"choices": [5]}')], NO_STREAM),
        (200, [(1.0, b'data: {"choices": [{"delta": "x"}]}')], NO_STREAM),
        (200, [(1.0, b'data: {"choices": [{"delta": {"content": 5}}]}')], NO_STREAM),
        (200, [(1.0, b'data: {"usage": {"completion_tokens": "many"}}')], NO_STREAM),
    ],
)
def test_failures(status: int, events: list[tuple[float, bytes]], error: str) -> None:
    record = read_events(status, events, "", due_s=0.0, sent_s=0.0)
    assert record.error == error
    assert not record.ok


Handler = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]


def serve(
    handler: Handler,
    work: Callable[[str], Awaitable[list[RequestRecord]]],
    run: Callable[..., list[RequestRecord]] = asyncio.run,
) -> list[RequestRecord]:
    """Runs `work(base_url)` against an HTTP server whose answers `handler` writes."""

    tasks: list[asyncio.Task[None]] = []

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        await handler(json.loads(await reader.readexactly(length)), writer)
        writer.close()
        await writer.wait_closed()

    async def main() -> list[RequestRecord]:
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        async with server:
            records = await work(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await asyncio.gather(*tasks)
            return records

    return run(main())


async def answer(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
    """Streams `max_tokens` pieces, cut at awkward places."""
    pieces = [event(choices=[{"text": f"{index} "}]) for index in range(int(str(body["max_tokens"])))]
    usage = {"prompt_tokens": len(str(body["prompt"])), "completion_tokens": len(pieces)}
    stream = b"\n\n".join([*pieces, event(choices=[], usage=usage), b"data: [DONE]", b""])
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(stream), 17):
        piece = stream[start : start + 17]
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()
    writer.write(b"0\r\n\r\n")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_load_comes_back_in_order(run: Callable[..., list[RequestRecord]]) -> None:
    requests = [BenchRequest(prompt="x" * size, max_tokens=size) for size in (3, 1, 4)]
    seen: list[RequestRecord] = []

    async def work(url: str) -> list[RequestRecord]:
        sender = HttpSender(Target(base_url=url, model="m"))
        load = await run_load(sender.send, requests, (0.0, 0.0, 0.01), max_concurrency=2, on_done=seen.append)
        await sender.close()
        return load.records

    records = serve(answer, work, run)
    assert [record.error for record in records] == [""] * 3
    assert [record.output_tokens for record in records] == [3, 1, 4]
    assert [record.prompt_tokens for record in records] == [3, 1, 4]
    assert [len(record.itls_s) for record in records] == [2, 0, 3]
    assert records[0].text == "0 1 2 "
    assert len(seen) == 3
    assert all(record.lateness_s >= -0.001 for record in records)


def test_a_connection_that_ends_early_is_a_failed_request() -> None:
    async def broken(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ndata: ")

    async def work(url: str) -> list[RequestRecord]:
        return [await send(Target(base_url=url, model="m"), BenchRequest(prompt="x", max_tokens=1), 0.0)]

    assert "ended early" in serve(broken, work)[0].error


def test_no_server_and_no_end() -> None:
    given_up = asyncio.Event()

    async def silent(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        await given_up.wait()

    async def work(url: str) -> list[RequestRecord]:
        request = BenchRequest(prompt="x", max_tokens=1)
        slow = await send(Target(base_url=url, model="m", timeout_s=0.05), request, 0.0)
        given_up.set()
        absent = await send(Target(base_url="http://127.0.0.1:1", model="m"), request, 0.0)
        return [slow, absent]

    slow, absent = serve(silent, work)
    assert slow.error == "no end within 0.05 s"
    assert absent.error


def test_targets_are_checked() -> None:
    with pytest.raises(ValueError, match="base_url: 'localhost:8000'"):
        Target(base_url="localhost:8000", model="m")
    with pytest.raises(ValueError, match="endpoint"):
        Target(base_url="http://h", model="m", endpoint="/v2")
    tokens = BenchRequest(prompt=(1, 2), max_tokens=1)
    with pytest.raises(ValueError, match="takes text"):
        asyncio.run(send(Target(base_url="http://h", model="m", endpoint=CHAT), tokens, 0.0))
    assert Target(base_url="http://h", model="m").endpoint == COMPLETIONS
