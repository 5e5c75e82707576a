"""What a reader and a holder say to each other in a session, on a stream of the KV service
(`kvtransfer.grpc_transport`): msgpack, every field checked; what does not parse raises `HandoffRefused(CORRUPT)`.

Reader: OPEN (once), KEY, READ. Holder: OPENED (once), KEY, GO (the batch's bytes are on their way), NO (nothing of the
batch will come), END (why the session is over). Bytes of KV are not among them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import msgpack

from .. import wire
from ..layout import KVLayout, KVSplit
from ..ticket import HandoffRefused, RefusalReason, Ticket
from ..wire_fields import as_bytes, as_int, as_text, corrupt

MAX_KEY_BYTES = 64 * 1024
NONCE_BYTES = 16
_U31, _U64 = 2**31 - 1, 2**64 - 1
_MAX_PAIRS = 4096


class Kind(enum.IntEnum):
    """First field of every message."""

    OPEN = 1
    OPENED = 2
    KEY = 3
    READ = 4
    GO = 5
    NO = 6
    END = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """How a worker's ranks can be met; in its Hello."""

    backend: str
    tensor_parallel: int
    pipeline_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """A reader, and what both derive the session's names and proofs from."""

    worker_id: str
    epoch: int
    holder_epoch: int
    session: bytes
    """Random, of `NONCE_BYTES`."""
    secret: bytes
    """The same; from it come the pairs' proofs."""
    backend: str
    split: KVSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The holder's part of the secret. Its ranks meet the reader's."""

    secret: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PairKey:
    """What one rank of a pair tells the other to meet it (`groups.Rendezvous`)."""

    pair: int
    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The reader wants the slots of some tokens of a ticket that it pulls."""

    batch: int
    ticket: Ticket
    first_token: int
    end_token: int
    block_ids: tuple[int, ...]
    """Of the holder, in which they lie."""
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Go:
    """The batch was copied out of its blocks, which were what they should be, and is sent now. Every pair's messages
    come in the order of these.
    """

    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class No:
    """Nothing of the batch is sent."""

    batch: int
    refusal: HandoffRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The session is over."""

    refusal: HandoffRefused


Message = Open | Opened | PairKey | Read | Go | No | End


def encode_offer(offer: Offer) -> bytes:
    """What `decode_offer` reads."""
    packed: bytes = msgpack.packb([offer.backend, offer.tensor_parallel, offer.pipeline_stages])
    return packed


def decode_offer(data: bytes) -> Offer | None:
    """None where the worker makes none. `HandoffRefused` (CORRUPT)."""
    if not data:
        return None
    backend, tensor_parallel, pipeline_stages = _fields(data, 3)
    return Offer(
        backend=as_text(backend, "backend", 32),
        tensor_parallel=as_int(tensor_parallel, "tensor_parallel", 1024, lowest=1),
        pipeline_stages=as_int(pipeline_stages, "pipeline_stages", 1024, lowest=1),
    )


def encode(message: Message) -> bytes:
    """What `decode` reads."""
    values: list[object]
    match message:
        case Open():
            split = message.split
            shape = [split.layout.to_bytes(), split.tensor_parallel, split.pipeline_stages]
            life = [message.worker_id, message.epoch, message.holder_epoch]
            values = [Kind.OPEN, *life, message.session, message.secret, message.backend, *shape]
        case Opened():
            values = [Kind.OPENED, message.secret]
        case PairKey():
            values = [Kind.KEY, message.pair, message.key, message.value]
        case Read():
            ticket = wire.encode_ticket(message.ticket)
            tokens = [message.first_token, message.end_token]
            values = [Kind.READ, message.batch, ticket, *tokens, message.block_ids, message.generations]
        case Go():
            values = [Kind.GO, message.batch]
        case No():
            values = [Kind.NO, message.batch, wire.encode_refused(message.refusal)]
        case End():
            values = [Kind.END, wire.encode_refused(message.refusal)]
    packed: bytes = msgpack.packb(values)
    return packed


def decode(data: bytes) -> Message:
    """Any message of a session. `HandoffRefused` (CORRUPT)."""
    fields = _unpack(data)
    kind = fields[0] if fields else None
    if kind == Kind.OPEN:
        return _open(_counted(fields, 10))
    if kind == Kind.OPENED:
        return Opened(secret=_nonce(_counted(fields, 2)[1], "secret"))
    if kind == Kind.KEY:
        _, pair, key, value = _counted(fields, 4)
        return PairKey(
            pair=as_int(pair, "pair", _MAX_PAIRS), key=as_text(key, "key", 1024), value=as_bytes(value, "value")
        )
    if kind == Kind.READ:
        return _read(_counted(fields, 7))
    if kind == Kind.GO:
        return Go(batch=as_int(_counted(fields, 2)[1], "batch", _U31))
    if kind == Kind.NO:
        _, batch, refused = _counted(fields, 3)
        return No(batch=as_int(batch, "batch", _U31), refusal=wire.decode_refused(as_bytes(refused, "refusal")))
    if kind == Kind.END:
        return End(refusal=wire.decode_refused(as_bytes(_counted(fields, 2)[1], "refusal")))
    raise corrupt(f"kind {kind!r} is not known")


def _open(fields: list[Any]) -> Open:
    _, worker_id, epoch, holder_epoch, session, secret, backend, layout, tensor_parallel, pipeline_stages = fields
    try:
        split = KVSplit(
            layout=KVLayout.from_bytes(as_bytes(layout, "layout")),
            tensor_parallel=as_int(tensor_parallel, "tensor_parallel", 1024, lowest=1),
            pipeline_stages=as_int(pipeline_stages, "pipeline_stages", 1024, lowest=1),
        )
    except ValueError as error:
        raise corrupt(str(error)) from error
    return Open(
        worker_id=as_text(worker_id, "worker_id"),
        epoch=as_int(epoch, "epoch", _U64),
        holder_epoch=as_int(holder_epoch, "holder_epoch", _U64),
        session=_nonce(session, "session"),
        secret=_nonce(secret, "secret"),
        backend=as_text(backend, "backend", 32),
        split=split,
    )


def _read(fields: list[Any]) -> Read:
    _, batch, ticket, first_token, end_token, block_ids, generations = fields
    if not isinstance(block_ids, list) or not isinstance(generations, list) or len(block_ids) != len(generations):
        raise corrupt("block_ids and generations are not two lists of one length")
    return Read(
        batch=as_int(batch, "batch", _U31),
        ticket=wire.decode_ticket(as_bytes(ticket, "ticket")),
        first_token=as_int(first_token, "first_token", _U31),
        end_token=as_int(end_token, "end_token", _U31, lowest=1),
        block_ids=tuple(as_int(block_id, "block_id", _U31) for block_id in block_ids),
        generations=tuple(as_int(generation, "generation", _U64) for generation in generations),
    )


def _nonce(value: object, name: str) -> bytes:
    if not isinstance(value, bytes) or len(value) != NONCE_BYTES:
        raise corrupt(f"{name}: not {NONCE_BYTES} bytes")
    return value


def _unpack(data: bytes) -> list[Any]:
    try:
        fields = msgpack.unpackb(
            data,
            max_array_len=wire.MAX_BLOCKS_PER_MESSAGE,
            max_bin_len=MAX_KEY_BYTES,
            max_str_len=4096,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise corrupt(f"not msgpack: {error}") from error
    if not isinstance(fields, list):
        raise corrupt("not a list")
    return fields


def _counted(fields: list[Any], count: int) -> list[Any]:
    if len(fields) != count:
        raise corrupt(f"{len(fields)} fields, not {count}")
    return fields


def _fields(data: bytes, count: int) -> list[Any]:
    return _counted(_unpack(data), count)


def lost(worker_id: str, why: str) -> HandoffRefused:
    """What a session that broke is to whoever waited for it."""
    return HandoffRefused(RefusalReason.PEER_LOST, f"ranks of {worker_id}: {why}")
