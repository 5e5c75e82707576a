"""KV traffic without requests, at full rate, beside an engine that steps: one ticket's KV, pulled over and over."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ...kvtransfer.grpc_transport import GrpcKVTransport
from ...kvtransfer.layout import KVLayout
from ...kvtransfer.mapped.transport import MappedKVTransport
from ...kvtransfer.memory_store import MemoryKVStore
from ...kvtransfer.ticket import PROTOCOL_VERSION, Hello, Peer, Ticket
from ...kvtransfer.transport import EndFrame, KVTransport, PullRequest
from ...kvtransfer.wire import check_block

CALL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Which KV is pulled, how and for how long. Plain values: it crosses a pipe as JSON."""

    request_id: str
    """A held prefill of the peer, its attempt 1."""
    num_tokens: int
    fingerprint: str
    layout: str
    """Of the peer's KV, in hex."""
    peer: tuple[str, int, str]
    """`Peer`: id, epoch, address."""
    transport: str
    until_s: float
    """On the machine's monotonic clock."""
    first_attempt: int
    """Counts up over all traffic with one ticket: the newest attempt is served."""


async def pull_over_and_over(traffic: Traffic) -> dict[str, Any]:
    """Pulls the KV into memory of its own until the time is over: bytes, pulls and seconds."""
    layout, peer = KVLayout.from_bytes(bytes.fromhex(traffic.layout)), Peer(*traffic.peer)
    store = MemoryKVStore(layout, layout.blocks_for(traffic.num_tokens))
    transport: KVTransport = GrpcKVTransport(block_bytes=layout.block_bytes)
    if traffic.transport == "mapped":
        transport = MappedKVTransport(GrpcKVTransport(block_bytes=layout.block_bytes), layout, required=True)
    mine = Hello(
        protocol_version=PROTOCOL_VERSION,
        worker_id="traffic",
        epoch=1,
        fingerprint=traffic.fingerprint,
        layout=layout.to_bytes(),
    )
    moved_bytes = pulls = 0
    begin_s = time.monotonic()
    try:
        await transport.hello(peer, mine, timeout_s=CALL_S)
        while time.monotonic() < traffic.until_s:
            moved_bytes += await _pull(traffic, transport, peer, store, traffic.first_attempt + pulls)
            pulls += 1
    finally:
        await transport.close()
    return {"bytes": moved_bytes, "pulls": pulls, "seconds": time.monotonic() - begin_s}


async def _pull(traffic: Traffic, transport: KVTransport, peer: Peer, store: MemoryKVStore, attempt: int) -> int:
    ticket = Ticket(
        request_id=traffic.request_id,
        choice=0,
        prefill_attempt=1,
        decode_attempt=attempt,
        prefill_worker=peer.worker_id,
        epoch=peer.epoch,
        num_tokens=traffic.num_tokens,
        fingerprint=traffic.fingerprint,
    )
    moved_bytes = 0
    async with aclosing(transport.pull(peer, PullRequest(ticket=ticket, first_block=0), timeout_s=CALL_S)) as frames:
        async for came in frames:
            if isinstance(came, EndFrame):
                break
            for frame in came:
                check_block(frame, store.layout.block_bytes)
                store.write_block(frame.block_index, frame.payload)
            for verify in dict.fromkeys(frame.verify for frame in came):
                if verify is not None:
                    verify()
            moved_bytes += store.layout.block_bytes * len(came)
    return moved_bytes
