"""Every parser of bytes that come from elsewhere: what it is fed, and the only errors that may come out of it.

A target is called with one input and returns, or raises what is in `allowed`. Anything else, a hang and a huge
allocation included, is a finding; the input then becomes a file of `corpus/<target>/`, tried on every run of the tests.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import io
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xxhash
from google.protobuf.message import DecodeError
from tandem.cluster.bench.datasets import read_prompts
from tandem.cluster.bench.traces import read_trace
from tandem.cluster.config import ConfigError
from tandem.cluster.config_file import load_config
from tandem.cluster.engine.plan import RowOutput, SampleSpec, StepOutput, StepPlan, StepRow
from tandem.cluster.engine.plan_wire import decode_output, decode_plan, encode_output, encode_plan
from tandem.cluster.messages import sampling_to_proto, sequence_from_proto, tokens_from_proto, urgency_from_proto
from tandem.cluster.models.errors import ModelError
from tandem.cluster.models.gguf import gguf_tokenizer, open_gguf
from tandem.cluster.models.gguf_config import gguf_config
from tandem.cluster.models.hf_config import load_hf_config
from tandem.cluster.proto import tandem_internal_v1_pb2 as internal_pb
from tandem.cluster.proto import tandem_v1_pb2 as public_pb
from tandem.cluster.types import Handoff, SampledToken, SamplingParams
from tandem.kvtransfer import wire
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.ticket import HandoffRefused, Hello, RefusalReason, Ticket
from tandem.kvtransfer.transport import BlockFrame, EndFrame, PullRequest
from tandem.router.chat_template import MAX_PROMPT_CHARS, compile_chat_template, render_chat
from tandem.router.errors import InvalidRequest, ServiceError
from tandem.router.gguf_tokenizer import build_gguf_backend
from tandem.router.grpc_api import _plain
from tandem.router.hf_tokenizer import read_hf_tokenizer
from tandem.router.http_exchange import parse_json_object
from tandem.router.http_protocol import BoundedProtocol, HttpLimits
from tandem.router.openai_requests import parse_chat, parse_completion, parse_messages
from tandem.router.params import Fields, Limits, parse_options, parse_top_logprobs

MEMORY = Path("/dev/shm")
SCRATCH = "TANDEM_FUZZ_SCRATCH"
LIMITS = Limits(vocab_size=512, max_model_len=512, max_choices=4, max_stop=4, default_max_tokens=None)


@dataclass(frozen=True)
class Target:
    """One parser."""

    run: Callable[[bytes], object]
    allowed: tuple[type[BaseException], ...]
    seeds: tuple[bytes, ...]


@functools.cache
def scratch() -> Path:
    """A folder in memory where there is one, for parsers that read files; in the long run its parent's."""
    given = os.environ.get(SCRATCH)
    if given:
        return Path(given)
    folder = Path(tempfile.mkdtemp(prefix="tandem-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_file(name: str, run: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A parser of a file, fed with bytes."""

    def fed(data: bytes) -> object:
        path = scratch() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return run(path)

    return fed


# -- members' messages -------------------------------------------------------------------------------------------------

TICKET = Ticket(
    request_id="r",
    choice=0,
    prefill_attempt=1,
    decode_attempt=1,
    prefill_worker="prefill-0",
    epoch=7,
    num_tokens=20,
    fingerprint="f",
)
LAYOUT = KVLayout(
    block_size=16, groups=(KVGroup(name="all", num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32"),)
)
BLOCKS = [
    BlockFrame(
        ticket=TICKET,
        block_index=index,
        generation=3,
        payload=memoryview(bytes(8)),
        checksum=wire.block_checksum(TICKET, index, 3, bytes(8)),
    )
    for index in range(2)
]
END = EndFrame(
    ticket=TICKET,
    num_tokens=20,
    first_token=SampledToken(5, -0.5, ((5, -0.5), (6, -1.5))),
    prefill_end_age_s=0.1,
    total_bytes=16,
)
KV_SEEDS = (
    wire.encode_hello(
        Hello(protocol_version=1, worker_id="decode-0", epoch=9, fingerprint="f", layout=LAYOUT.to_bytes())
    ),
    wire.encode_pull(PullRequest(ticket=TICKET, first_block=0, pull_index=1, checksum=True)),
    wire.encode_ticket(TICKET),
    wire.encode_ack(),
    wire.encode_refused(HandoffRefused(RefusalReason.WRONG_EPOCH, "epoch 7 is not mine")),
    wire.encode_blocks(BLOCKS),
    wire.encode_end(END),
)
DECODERS: tuple[Callable[[bytes], object], ...] = (
    wire.decode_hello,
    wire.decode_pull,
    wire.decode_ticket,
    wire.decode_ack,
    wire.decode_refused,
    wire.decode_hello_reply,
    wire.decode_frames,
)


def kv_message(data: bytes) -> None:
    """Every decoder sees every message: a peer may send any of them anywhere."""
    for decode in DECODERS:
        try:
            found = decode(data)
        except HandoffRefused:
            continue
        for item in found if isinstance(found, tuple) else ():
            if isinstance(item, BlockFrame):
                try:
                    wire.check_block(item, 8)
                except HandoffRefused:
                    continue


def kv_sealed(data: bytes) -> None:
    """Behind a header checksum that is right; the first two bytes say how much of the rest is payload."""
    size = int.from_bytes(data[:2], "little")
    header, payload = data[2 : len(data) - size], data[max(len(data) - size, 2) :]
    kv_message(struct.pack("<IQ", len(header), xxhash.xxh3_64_intdigest(header)) + header + payload)


def _unsealed(message: bytes) -> bytes:
    length = struct.unpack_from("<I", message)[0]
    return struct.pack("<H", len(message) - 12 - length) + message[12:]


def kv_layout(data: bytes) -> None:
    layout = KVLayout.from_bytes(data)
    assert layout.block_bytes == sum(segment.length_bytes for segment in layout.segments()) > 0
    assert KVLayout.from_bytes(layout.to_bytes()) == layout


SAMPLING = SamplingParams(max_tokens=4, stop_token_ids=(3,), logit_bias=((2, 1.5),), top_logprobs=2)
SEQUENCE = internal_pb.Sequence(
    request_id="r",
    prompt_token_ids=[1, 2, 3],
    output_token_ids=[4],
    sampling=sampling_to_proto(SAMPLING),
    timeout_s=5,
    urgency=internal_pb.Urgency(slo_class="batch", share=0.5, ttft_left_s=1.0),
)


def sequence(data: bytes) -> None:
    message = internal_pb.Sequence.FromString(data)
    urgency_from_proto(message.urgency, 0.0)
    spec = sequence_from_proto(message, seq_id="s", handoff=Handoff.NONE, now_s=0.0, vocab_size=512)
    assert max(spec.prompt_token_ids) < 512


def event(data: bytes) -> None:
    for item in internal_pb.StepFrame.FromString(data).events:
        tokens_from_proto(item.tokens.tokens)


FRAME = internal_pb.StepFrame(epoch=1)
FRAME.events.add(request_id="r").tokens.tokens.add(token_id=3, logprob=-1.0).top.add(token_id=3, logprob=-1.0)
SPEC = SampleSpec(SAMPLING, 1, [1, 2, 3], [4], (0,))
PLAN = StepPlan(5, (StepRow("a", 3, [4], [7], SPEC), StepRow("b", 0, [1, 2], [8, 9])))
OUTPUT = StepOutput(5, (RowOutput("a", (SampledToken(1, -0.5, ((1, -0.5),)),)), RowOutput("b", error="x")), 0.01)


# -- the doors ---------------------------------------------------------------------------------------------------------

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


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@functools.cache
def _http() -> tuple[asyncio.AbstractEventLoop, Any, Any]:
    import uvicorn
    from uvicorn.server import ServerState

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(_echo, log_config=None, ws="none", lifespan="off")
    config.load()
    return asyncio.new_event_loop(), config, ServerState()


def http_wire(data: bytes) -> None:
    """A connection is answered, or closed; nothing is raised into the event loop."""
    loop, config, state = _http()
    failures: list[Any] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))

    async def feed() -> None:
        protocol = BoundedProtocol(HttpLimits(), 10, config=config, server_state=state, app_state={}, _loop=loop)
        transport = _Transport()
        protocol.connection_made(transport)
        for start in range(0, len(data), 4096):
            if not transport.closing:
                protocol.data_received(data[start : start + 4096])
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        transport.closing = True
        protocol._unset_keepalive_if_required()
        protocol.connection_lost(None)
        for _ in range(3):
            await asyncio.sleep(0)

    loop.run_until_complete(feed())
    assert not failures, failures
    assert not state.connections


# -- files -------------------------------------------------------------------------------------------------------------


@functools.cache
def gguf_seed() -> bytes:
    """A whole model of one layer."""
    path = scratch() / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, number in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 8,
    }.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "<s>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_file(path: Path) -> None:
    file = open_gguf(path)
    for read in (gguf_config, lambda file: build_gguf_backend(gguf_tokenizer(file))):
        try:
            read(file)
        except ValueError:
            continue
    for name in file.tensors:
        try:
            file.load(name)
        except ModelError:
            continue


def hf_file(path: Path) -> None:
    load_hf_config(path.parent)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "eos_token_id": [1, 2],
    "tie_word_embeddings": True,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 32,
    "max_position_embeddings": 64,
}
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "use_sliding_window": True, "sliding_window": 8}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "special": True, "normalized": False, **PLAIN}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
YAML = b"""model: dummy:tiny-llama
engine: {device: paced, kv_cache_bytes: 1MiB, block_size: 16}
prefill: {workers: 2, engine: {max_batched_tokens: 1024}}
decode: 1
router: &r
  http_port: 0
  slo: {ttft_s: 1.0, tpot_s: 0.1}
  slo_classes:
    night: {share: 0.5}
worker: {lease_s: 10}
"""
TRACE_JSON = b'{"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}\n' * 2
TRACE_CSV = b"arrival_s,input_tokens,output_tokens,prefix_hashes\n0.0,10,2,1 2\n0.5,20,3,\n"
PROMPTS = b'{"prompt": "a"}\n{"turns": ["b"]}\n{"messages": [{"role": "user", "content": "c"}]}\n"d"\n'
KEYS = b"# clients\nabcdefghijklmnop\nqrstuvwxyz012345\n"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _safetensors_seed() -> bytes:
    header = _json(
        {
            "__metadata__": {"format": "pt"},
            "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "lm_head.weight": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [16, 32]},
        }
    )
    out = io.BytesIO()
    out.write(struct.pack("<Q", len(header)))
    out.write(header)
    out.write(bytes(32))
    return out.getvalue()


def safetensors_file(path: Path) -> None:
    from tandem.cluster.engine.hf_weights import HfWeights
    from tandem.cluster.engine.weight_source import check_shapes
    from tandem.cluster.models.registry import CONFIGS

    config = CONFIGS["tiny-llama"]
    weights = HfWeights(path.parent, config)
    for name in weights.shapes():
        weights.read(name)
    check_shapes(config, weights)


def api_keys_file(path: Path) -> None:
    from tandem.router.api_keys import ApiKeys

    path.chmod(0o600)
    ApiKeys((), path).admit("abcdefghijklmnop")


def targets() -> dict[str, Target]:
    """By name. Built on demand: some seeds are files that have to be written, some parsers slow to load."""
    import tandem.cluster.engine.hf_weights
    import tandem.router.api_keys  # noqa: F401

    refused, value = (HandoffRefused,), (ValueError,)
    return {
        "kv_message": Target(kv_message, refused, KV_SEEDS),
        "kv_sealed": Target(kv_sealed, refused, tuple(_unsealed(seed) for seed in KV_SEEDS)),
        "kv_layout": Target(kv_layout, value, (LAYOUT.to_bytes(),)),
        "sequence": Target(sequence, (DecodeError, ValueError), (SEQUENCE.SerializeToString(),)),
        "event": Target(event, (DecodeError,), (FRAME.SerializeToString(),)),
        "step_plan": Target(decode_plan, value, (encode_plan(PLAN),)),
        "step_output": Target(decode_output, value, (encode_output(OUTPUT),)),
        "http_body": Target(http_body, (ServiceError,), (_json(CHAT), _json(COMPLETION))),
        "http_wire": Target(http_wire, (), HTTP_SEEDS),
        "grpc_request": Target(grpc_request, (DecodeError, InvalidRequest), (GENERATE.SerializeToString(),)),
        "chat_messages": Target(chat_messages, (ServiceError,), (_json(CHAT),)),
        "chat_template": Target(chat_template, (ValueError, InvalidRequest), (TEMPLATE.encode(),)),
        "gguf": Target(in_file("gguf/model.gguf", gguf_file), (ModelError,), (gguf_seed(),)),
        "safetensors": Target(
            in_file("safetensors/model.safetensors", safetensors_file), (ModelError,), (_safetensors_seed(),)
        ),
        "safetensors_index": Target(
            in_file("index/model.safetensors.index.json", safetensors_file),
            (ModelError,),
            (_json({"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "a.safetensors"}}),),
        ),
        "hf_config": Target(
            in_file("config/config.json", hf_file), (ModelError,), tuple(map(_json, (LLAMA, OPT, QWEN)))
        ),
        "generation_config": Target(
            in_file("generation/generation_config.json", hf_generation),
            (ModelError,),
            (_json({"eos_token_id": [1, 2], "temperature": 0.5}),),
        ),
        "tokenizer": Target(
            in_file("tokenizer/tokenizer.json", lambda path: read_hf_tokenizer(path.parent)), value, (_json(TOKENIZER),)
        ),
        "tokenizer_config": Target(
            in_file("tokenizer2/tokenizer_config.json", hf_tokenizer_config),
            value,
            (_json({"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "x"}]}),),
        ),
        "yaml": Target(in_file("cluster.yaml", load_config), (ConfigError,), (YAML,)),
        "prompts": Target(in_file("prompts.jsonl", read_prompts), value, (PROMPTS,)),
        "trace": Target(in_file("trace", read_trace), value, (TRACE_JSON, TRACE_CSV)),
        "api_keys": Target(in_file("keys", api_keys_file), (ConfigError,), (KEYS,)),
    }


HTTP_SEEDS = (
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" * 2,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
)


def hf_generation(path: Path) -> None:
    (path.parent / "config.json").write_bytes(_json(LLAMA))
    load_hf_config(path.parent)


def hf_tokenizer_config(path: Path) -> None:
    (path.parent / "tokenizer.json").write_bytes(_json(TOKENIZER))
    template = read_hf_tokenizer(path.parent).chat_template
    if template is not None:
        compile_chat_template(template)
