"""What a worker and its mover tell each other, as msgpack; KV messages inside are `kvtransfer.wire`'s. Both ends are
one installation, started together: nothing here has versions, and what does not parse is a defect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgpack

from ...cluster.auth import MemberCredentials, MemberTLS
from ...cluster.tls import Identity
from .. import wire
from ..ticket import HandoffRefused, Peer, RefusalReason
from ..transport import EndFrame, PullRequest, RefFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """`attach`: the KV memory, whose descriptor lies in the other socket, and how its blocks are pulled."""

    layout: bytes
    nonce: bytes
    transport: str
    """`auto`, `grpc` or `mapped`, as `WorkerConfig.transport`."""
    credentials: MemberCredentials


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`hello`, `confirm` and `abort` of a peer: a KV message, and how long it may take there."""

    peer: Peer
    message: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """`pull`: blocks of a peer, into this worker's memory."""

    peer: Peer
    request: PullRequest
    block_ids: tuple[int, ...]
    """Where they go, from `request.first_block` on: all that may be written."""
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """An item of `pull`: blocks that were written since the last one. Times are the machine's monotonic clock."""

    first_block: int
    count: int
    arrived_s: float
    """When the first of them was here."""
    written_s: float
    """When the last of them was written."""
    end: EndFrame | None
    """The pull's end came, and was the last."""


def encode_attach(attach: Attach) -> bytes:
    """The body of `attach`."""
    tls = attach.credentials.tls
    files = None if tls is None else [tls.identity.cert, tls.identity.key, tls.ca, tls.server_name]
    return _pack([attach.layout, attach.nonce, attach.transport, attach.credentials.token, files])


def decode_attach(body: bytes) -> Attach:
    """Inverse of `encode_attach`."""
    layout, nonce, transport, token, files = msgpack.unpackb(body)
    tls = None
    if files is not None:
        cert, key, ca, server_name = files
        tls = MemberTLS(identity=Identity(cert, key), ca=ca, server_name=server_name)
    return Attach(layout=layout, nonce=nonce, transport=transport, credentials=MemberCredentials(token=token, tls=tls))


def encode_call(peer: Peer, message: bytes, timeout_s: float) -> bytes:
    """The body of `hello`, `confirm` and `abort`."""
    return _pack([_peer(peer), message, timeout_s])


def decode_call(body: bytes) -> Call:
    """Inverse of `encode_call`."""
    peer, message, timeout_s = msgpack.unpackb(body)
    return Call(peer=Peer(*peer), message=message, timeout_s=timeout_s)


def encode_pull(pull: Pull) -> bytes:
    """The body of `pull`."""
    return _pack([_peer(pull.peer), wire.encode_pull(pull.request), list(pull.block_ids), pull.timeout_s])


def decode_pull(body: bytes) -> Pull:
    """Inverse of `encode_pull`."""
    peer, request, block_ids, timeout_s = msgpack.unpackb(body)
    return Pull(peer=Peer(*peer), request=wire.decode_pull(request), block_ids=tuple(block_ids), timeout_s=timeout_s)


def encode_run(message: bytes, now_s: float) -> bytes:
    """An item of the worker's `pull`: REFS, blocks that may be read now; with the last of them, or alone, END. `now_s`:
    on the machine's monotonic clock.
    """
    return _pack([message, now_s])


def decode_run(item: bytes, now_s: float) -> tuple[list[RefFrame], EndFrame | None]:
    """Inverse of `encode_run`; an end has aged meanwhile."""
    message, said_s = msgpack.unpackb(item)
    frames = wire.decode_frames(message)
    refs = [frame for frame in frames if isinstance(frame, RefFrame)]
    if not isinstance(end := frames[-1], EndFrame):
        return refs, None
    return refs, replace(end, prefill_end_age_s=end.prefill_end_age_s + max(0.0, now_s - said_s))


def encode_progress(progress: Progress) -> bytes:
    """An item of `pull`."""
    end = progress.end
    last = None if end is None else [wire.encode_end(end), end.transport]
    return _pack([progress.first_block, progress.count, progress.arrived_s, progress.written_s, last])


def decode_progress(item: bytes) -> Progress:
    """Inverse of `encode_progress`."""
    first_block, count, arrived_s, written_s, last = msgpack.unpackb(item)
    end = None
    if last is not None:
        message, transport = last
        (frame,) = wire.decode_frames(message)
        if not isinstance(frame, EndFrame):
            raise HandoffRefused(RefusalReason.CORRUPT, "another frame where the end was due")
        end = replace(frame, transport=transport)
    return Progress(first_block=first_block, count=count, arrived_s=arrived_s, written_s=written_s, end=end)


def _peer(peer: Peer) -> list[object]:
    return [peer.worker_id, peer.epoch, peer.kv_address]


def _pack(fields: list[object]) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed
