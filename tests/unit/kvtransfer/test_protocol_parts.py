"""The small parts of the protocol: bounded memory, abort floors, credits, tickets, layouts, the store in memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.types import SampledToken
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.memory_store import MemoryKVStore
from tandem.kvtransfer.protocol.credits import CreditLedger
from tandem.kvtransfer.protocol.holder import HandoffHolder
from tandem.kvtransfer.protocol.memory import AbortFloors, BoundedMemory, ChoiceKey
from tandem.kvtransfer.ticket import HandoffRefused, Hello, RefusalReason, check_hello
from tickets import ticket_of

C = ChoiceKey("r", 0)


def test_memory_forgets_the_oldest_and_the_old() -> None:
    memory: BoundedMemory[str, int] = BoundedMemory(limit=2, ttl_s=10.0)
    memory.put("a", 1, 0.0)
    memory.put("b", 2, 1.0)
    memory.put("a", 3, 2.0)
    memory.put("c", 4, 3.0)
    assert (memory.get("a"), memory.get("b"), memory.get("c")) == (3, None, 4)
    memory.expire(12.0)
    assert len(memory) == 1
    assert "c" in memory
    with pytest.raises(ValueError, match="limit"):
        BoundedMemory(limit=0, ttl_s=1.0)


def test_floors_never_sink() -> None:
    floors = AbortFloors(limit=4, ttl_s=10.0)
    assert not floors.covers(C, 0)
    floors.raise_to(C, 2, 0.0)
    floors.raise_to(C, 1, 0.0)
    assert [floors.covers(C, attempt) for attempt in (0, 2, 3)] == [True, True, False]
    assert not floors.covers(ChoiceKey("r", 1), 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("grxea"), st.integers(0, 5), st.integers(1, 9)), max_size=40))
def test_credits_add_up(events: list[tuple[str, int, int]]) -> None:
    ledger = CreditLedger(limit_blocks=10, ttl_s=5.0, max_credits=4)
    now_s, ids = 0.0, dict[str, int]()
    for event, attempt, number in events:
        key = f"r/0/d{attempt}"
        if event == "g" and (credit := ledger.grant(key, C, attempt, number, now_s)) is not None:
            ids[key] = credit
        elif event == "r" and ledger.redeem(ids.get(key, 0), key, now_s) is None:
            assert not ledger.granted(key)
        elif event == "x":
            ledger.drop(key)
        elif event == "e":
            now_s += number
            ledger.expire(now_s)
        elif event == "a":
            ledger.drop_unredeemed(C, attempt)
            assert not any(ledger.granted(f"r/0/d{i}") for i in range(attempt + 1))
        ledger.check_integrity()
        assert ledger.blocks <= ledger.limit_blocks
    for key in ledger.held_keys():
        ledger.drop(key)
    assert (len(ledger), ledger.blocks) == (0, 0)


def test_tombstones_and_waiting_pulls_are_bounded() -> None:
    holder = HandoffHolder(
        worker_id="P",
        epoch=1,
        fingerprint="f",
        block_size=4,
        lease_s=1.0,
        pull_wait_s=1.0,
        max_tickets=3,
        max_tombstones=3,
    )
    for number in range(10):
        holder.abort_attempt(f"r{number}", 0, 0, 0.0)
        ticket = ticket_of(request_id=f"q{number}", prefill_worker="P", epoch=1, fingerprint="f")
        holder.pull(ticket, 0, 0, 0.0)
        holder.abort_ticket(dataclasses.replace(ticket, request_id=f"s{number}"), 0.0)
        holder.check_integrity()
    assert holder.counts().awaited == 3
    assert holder.counts().tombstones == 3


def test_blocks_that_cannot_hold_the_tokens_are_an_error() -> None:
    holder = HandoffHolder(worker_id="P", epoch=1, fingerprint="f", block_size=4, lease_s=1.0, pull_wait_s=1.0)
    holder.prefill_submitted("r", 0, 0, 9, 0.0)
    with pytest.raises(ValueError, match="refs: 0 blocks"):
        holder.blocks_granted("r/0/p0", (), 0)
    assert holder.prefill_done("r/0/p0", SampledToken(1), 0.0) == []


def test_hello_names_what_differs() -> None:
    mine = Hello(protocol_version=1, worker_id="d", epoch=1, fingerprint="f", layout=b"l")
    check_hello(mine, dataclasses.replace(mine, worker_id="p", epoch=2))
    for fields, reason in (
        ({"protocol_version": 2, "fingerprint": "g"}, RefusalReason.VERSION_MISMATCH),
        ({"fingerprint": "g", "layout": b"m"}, RefusalReason.FINGERPRINT_MISMATCH),
        ({"layout": b"m"}, RefusalReason.LAYOUT_MISMATCH),
    ):
        with pytest.raises(HandoffRefused) as refused:
            check_hello(mine, dataclasses.replace(mine, **fields))
        assert refused.value.reason is reason
        assert not refused.value.retryable


def test_layout_round_trip_and_segments() -> None:
    layout = KVLayout(
        block_size=16,
        groups=(
            KVGroup(name="a", num_layers=2, num_kv_heads=3, head_dim=64, dtype="bfloat16"),
            KVGroup(name="scales", num_layers=2, num_kv_heads=3, head_dim=1, dtype="float32"),
        ),
    )
    assert KVLayout.from_bytes(layout.to_bytes()) == layout
    assert layout.block_bytes == 16 * 2 * 2 * 3 * (64 * 2 + 4) == sum(s.length_bytes for s in layout.segments())
    assert [layout.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    for garbage in (b"", b"\x93\x02\x10\x90", b"\x80", layout.to_bytes()[:-3]):
        with pytest.raises(ValueError, match="kv_layout"):
            KVLayout.from_bytes(garbage)


def test_memory_store_refuses_what_does_not_fit() -> None:
    layout = KVLayout(block_size=4, groups=(KVGroup(name="a", num_layers=1, num_kv_heads=1, head_dim=1, dtype="int8"),))
    store = MemoryKVStore(layout, 2)
    store.write_block(1, b"x" * layout.block_bytes)
    assert (bytes(store.read_block(0)), bytes(store.read_block(1))) == (bytes(8), b"x" * 8)
    with pytest.raises(ValueError, match="payload"):
        store.write_block(0, b"x")
    with pytest.raises(ValueError, match="block_id"):
        store.read_block(2)


def test_protocol_loads_neither_torch_nor_ray_nor_grpc() -> None:
    code = (
        "import sys, tandem.kvtransfer.protocol.holder, tandem.kvtransfer.protocol.puller; "
        "print([m for m in ('torch', 'ray', 'grpc', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"
