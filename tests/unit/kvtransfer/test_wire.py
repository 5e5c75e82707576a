"""Messages survive the way there and back; anything else is refused as corrupt, never worse."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import struct
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer import wire
from tandem.kvtransfer.ticket import PROTOCOL_VERSION, HandoffRefused, Hello, RefusalReason, SegmentOffer, Ticket
from tandem.kvtransfer.transport import BlockFrame, EndFrame, PullRequest, RefFrame

TICKET = Ticket(
    request_id="req-1",
    choice=2,
    prefill_attempt=1,
    decode_attempt=3,
    prefill_worker="prefill-0",
    epoch=2**64 - 1,
    num_tokens=33,
    fingerprint="abc",
)
HELLO = Hello(protocol_version=PROTOCOL_VERSION, worker_id="p", epoch=9, fingerprint="abc", layout=b"\x00\x01")
END = EndFrame(
    ticket=TICKET,
    num_tokens=33,
    first_token=SampledToken(5, -0.25, ((5, -0.25), (9, -3.0))),
    prefill_end_age_s=0.5,
    total_bytes=2**40,
)


def block(index: int, payload: bytes, *, ticket: Ticket = TICKET, generation: int = 4) -> BlockFrame:
    checksum = wire.block_checksum(ticket, index, generation, payload)
    view = memoryview(payload)
    return BlockFrame(ticket=ticket, block_index=index, generation=generation, payload=view, checksum=checksum)


def changed(frame: BlockFrame, **fields: Any) -> BlockFrame:
    values = {name: getattr(frame, name) for name in BlockFrame.__slots__}
    return BlockFrame(**{**values, **fields})


def message(header: object, payload: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    return struct.pack("<IQ", len(packed), xxhash.xxh3_64_intdigest(packed)) + packed + payload


DECODERS = (
    wire.decode_hello,
    wire.decode_hello_reply,
    wire.decode_pull,
    wire.decode_ticket,
    wire.decode_ack,
    wire.decode_refused,
    wire.decode_frames,
)


def test_round_trips() -> None:
    assert wire.decode_hello_reply(wire.encode_hello(HELLO)) == HELLO
    sharing = replace(HELLO, offer=SegmentOffer(socket_name="tandem-kv-1", nonce=b"n" * 16))
    assert wire.decode_hello_reply(wire.encode_hello(sharing)) == sharing
    meeting = replace(HELLO, ranks=b"ranks")
    assert wire.decode_hello_reply(wire.encode_hello(meeting)) == meeting
    request = PullRequest(ticket=TICKET, first_block=7, pull_index=2, checksum=False)
    assert wire.decode_pull(wire.encode_pull(request)) == request
    assert wire.decode_pull(wire.encode_pull(replace(request, mapped=True))) == replace(request, mapped=True)
    assert wire.decode_ticket(wire.encode_ticket(TICKET)) == TICKET
    wire.decode_ack(wire.encode_ack())
    assert wire.decode_frames(wire.encode_end(END)) == (END,)
    bare = changed_end(first_token=SampledToken(7))
    assert wire.decode_frames(wire.encode_end(bare)) == (bare,)
    frames = (block(0, b"a" * 64), changed(block(1, b"b" * 64), checksum=None))
    assert wire.decode_frames(wire.encode_blocks(frames)) == frames
    refs = wire.encode_refs(TICKET, 3, [BlockRef(7, 2**64 - 1), BlockRef(2, 1)])
    named = (
        RefFrame(ticket=TICKET, block_index=3, block_id=7, generation=2**64 - 1),
        RefFrame(ticket=TICKET, block_index=4, block_id=2, generation=1),
    )
    assert wire.decode_frames(refs) == named
    assert wire.decode_frames(refs + wire.encode_end(END)) == (*named, END)


@pytest.mark.parametrize("following", [b"x", wire.encode_ack(), wire.encode_refs(TICKET, 5, [BlockRef(1, 1)])])
def test_nothing_but_the_end_follows_references(following: bytes) -> None:
    refs = wire.encode_refs(TICKET, 3, [BlockRef(7, 2)])
    with pytest.raises(HandoffRefused):
        wire.decode_frames(refs + following)
    with pytest.raises(HandoffRefused):
        wire.decode_frames(refs + wire.encode_end(END) + following)


def changed_end(**fields: Any) -> EndFrame:
    values = {name: getattr(END, name) for name in EndFrame.__slots__}
    return EndFrame(**{**values, **fields})


@pytest.mark.parametrize("reason", list(RefusalReason))
def test_refusals_keep_their_reason(reason: RefusalReason) -> None:
    data = wire.encode_refused(HandoffRefused(reason, "x" * 5000))
    for decode in (wire.decode_frames, wire.decode_ack, wire.decode_hello_reply):
        with pytest.raises(HandoffRefused) as refused:
            decode(data)
        assert refused.value.reason is reason
        assert refused.value.retryable is reason.retryable


def test_checksum_names_the_block_and_its_ticket() -> None:
    # PEERS: trouble 2. The right bytes in the wrong place are as wrong as wrong bytes.
    good = block(3, b"payload!" * 8)
    wire.check_block(good, 64)
    other = replace(TICKET, request_id="req-2")
    for bad in (
        changed(good, block_index=4),
        changed(good, generation=5),
        changed(good, ticket=other),
        changed(good, payload=memoryview(b"payload!" * 7 + b"payload?")),
        changed(good, payload=good.payload[:63]),
        changed(good, payload=good.payload[:63], checksum=None),
    ):
        with pytest.raises(HandoffRefused, match="corrupt"):
            wire.check_block(bad, 64)
    wire.check_block(changed(good, checksum=None), 64)


def test_other_version_is_told_so() -> None:
    theirs = wire.decode_hello(message([wire.Kind.HELLO, PROTOCOL_VERSION + 1, "shape", ["of", "its", "own"]]))
    assert theirs.protocol_version == PROTOCOL_VERSION + 1
    with pytest.raises(HandoffRefused) as refused:
        wire.decode_ticket(message([wire.Kind.TICKET, PROTOCOL_VERSION + 1]))
    assert refused.value.reason is RefusalReason.VERSION_MISMATCH


def ticket_with(**fields: object) -> list[object]:
    names = [each.name for each in dataclasses.fields(Ticket) if each.init]
    order = ["request_id", "choice", "prefill_attempt", "decode_attempt", "prefill_worker", "epoch", "num_tokens"]
    assert sorted(names) == sorted([*order, "fingerprint"])
    return [fields.get(name, getattr(TICKET, name)) for name in [*order, "fingerprint"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_tokens": 0},
        {"num_tokens": 2**31},
        {"epoch": -1},
        {"choice": True},
        {"choice": 1.0},
        {"request_id": "x" * 513},
        {"request_id": b"bytes"},
        {"fingerprint": None},
    ],
)
def test_ticket_bounds(fields: dict[str, object]) -> None:
    data = message([wire.Kind.TICKET, PROTOCOL_VERSION, ticket_with(**fields)])
    with pytest.raises(HandoffRefused, match=next(iter(fields))):
        wire.decode_ticket(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00\x00",
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff" + b"\x00" * 64,
        b"\x05\x00\x00\x00" + b"\xc1" * 13,
        struct.pack("<IQ", 5, xxhash.xxh3_64_intdigest(b"\xc1" * 5)) + b"\xc1" * 5,
        message({"kind": 1}),
        message([]),
        message(["6", 1]),
        message([99, 1]),
        message([wire.Kind.BLOCKS, PROTOCOL_VERSION, ticket_with(), []]),
        message([wire.Kind.BLOCKS, PROTOCOL_VERSION, ticket_with(), [[0, 1, 8, None]]], b"short"),
        message([wire.Kind.BLOCKS, PROTOCOL_VERSION, ticket_with(), [[0, 1, 4, None]]], b"too long"),
        message([wire.Kind.BLOCKS, PROTOCOL_VERSION, ticket_with(), [[0, 1, 2**40, None]]], b"x"),
        message([wire.Kind.BLOCKS, PROTOCOL_VERSION, ticket_with(), [[0, 1, 1, -1]]], b"x"),
        message([wire.Kind.BLOCKS, PROTOCOL_VERSION, ticket_with(), [0]], b"x"),
        message([wire.Kind.END, PROTOCOL_VERSION, ticket_with(), 3, 1, None, [[1, 0.0]] * 21, 0.0, 0]),
        message([wire.Kind.END, PROTOCOL_VERSION, ticket_with(), 3, 1, None, [[1]], 0.0, 0]),
        message([wire.Kind.END, PROTOCOL_VERSION, ticket_with(), 3, 1, "0.5", [], 0.0, 0]),
        message([wire.Kind.REFS, PROTOCOL_VERSION, ticket_with(), []]),
        message([wire.Kind.REFS, PROTOCOL_VERSION, ticket_with(), [[0, 1]]]),
        message([wire.Kind.REFS, PROTOCOL_VERSION, ticket_with(), [[0, -1, 1]]]),
        message([wire.Kind.REFS, PROTOCOL_VERSION, ticket_with(), [[0, 1, 1]] * 1025]),
        message([wire.Kind.REFS, PROTOCOL_VERSION, ticket_with(), [[0, 1, 1]]], b"payload"),
        message([wire.Kind.HELLO, PROTOCOL_VERSION, "p", 1, "f", b"", None, "ranks"]),
        message([wire.Kind.HELLO, PROTOCOL_VERSION, "p", 1, "f", b"", ["name", b"too short"], b""]),
        message([wire.Kind.HELLO, PROTOCOL_VERSION, "p", 1, "f", b"", ["x" * 101, b"n" * 16], b""]),
        message([wire.Kind.HELLO, PROTOCOL_VERSION, "p", 1, "f", b"", "name", b""]),
        message([wire.Kind.PULL, PROTOCOL_VERSION, ticket_with(), 0, 0, True, 1]),
        message([wire.Kind.ACK, PROTOCOL_VERSION], b"payload"),
        message([wire.Kind.REFUSED, PROTOCOL_VERSION, "no such reason", ""]),
        pickle.dumps([wire.Kind.ACK, PROTOCOL_VERSION]),
    ],
)
def test_garbage_is_corrupt(data: bytes) -> None:
    for decode in DECODERS:
        with pytest.raises(HandoffRefused) as refused:
            decode(data)
        assert refused.value.reason is RefusalReason.CORRUPT


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for decode in DECODERS:
        with pytest.raises(HandoffRefused):
            decode(data)


JSONISH = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(wire.Kind)), st.lists(JSONISH, max_size=8), st.binary(max_size=16))
def test_any_fields_are_refused_or_understood(kind: wire.Kind, fields: list[object], payload: bytes) -> None:
    data = message([kind, PROTOCOL_VERSION, *fields], payload)
    for decode in DECODERS:
        with contextlib.suppress(HandoffRefused):
            decode(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_flipped_bit_never_passes(data: st.DataObject) -> None:
    refs = wire.encode_refs(TICKET, 3, [BlockRef(7, 2), BlockRef(2, 1)])
    blocks = wire.encode_blocks([block(0, bytes(range(64)))])
    good = data.draw(st.sampled_from([blocks, refs, wire.encode_end(END), refs + wire.encode_end(END)]))
    check_all(good)
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(HandoffRefused):
        check_all(bytes(bad))


def check_all(data: bytes) -> None:
    for frame in wire.decode_frames(data):
        if isinstance(frame, BlockFrame):
            wire.check_block(frame, 64)


def test_oversized_header_is_an_error_at_the_sender() -> None:
    with pytest.raises(ValueError, match="header"):
        wire.encode_hello(Hello(protocol_version=1, worker_id="p", epoch=1, fingerprint="f", layout=b"x" * 70_000))
