"""Parsers of what members of a cluster say to each other: handoff frames, layouts, shared memory, heartbeats,
sequences, events, step plans.
"""

from __future__ import annotations

import fcntl
import functools
import os
import struct
from collections.abc import Callable
from dataclasses import replace

import xxhash
from feeding import as_json
from tandem.cluster.engine.plan import RowOutput, SampleSpec, StepOutput, StepPlan, StepRow
from tandem.cluster.messages import sampling_to_proto, sequence_from_proto, tokens_from_proto, urgency_from_proto
from tandem.cluster.proto import tandem_internal_v1_pb2 as internal_pb
from tandem.cluster.rpc import PROTOCOL_VERSION as RPC_VERSION
from tandem.cluster.types import Handoff, SampledToken, SamplingParams
from tandem.kvtransfer import wire
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped.segment import KVSegment, take
from tandem.kvtransfer.ticket import PROTOCOL_VERSION, HandoffRefused, Hello, RefusalReason, SegmentOffer, Ticket
from tandem.kvtransfer.transport import BlockFrame, EndFrame, PullRequest
from tandem.router.describe import describe
from tandem.router.members import as_said, malformed
from tandem.router.placement import keeps_tpot, rank_decode, rank_prefill
from tandem.router.sent_load import SentLoad, WorkerSeen

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
HELLO = Hello(
    protocol_version=PROTOCOL_VERSION, worker_id="decode-0", epoch=9, fingerprint="f", layout=LAYOUT.to_bytes()
)
KV_SEEDS = (
    wire.encode_hello(HELLO),
    wire.encode_hello(replace(HELLO, offer=SegmentOffer(socket_name="tandem-kv-1", nonce=b"n" * 16))),
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


def kv_message(data: bytes) -> int:
    """Every decoder sees every message: a peer may send any of them anywhere. How many understood it."""
    understood = 0
    for decode in DECODERS:
        try:
            found = decode(data)
        except HandoffRefused:
            continue
        understood += 1
        for item in found if isinstance(found, tuple) else ():
            if isinstance(item, BlockFrame):
                try:
                    wire.check_block(item, 8)
                except HandoffRefused:
                    continue
    return understood


def kv_sealed(data: bytes) -> int:
    """Behind a header checksum that is right; the first two bytes say how much of the rest is payload."""
    size = int.from_bytes(data[:2], "little")
    header, payload = data[2 : len(data) - size], data[max(len(data) - size, 2) :]
    return kv_message(struct.pack("<IQ", len(header), xxhash.xxh3_64_intdigest(header)) + header + payload)


def unsealed(message: bytes) -> bytes:
    length = struct.unpack_from("<I", message)[0]
    return struct.pack("<H", len(message) - 12 - length) + message[12:]


def kv_layout(data: bytes) -> None:
    layout = KVLayout.from_bytes(data)
    assert layout.block_bytes == sum(segment.length_bytes for segment in layout.segments()) > 0
    assert KVLayout.from_bytes(layout.to_bytes()) == layout


@functools.cache
def offered() -> tuple[bytes, bytes]:
    """A segment's nonce and its memory. Linux only."""
    owned = KVSegment(LAYOUT, 2)
    owned.publish(TICKET.epoch)
    return owned.nonce, os.pread(owned.fileno(), 2**20, 0)


def segment(data: bytes) -> None:
    """Somebody passes on a descriptor of memory with these bytes."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    there = take(fd, nonce=offered()[0], epoch=TICKET.epoch, layout=LAYOUT)
    for block_id in (0, there.num_blocks - 1):
        assert there.generations([block_id])[0] >= 0
        assert len(bytes(there.block(block_id))) == LAYOUT.block_bytes


HEARTBEAT = internal_pb.WorkerStatus(
    worker_id="prefill-0",
    epoch=7,
    role="prefill",
    address="127.0.0.1:1",
    protocol_version=RPC_VERSION,
    fingerprint="f",
    kv_layout=LAYOUT.to_bytes(),
    block_size=16,
    num_blocks=100,
    free_blocks=50,
    max_running=8,
    step_time=internal_pb.StepTime(step_s=0.01, prefill_token_s=0.001),
    puller_states={"pulling": 1},
)


def heartbeat(data: bytes) -> None:
    """What is not refused can be ranked and shown."""
    status = internal_pb.WorkerStatus.FromString(data)
    if malformed(status):
        return
    view = as_said(status, "kv")
    seen = WorkerSeen(view, SentLoad())
    seen.hear(view)
    assert seen.view == view
    assert rank_prefill([view], 100, {}) == rank_decode([view], 100) == (view,)
    keeps_tpot(view, 100, 0.5)
    as_json(describe(status))


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
