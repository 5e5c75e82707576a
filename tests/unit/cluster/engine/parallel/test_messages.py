"""What leader and followers say to each other."""

from __future__ import annotations

import socket
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from rank_steps import steps
from tandem.cluster.engine.narrow_kv import NarrowKV
from tandem.cluster.engine.parallel.messages import (
    MAX_MESSAGE_BYTES,
    GpuSetup,
    Kind,
    Setup,
    decode_setup,
    encode_setup,
    encode_step,
    receive,
    send,
)
from tandem.cluster.engine.plan_wire import decode_plan
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS

SETUP = Setup(
    files=ModelFiles(name="m", kind="gguf", path=Path("/models/m.gguf"), config=CONFIGS["llama-3.1-8b"]),
    tensor_parallel=4,
    pipeline_stages=2,
    rank=5,
    dtype="bfloat16",
    kernels="torch",
    block_size=16,
    num_blocks=1000,
    nonce=b"0123456789abcdef",
    threads=2,
    cpus=(1, 3),
    stage_host="127.0.0.1",
    pipeline_host="10.0.0.2",
    fingerprint="00ff",
    timeout_s=60.0,
)


def test_a_setup_comes_as_it_was_sent() -> None:
    assert decode_setup(encode_setup(SETUP)) == SETUP
    plain = replace(SETUP, files=ModelFiles(name="d", kind="dummy", path=None, config=CONFIGS["opt-125m"]), cpus=())
    assert decode_setup(encode_setup(plain)) == plain
    on_gpu = replace(SETUP, gpu=GpuSetup(device="cuda:3", quantization="w8a8", max_model_len=4096, enforce_eager=True))
    assert decode_setup(encode_setup(on_gpu)) == on_gpu
    narrow = replace(SETUP, gpu=GpuSetup(device="cuda", narrow_kv=NarrowKV(dtype="int8", scales=b"\x00\xff" * 8)))
    assert decode_setup(encode_setup(narrow)) == narrow


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", encode_setup(SETUP)[:-1], b"\x81\xa5files\x80"])
def test_what_is_no_setup_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="setup: "):
        decode_setup(data)


def test_followers_hear_which_rows_sample_and_no_more_of_them() -> None:
    plan = steps()[1]
    heard = decode_plan(encode_step(plan, 16))
    assert heard.plan_id == plan.plan_id
    for ours, theirs in zip(heard.rows, plan.rows, strict=True):
        assert (ours.seq_id, ours.start, ours.token_ids) == (theirs.seq_id, theirs.start, theirs.token_ids)
        assert (ours.sample is None) == (theirs.sample is None)
    assert [len(row.block_ids) for row in heard.rows] == [2, 11]  # of 3 and 12: the context's


def test_messages_come_one_by_one() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, Kind.PLAN, b"x" * 70_000)
        send(ours, Kind.PING)
        assert receive(theirs) == (Kind.PLAN, b"x" * 70_000)
        assert receive(theirs) == (Kind.PING, b"")
        ours.sendall(b"\x05")
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)


@pytest.mark.parametrize("header", [struct.pack("<IB", MAX_MESSAGE_BYTES + 1, 1), struct.pack("<IB", 0, 200)])
def test_what_is_no_message_is_refused(header: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(header)
        with pytest.raises(ValueError, match=r"message|Kind"):
            receive(theirs)
