"""Every parser of bytes that come from elsewhere: what it is fed, and the only errors that may come out of it.

A target is called with one input and returns, or raises what is in `allowed`. Anything else, a hang and a huge
allocation included, is a finding; the input then becomes a file of `corpus/<target>/`, tried on every run of the tests.
"""

from __future__ import annotations

import sys

from feeding import Target, as_json, in_file
from google.protobuf.message import DecodeError
from of_doors import (
    CHAT,
    COMPLETION,
    EVENTS,
    GENERATE,
    HTTP_SEEDS,
    TEMPLATE,
    answer_events,
    chat_messages,
    chat_template,
    grpc_request,
    http_body,
    http_wire,
)
from of_files import (
    KEYS,
    KV_SCALES,
    LLAMA,
    OPT,
    PROMPTS,
    QWEN,
    TOKENIZER,
    TRACE_CSV,
    TRACE_JSON,
    YAML,
    api_keys_file,
    gguf_file,
    gguf_seed,
    hf_file,
    hf_generation,
    hf_tokenizer_config,
    kv_scales_file,
    safetensors_file,
    safetensors_seed,
)
from of_members import (
    FRAME,
    HEARTBEAT,
    KV_SEEDS,
    LAYOUT,
    OUTPUT,
    PLAN,
    SEQUENCE,
    event,
    heartbeat,
    kv_layout,
    kv_message,
    kv_sealed,
    offered,
    segment,
    sequence,
    unsealed,
)
from tandem.cluster.config import ConfigError
from tandem.cluster.config_file import load_config
from tandem.cluster.engine.plan_wire import decode_output, decode_plan, encode_output, encode_plan
from tandem.cluster.models.errors import ModelError
from tandem.cluster.workload.datasets import read_prompts
from tandem.cluster.workload.traces import read_trace
from tandem.kvtransfer.mapped.segment import SegmentError
from tandem.kvtransfer.ticket import HandoffRefused
from tandem.router.errors import InvalidRequest, ServiceError
from tandem.router.hf_tokenizer import read_hf_tokenizer


def targets() -> dict[str, Target]:
    """By name. Built on demand: some seeds are files that have to be written, some parsers slow to load."""
    import tandem.cluster.engine.hf_weights
    import tandem.router.api_keys  # noqa: F401

    refused, value = (HandoffRefused,), (ValueError,)
    return {
        "kv_message": Target(kv_message, refused, KV_SEEDS),
        "kv_sealed": Target(kv_sealed, refused, tuple(unsealed(seed) for seed in KV_SEEDS)),
        "kv_layout": Target(kv_layout, value, (LAYOUT.to_bytes(),)),
        **({"segment": Target(segment, (SegmentError,), (offered()[1],))} if sys.platform == "linux" else {}),
        "heartbeat": Target(heartbeat, (DecodeError,), (HEARTBEAT.SerializeToString(),)),
        "sequence": Target(sequence, (DecodeError, ValueError), (SEQUENCE.SerializeToString(),)),
        "event": Target(event, (DecodeError,), (FRAME.SerializeToString(),)),
        "step_plan": Target(decode_plan, value, (encode_plan(PLAN),)),
        "step_output": Target(decode_output, value, (encode_output(OUTPUT),)),
        "http_body": Target(http_body, (ServiceError,), (as_json(CHAT), as_json(COMPLETION))),
        "http_wire": Target(http_wire, (), HTTP_SEEDS),
        "grpc_request": Target(grpc_request, (DecodeError, InvalidRequest), (GENERATE.SerializeToString(),)),
        "chat_messages": Target(chat_messages, (ServiceError,), (as_json(CHAT),)),
        "chat_template": Target(chat_template, (ValueError, InvalidRequest), (TEMPLATE.encode(),)),
        "gguf": Target(in_file("gguf/model.gguf", gguf_file), (ModelError,), (gguf_seed(),)),
        "safetensors": Target(
            in_file("safetensors/model.safetensors", safetensors_file), (ModelError,), (safetensors_seed(),)
        ),
        "safetensors_index": Target(
            in_file("index/model.safetensors.index.json", safetensors_file),
            (ModelError,),
            (as_json({"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "a.safetensors"}}),),
        ),
        "hf_config": Target(
            in_file("config/config.json", hf_file), (ModelError,), tuple(map(as_json, (LLAMA, OPT, QWEN)))
        ),
        "generation_config": Target(
            in_file("generation/generation_config.json", hf_generation),
            (ModelError,),
            (as_json({"eos_token_id": [1, 2], "temperature": 0.5}),),
        ),
        "tokenizer": Target(
            in_file("tokenizer/tokenizer.json", lambda path: read_hf_tokenizer(path.parent)),
            value,
            (as_json(TOKENIZER),),
        ),
        "tokenizer_config": Target(
            in_file("tokenizer2/tokenizer_config.json", hf_tokenizer_config),
            value,
            (as_json({"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "x"}]}),),
        ),
        "yaml": Target(in_file("cluster.yaml", load_config), (ConfigError,), (YAML,)),
        "kv_scales": Target(in_file("kv_scales.json", kv_scales_file), value, (as_json(KV_SCALES),)),
        "prompts": Target(in_file("prompts.jsonl", read_prompts), value, (PROMPTS,)),
        "trace": Target(in_file("trace", read_trace), value, (TRACE_JSON, TRACE_CSV)),
        "events": Target(answer_events, (), (EVENTS,)),
        "api_keys": Target(in_file("keys", api_keys_file), (ConfigError,), (KEYS,)),
    }
