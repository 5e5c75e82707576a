"""Parsers of what clients say at the router's doors, and of what they hear there."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from tandem.cluster.bench.sse import read_events
from tandem.cluster.proto import tandem_v1_pb2 as public_pb
from tandem.router.chat_template import MAX_PROMPT_CHARS, compile_chat_template, render_chat
from tandem.router.errors import ServiceError
from tandem.router.grpc_api import _plain
from tandem.router.http_json import parse_json_object
from tandem.router.http_message import Message
from tandem.router.http_protocol import HttpConnection, HttpLimits
from tandem.router.http_server import HttpServer
from tandem.router.openai_requests import parse_chat, parse_completion, parse_messages
from tandem.router.params import Fields, Limits, parse_options, parse_top_logprobs

LIMITS = Limits(vocab_size=512, max_model_len=512, max_choices=4, max_stop=4, default_max_tokens=None)
CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 2,
    "stop": ["a", "b"],
    "logit_bias": {"5": -1.5},
    "seed": 7,
    "max_tokens": 5,
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
}
COMPLETION = {"model": "tiny", "prompt": [[1, 2], [3]], "echo": True, "best_of": 1, "stop_token_ids": [3]}
GENERATE = public_pb.GenerateRequest(
    model="tiny",
    tokens=public_pb.TokenPrompt(token_ids=[1, 2]),
    sampling=public_pb.SamplingOptions(temperature=0.5, n=2, stop=["x"], logit_bias={3: 1.0}, top_logprobs=1),
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ bos_token }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') | trim }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def http_body(data: bytes) -> None:
    body = parse_json_object(data)
    messages: list[str] = []
    for parse in (parse_chat, parse_completion):
        try:
            parse(body, LIMITS)
        except ServiceError as error:
            messages.append(error.message)
    for message in messages:
        assert len(message.encode()) < 4096


def chat_messages(data: bytes) -> None:
    messages = parse_messages(Fields(parse_json_object(data)))
    render_chat(TEMPLATE, messages, bos_text="<s>", eos_text="</s>")


def chat_template(data: bytes) -> None:
    """A template is the model's: what it may not do is reach anything but its variables, or make more than a prompt."""
    text = data.decode("utf-8", "replace")
    compile_chat_template(text)
    made = render_chat(text, [{"role": "user", "content": "Hi"}], bos_text="<s>", eos_text="</s>")
    assert len(made) <= MAX_PROMPT_CHARS


def grpc_request(data: bytes) -> None:
    request = public_pb.GenerateRequest.FromString(data)
    fields = Fields(_plain(request.sampling), prefix="sampling.")
    parse_options(fields, LIMITS, top_logprobs=parse_top_logprobs(fields, "top_logprobs"))


class _Transport(asyncio.Transport):
    """A connection that goes nowhere."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.closing = False

    def write(self, data: Any) -> None:
        assert not self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def _echo(message: Message) -> None:
    await message.read()
    message.start(200, (), 0)
    message.end()


@functools.cache
def _http() -> tuple[asyncio.AbstractEventLoop, HttpServer]:
    return asyncio.new_event_loop(), HttpServer(_echo, HttpLimits(connections=10))


def http_wire(data: bytes) -> None:
    """A connection is answered, or closed; nothing is raised into the event loop."""
    loop, server = _http()
    failures: list[Any] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))

    async def feed() -> None:
        protocol = HttpConnection(server.host)
        transport = _Transport()
        protocol.connection_made(transport)  # type: ignore[arg-type]
        for start in range(0, len(data), 4096):
            if not transport.closing:
                protocol.data_received(data[start : start + 4096])
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        transport.closing = True
        protocol.connection_lost(None)
        for _ in range(3):
            await asyncio.sleep(0)

    loop.run_until_complete(feed())
    assert not failures, failures
    assert not server.connections


HTTP_SEEDS = (
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" * 2,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
)


EVENTS = b"".join(
    b"data: " + data + b"\n\n"
    for data in (
        b'{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}',
        b'{"choices": [{"index": 0, "delta": {"content": "Hi"}}, {"text": "Hi", "finish_reason": "stop"}]}',
        b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}',
        b'{"error": {"message": "no"}}',
        b"[DONE]",
    )
)


def answer_events(data: bytes) -> None:
    """A server's stream of events, whatever server it is."""
    record = read_events(200, [(0.0, part) for part in data.split(b"\n\n")], "", due_s=0.0, sent_s=0.0)
    assert record.error or b"[DONE]" in data
