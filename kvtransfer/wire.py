"""KV messages as bytes: `u32 header length | u64 xxh3 of the header | msgpack header | raw payload`. No protobuf, no
pickle; bounds on everything.

A message is one of: HELLO, PULL, TICKET (confirm and abort), ACK, REFUSED, BLOCKS, REFS, END; END may follow the last
REFS of its pull in the same bytes. A header is a msgpack array whose first element is the kind and whose second is the
protocol version, so that a member of another version is told so. Anything that does not parse raises
`HandoffRefused(CORRUPT)`, naming the field. Payloads are never copied by decoding.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any

import msgpack
import xxhash

from ..cluster.types import MAX_TOP_LOGPROBS, BlockRef, SampledToken
from .ticket import PROTOCOL_VERSION, HandoffRefused, Hello, RefusalReason, SegmentOffer, Ticket
from .transport import BlockFrame, EndFrame, KVFrame, PullRequest, RefFrame
from .wire_fields import as_bool, as_bytes, as_float, as_int, as_text, corrupt

MAX_HEADER_BYTES = 64 * 1024
MAX_LAYOUT_BYTES = 32 * 1024
MAX_BLOCKS_PER_MESSAGE = 1024
MAX_MESSAGE_TEXT = 2048
MAX_SOCKET_NAME = 100
"""Bytes of `sockaddr_un.sun_path`, the leading NUL and a reserve taken off."""
NONCE_BYTES = 16
_PREFIX = struct.Struct("<IQ")
_U64 = 2**64 - 1
_U31 = 2**31 - 1
_Parts = tuple[list[Any], memoryview]
"""A message's header and what follows it."""
_REASONS = frozenset(reason.value for reason in RefusalReason)


class Kind(enum.IntEnum):
    """First element of every header."""

    HELLO = 1
    PULL = 2
    TICKET = 3
    ACK = 4
    REFUSED = 5
    BLOCKS = 6
    END = 7
    REFS = 8


def block_checksum(ticket: Ticket, block_index: int, generation: int, payload: memoryview | bytes) -> int:
    """xxh3-64 of the payload, seeded with xxh3-64 of who it is: bytes of another request, block or life do not
    match.
    """
    identity = msgpack.packb([*_ticket_fields(ticket), block_index, generation])
    return xxhash.xxh3_64_intdigest(payload, seed=xxhash.xxh3_64_intdigest(identity))


def checksum_of(frame: BlockFrame) -> int:
    """`block_checksum` of what the frame names."""
    return block_checksum(frame.ticket, frame.block_index, frame.generation, frame.payload)


def check_block(frame: BlockFrame, block_bytes: int) -> None:
    """Raises `HandoffRefused(CORRUPT)` unless the payload has the right length and, where there is one, its
    checksum.
    """
    if len(frame.payload) != block_bytes:
        raise corrupt(f"block {frame.block_index} has {len(frame.payload)} bytes, expected {block_bytes}")
    if frame.checksum is None:
        return
    if checksum_of(frame) != frame.checksum:
        raise corrupt(f"checksum of block {frame.block_index} of {frame.ticket.prefill_key} does not match")


def check_blocks(frames: Sequence[BlockFrame], block_bytes: int, *, checksum: bool) -> None:
    """`check_block` of each. With `checksum`, a frame that needs one must have it."""
    for frame in frames:
        if checksum and frame.checksum is None and frame.verify is None:
            raise corrupt(f"block {frame.block_index} came without its checksum")
        check_block(frame, block_bytes)


def verify_copies(frames: Sequence[BlockFrame]) -> None:
    """After the payloads were copied: `HandoffRefused` where they may not have been what the frames name any more."""
    for verify in dict.fromkeys(frame.verify for frame in frames):
        if verify is not None:
            verify()


def max_message_bytes(block_bytes: int, message_bytes: int) -> int:
    """The largest message a peer with this block size sends."""
    return max(block_bytes, message_bytes) + MAX_HEADER_BYTES + _PREFIX.size


# Encoding


def encode_hello(hello: Hello) -> bytes:
    """HELLO carries the speaker's own protocol version where other messages carry this module's."""
    header = [Kind.HELLO, hello.protocol_version, hello.worker_id, hello.epoch, hello.fingerprint, hello.layout]
    offer = hello.offer
    return _message([*header, None if offer is None else [offer.socket_name, offer.nonce], hello.ranks])


def encode_pull(request: PullRequest) -> bytes:
    """A PULL message."""
    fields = [request.first_block, request.pull_index, request.checksum, request.mapped]
    return _message([Kind.PULL, PROTOCOL_VERSION, _ticket_fields(request.ticket), *fields])


def encode_ticket(ticket: Ticket) -> bytes:
    """A TICKET message: the whole request of Confirm and Abort."""
    return _message([Kind.TICKET, PROTOCOL_VERSION, _ticket_fields(ticket)])


def encode_ack() -> bytes:
    """An ACK message."""
    return _message([Kind.ACK, PROTOCOL_VERSION])


def encode_refused(refusal: HandoffRefused) -> bytes:
    """A REFUSED message; ends a pull, or answers a call."""
    return _message([Kind.REFUSED, PROTOCOL_VERSION, refusal.reason.value, refusal.message[:MAX_MESSAGE_TEXT]])


def encode_blocks(frames: Sequence[BlockFrame]) -> bytes:
    """A BLOCKS message: blocks of one ticket, in order. The one copy of the payload on its way out is made here."""
    blocks = [[f.block_index, f.generation, len(f.payload), f.checksum] for f in frames]
    header = [Kind.BLOCKS, PROTOCOL_VERSION, _ticket_fields(frames[0].ticket), blocks]
    return _message(header, *(f.payload for f in frames))


def encode_refs(ticket: Ticket, first_block: int, refs: Sequence[BlockRef]) -> bytes:
    """A REFS message: blocks of one ticket that follow each other, from index `first_block` on, by reference."""
    blocks = [[index, ref.block_id, ref.generation] for index, ref in enumerate(refs, first_block)]
    return _message([Kind.REFS, PROTOCOL_VERSION, _ticket_fields(ticket), blocks])


def encode_end(frame: EndFrame) -> bytes:
    """An END message."""
    token = frame.first_token
    header = [Kind.END, PROTOCOL_VERSION, _ticket_fields(frame.ticket), frame.num_tokens]
    header += [token.token_id, token.logprob, [list(pair) for pair in token.top]]
    return _message([*header, frame.prefill_end_age_s, frame.total_bytes])


# Decoding


def decode_hello(data: bytes) -> Hello:
    """Inverse of `encode_hello`. Of a HELLO of another version only the version is sure to be right."""
    header = _header(data, Kind.HELLO, 8, any_version=True)[0]
    if header[1] != PROTOCOL_VERSION:
        return Hello(protocol_version=header[1], worker_id="peer", epoch=0, fingerprint="", layout=b"")
    return Hello(
        protocol_version=header[1],
        worker_id=as_text(header[2], "worker_id"),
        epoch=as_int(header[3], "epoch", _U64),
        fingerprint=as_text(header[4], "fingerprint"),
        layout=as_bytes(header[5], "layout"),
        offer=_offer(header[6]),
        ranks=as_bytes(header[7], "ranks"),
    )


def decode_pull(data: bytes) -> PullRequest:
    """Inverse of `encode_pull`."""
    header = _header(data, Kind.PULL, 7)[0]
    return PullRequest(
        ticket=_ticket(header[2]),
        first_block=as_int(header[3], "first_block", _U31),
        pull_index=as_int(header[4], "pull_index", _U31),
        checksum=as_bool(header[5], "checksum"),
        mapped=as_bool(header[6], "mapped"),
    )


def decode_ticket(data: bytes) -> Ticket:
    """Inverse of `encode_ticket`."""
    return _ticket(_header(data, Kind.TICKET, 3)[0][2])


def decode_ack(data: bytes) -> None:
    """Returns on ACK; raises the refusal on REFUSED."""
    if _kind(data) is Kind.REFUSED:
        raise decode_refused(data)
    _header(data, Kind.ACK, 2)


def decode_refused(data: bytes) -> HandoffRefused:
    """Inverse of `encode_refused`: the exception, to be raised."""
    header = _header(data, Kind.REFUSED, 4)[0]
    reason = as_text(header[2], "reason")
    if reason not in _REASONS:
        raise corrupt(f"reason {reason!r} is not known")
    return HandoffRefused(RefusalReason(reason), as_text(header[3], "message", MAX_MESSAGE_TEXT))


def decode_hello_reply(data: bytes) -> Hello:
    """The answer to HELLO; raises the refusal where it is one."""
    if _kind(data) is Kind.REFUSED:
        raise decode_refused(data)
    return decode_hello(data)


def decode_frames(data: bytes) -> tuple[KVFrame | RefFrame, ...]:
    """One message of a pull stream: its frames in order, `EndFrame` the last; raises the refusal where it is one.
    Payloads are views.
    """
    parts = _split(data)
    kind = _kind_of(parts)
    if kind is Kind.REFUSED:
        raise decode_refused(data)
    if kind is Kind.REFS:
        return _decode_refs(parts)
    return (_decode_end(parts),) if kind is Kind.END else _decode_blocks(parts)


def _decode_blocks(parts: _Parts) -> tuple[BlockFrame, ...]:
    header, payload = _checked(parts, Kind.BLOCKS, 4)
    ticket, blocks = _ticket(header[2]), header[3]
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= MAX_BLOCKS_PER_MESSAGE:
        raise corrupt(f"blocks is not a list of 1…{MAX_BLOCKS_PER_MESSAGE}")
    frames, offset = [], 0
    for block in blocks:
        if not isinstance(block, list) or len(block) != 4:
            raise corrupt("a block is not [index, generation, length, checksum]")
        length = as_int(block[2], "length", _U31)
        if offset + length > len(payload):
            raise corrupt(f"payload has {len(payload)} bytes, its header promises more")
        frames.append(
            BlockFrame(
                ticket=ticket,
                block_index=as_int(block[0], "block_index", _U31),
                generation=as_int(block[1], "generation", _U64),
                payload=payload[offset : offset + length],
                checksum=None if block[3] is None else as_int(block[3], "checksum", _U64),
            )
        )
        offset += length
    if offset != len(payload):
        raise corrupt(f"payload has {len(payload)} bytes, its header promises {offset}")
    return tuple(frames)


def _decode_refs(parts: _Parts) -> tuple[RefFrame | EndFrame, ...]:
    header, following = _checked(parts, Kind.REFS, 4)
    ticket, blocks = _ticket(header[2]), header[3]
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= MAX_BLOCKS_PER_MESSAGE:
        raise corrupt(f"blocks is not a list of 1…{MAX_BLOCKS_PER_MESSAGE}")
    frames = []
    for block in blocks:
        if not isinstance(block, list) or len(block) != 3:
            raise corrupt("a block is not [index, block id, generation]")
        frames.append(
            RefFrame(
                ticket=ticket,
                block_index=as_int(block[0], "block_index", _U31),
                block_id=as_int(block[1], "block_id", _U31),
                generation=as_int(block[2], "generation", _U64),
            )
        )
    return (*frames, _decode_end(_split(following))) if len(following) else tuple(frames)


def _decode_end(parts: _Parts) -> EndFrame:
    header = _checked(parts, Kind.END, 9)[0]
    top = header[6]
    if not isinstance(top, list) or len(top) > MAX_TOP_LOGPROBS:
        raise corrupt(f"top is not a list of at most {MAX_TOP_LOGPROBS}")
    pairs = []
    for pair in top:
        if not isinstance(pair, list) or len(pair) != 2:
            raise corrupt("top: an entry is not [token id, logprob]")
        pairs.append((as_int(pair[0], "top token", _U31), as_float(pair[1], "top logprob")))
    token = SampledToken(
        token_id=as_int(header[4], "token_id", _U31),
        logprob=None if header[5] is None else as_float(header[5], "logprob"),
        top=tuple(pairs),
    )
    return EndFrame(
        ticket=_ticket(header[2]),
        num_tokens=as_int(header[3], "num_tokens", _U31),
        first_token=token,
        prefill_end_age_s=as_float(header[7], "prefill_end_age_s"),
        total_bytes=as_int(header[8], "total_bytes", _U64),
    )


# Within


def _ticket_fields(ticket: Ticket) -> list[object]:
    attempts = [ticket.prefill_attempt, ticket.decode_attempt]
    worker = [ticket.prefill_worker, ticket.epoch]
    return [ticket.request_id, ticket.choice, *attempts, *worker, ticket.num_tokens, ticket.fingerprint]


def _ticket(fields: object) -> Ticket:
    if not isinstance(fields, list) or len(fields) != 8:
        raise corrupt("ticket is not a list of 8 fields")
    return Ticket(
        request_id=as_text(fields[0], "request_id"),
        choice=as_int(fields[1], "choice", _U31),
        prefill_attempt=as_int(fields[2], "prefill_attempt", _U31),
        decode_attempt=as_int(fields[3], "decode_attempt", _U31),
        prefill_worker=as_text(fields[4], "prefill_worker"),
        epoch=as_int(fields[5], "epoch", _U64),
        num_tokens=as_int(fields[6], "num_tokens", _U31, lowest=1),
        fingerprint=as_text(fields[7], "fingerprint"),
    )


def _offer(fields: object) -> SegmentOffer | None:
    if fields is None:
        return None
    if not isinstance(fields, list) or len(fields) != 2:
        raise corrupt("offer is not [socket name, nonce]")
    nonce = as_bytes(fields[1], "nonce")
    if len(nonce) != NONCE_BYTES:
        raise corrupt(f"nonce: not {NONCE_BYTES} bytes")
    return SegmentOffer(socket_name=as_text(fields[0], "socket_name", MAX_SOCKET_NAME), nonce=nonce)


def _message(header: list[object], *payloads: memoryview) -> bytes:
    packed = msgpack.packb(header)
    if len(packed) > MAX_HEADER_BYTES:
        raise ValueError(f"header: {len(packed)} bytes are more than {MAX_HEADER_BYTES}")
    prefix = _PREFIX.pack(len(packed), xxhash.xxh3_64_intdigest(packed))
    return b"".join((prefix, packed, *payloads))


def _split(data: bytes | memoryview) -> _Parts:
    """Header and payload; the header is a list of at least kind and version, both integers."""
    if len(data) < _PREFIX.size:
        raise corrupt(f"a message of {len(data)} bytes is too short")
    length, digest = _PREFIX.unpack_from(data)
    if not 0 < length <= MAX_HEADER_BYTES or _PREFIX.size + length > len(data):
        raise corrupt(f"header length {length} is out of bounds")
    view = memoryview(data)
    packed, payload = view[_PREFIX.size : _PREFIX.size + length], view[_PREFIX.size + length :]
    if xxhash.xxh3_64_intdigest(packed) != digest:
        raise corrupt("the header's checksum does not match")
    try:
        header = msgpack.unpackb(
            packed,
            raw=False,
            max_str_len=MAX_MESSAGE_TEXT * 4,
            max_bin_len=MAX_LAYOUT_BYTES,
            max_array_len=MAX_BLOCKS_PER_MESSAGE,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise corrupt(f"header is not msgpack: {error}") from error
    if not isinstance(header, list) or len(header) < 2:
        raise corrupt("header is not a list")
    for value, name in zip(header, ("kind", "version"), strict=False):
        as_int(value, name, _U31)
    return header, payload


def _kind(data: bytes) -> Kind:
    return _kind_of(_split(data))


def _kind_of(parts: _Parts) -> Kind:
    value = parts[0][0]
    if value not in list(Kind):
        raise corrupt(f"kind {value} is not known")
    return Kind(value)


def _header(data: bytes, kind: Kind, length: int, *, any_version: bool = False) -> _Parts:
    return _checked(_split(data), kind, length, any_version=any_version)


def _checked(parts: _Parts, kind: Kind, length: int, *, any_version: bool = False) -> _Parts:
    header, payload = parts
    if header[0] != kind:
        raise corrupt(f"kind {header[0]} where {kind.name} was due")
    if header[1] != PROTOCOL_VERSION:
        if any_version:
            return header, payload
        raise HandoffRefused(
            RefusalReason.VERSION_MISMATCH, f"message of KV protocol {header[1]}, this is {PROTOCOL_VERSION}"
        )
    if len(header) != length:
        raise corrupt(f"{kind.name} has {len(header)} fields, not {length}")
    if kind not in (Kind.BLOCKS, Kind.REFS) and len(payload):
        raise corrupt(f"{kind.name} carries {len(payload)} bytes of payload")
    return header, payload
