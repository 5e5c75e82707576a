"""KV traffic without requests, at full rate, beside an engine that steps: one ticket's KV, pulled over and over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ...kvtransfer.store import KVStore
from ...kvtransfer.ticket import PROTOCOL_VERSION, HandoffRefused, Hello, Peer, RefusalReason, Ticket
from ...kvtransfer.transport import EndFrame, KVTransport, PullRequest, WrittenBlocks
from ...kvtransfer.wire import check_blocks, verify_copies

CALL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Which KV is pulled, how and for how long. Plain values: it crosses a pipe as JSON."""

    request_id: str
    """A held prefill of the peer, its attempt 1."""
    num_tokens: int
    fingerprint: str
    peer: tuple[str, int, str]
    """`Peer`: id, epoch, address."""
    transport: str
    until_s: float
    """On the machine's monotonic clock."""
    first_attempt: int
    """Counts up over all traffic with one ticket: the newest attempt is served."""


async def pull_over_and_over(
    traffic: Traffic, transport: KVTransport, store: KVStore, block_ids: Sequence[int]
) -> dict[str, Any]:
    """Pulls the KV into blocks that nobody else has until the time is over: bytes, pulls and seconds.

    `transport` is a worker's of the kind `auto`: from a peer that it has met it pulls mapped memory, from one that it
    has not over gRPC.
    """
    worker_id, epoch, address = traffic.peer
    peer = Peer(f"{worker_id} over {traffic.transport}", epoch, address)
    mine = Hello(
        protocol_version=PROTOCOL_VERSION,
        worker_id="traffic",
        epoch=1,
        fingerprint=traffic.fingerprint,
        layout=store.layout.to_bytes(),
    )
    moved_bytes = pulls = 0
    begin_s = time.monotonic()
    if traffic.transport == "mapped":
        await transport.hello(peer, mine, timeout_s=CALL_S)
    while time.monotonic() < traffic.until_s:
        moved_bytes += await _pull(traffic, transport, peer, store, block_ids, traffic.first_attempt + pulls)
        pulls += 1
    return {"bytes": moved_bytes, "pulls": pulls, "seconds": time.monotonic() - begin_s}


async def _pull(
    traffic: Traffic,
    transport: KVTransport,
    peer: Peer,
    store: KVStore,
    block_ids: Sequence[int],
    attempt: int,
) -> int:
    """Bytes of one pull. `HandoffRefused` where it failed, or came another way than it should."""
    into = tuple(block_ids[: store.layout.blocks_for(traffic.num_tokens)])
    ticket = Ticket(
        request_id=traffic.request_id,
        choice=0,
        prefill_attempt=1,
        decode_attempt=attempt,
        prefill_worker=traffic.peer[0],
        epoch=peer.epoch,
        num_tokens=traffic.num_tokens,
        fingerprint=traffic.fingerprint,
    )
    end = await pull_once(transport, peer, ticket, store, into)
    if end.transport != traffic.transport:
        text = f"KV came over {end.transport}, not {traffic.transport}"
        raise HandoffRefused(RefusalReason.TRANSPORT_MISMATCH, text)
    return len(into) * store.layout.block_bytes


async def pull_once(
    transport: KVTransport,
    peer: Peer,
    ticket: Ticket,
    store: KVStore,
    block_ids: Sequence[int],
    *,
    checksum: bool = True,
) -> EndFrame:
    """All blocks of a ticket into `block_ids` of `store`, checked and written as a worker does. `HandoffRefused`."""
    into = tuple(block_ids)
    request = PullRequest(ticket=ticket, first_block=0, checksum=checksum, into=into)
    written, end = 0, None
    async with aclosing(transport.pull(peer, request, timeout_s=CALL_S)) as frames:
        async for came in frames:
            if isinstance(came, EndFrame):
                end = came
                break
            if isinstance(came, WrittenBlocks):
                written += len(came.block_ids)
                continue
            check_blocks(came, store.layout.block_bytes, checksum=checksum)
            store.write_blocks([into[frame.block_index] for frame in came], [frame.payload for frame in came])
            verify_copies(came)
            written += len(came)
    if end is None or written != len(into):
        raise HandoffRefused(RefusalReason.CORRUPT, f"{written} blocks came, not {len(into)}")
    return end
