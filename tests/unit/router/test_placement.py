"""Rankings of workers: what the router prefers, and that equal input gives equal output."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem.router.placement import (
    WorkerView,
    pair,
    predicted_tpot_s,
    predicted_ttft_s,
    rank_decode,
    rank_mixed,
    rank_prefill,
)
from views import VIEW, view


def names(views: tuple[WorkerView, ...]) -> list[str]:
    return [v.worker_id for v in views]


def test_only_workers_whose_kv_fits_somewhere_are_paired() -> None:
    prefill = (view("p0"), view("p1", fingerprint="g"), view("p2", fingerprint="h"))
    decode = (view("d0", fingerprint="h"), view("d1"), view("d2", fingerprint="x"))
    left, right = pair(prefill, decode)
    assert (names(left), names(right)) == (["p0", "p2"], ["d0", "d1"])
    assert pair(prefill, ()) == ((), ())


def test_prefill_goes_where_the_first_token_comes_first() -> None:
    busy, idle = view("a", queued_prefill_tokens=1000), view("b")
    assert names(rank_prefill((busy, idle), 100, {})) == ["b", "a"]
    # A cached prefix is worth a queue, up to what it saves.
    assert names(rank_prefill((busy, idle), 1500, {"a": 1400})) == ["a", "b"]
    assert names(rank_prefill((busy, idle), 100, {"a": 96})) == ["b", "a"]
    assert predicted_ttft_s(idle, 100) < predicted_ttft_s(busy, 100)


def test_a_faster_worker_may_have_the_longer_queue() -> None:
    slow = view("slow", step_time=VIEW.step_time._replace(prefill_token_s=1e-2))
    fast = view("fast", queued_prefill_tokens=500)
    assert names(rank_prefill((slow, fast), 100, {})) == ["fast", "slow"]


def test_a_full_prefill_queue_comes_last_but_is_not_left_out() -> None:
    full = view("a", waiting=8)
    assert names(rank_prefill((full, view("b", queued_prefill_tokens=5000)), 10, {})) == ["b", "a"]
    assert names(rank_prefill((full,), 10, {})) == ["a"]


def test_decode_prefers_credit_then_blocks_then_speed() -> None:
    no_credit = view("a", credited_blocks=100)
    no_blocks = view("b", available_blocks=2)
    batch = view("c", running=3, context_tokens=1000)
    idle = view("d", running=1)
    assert names(rank_decode((no_credit, no_blocks, batch, idle), 100)) == ["d", "c", "b", "a"]
    assert predicted_tpot_s(batch, 100) > predicted_tpot_s(idle, 100)


def test_a_worker_that_does_both_is_chosen_by_its_queue_and_its_batch() -> None:
    queue, batch, idle = view("a", queued_prefill_tokens=4000), view("b", running=3), view("c")
    assert names(rank_mixed((queue, batch, idle), 100, {})) == ["c", "b", "a"]
    # A cached prefix is worth a batch, up to what it saves.
    assert names(rank_mixed((view("b", running=1), idle), 3000, {"b": 2900})) == ["b", "c"]
    assert names(rank_mixed((view("d", credited_blocks=100), view("e", available_blocks=2), queue), 100, {})) == [
        "a",
        "e",
        "d",
    ]


def test_blocks_promised_to_others_are_not_free() -> None:
    promised = view("a", available_blocks=10, credited_blocks=8)
    room = view("b", available_blocks=10, running=3)
    assert names(rank_decode((promised, room), 100)) == ["b", "a"]


def test_a_batch_never_counts_more_rows_than_it_may_have() -> None:
    assert predicted_tpot_s(view("a", running=4, waiting=100), 0) == predicted_tpot_s(view("a", running=3), 0)


@given(st.permutations([view(f"w{i}", running=i % 2) for i in range(6)]))
def test_the_order_does_not_depend_on_the_order_of_the_question(views: list[WorkerView]) -> None:
    assert names(rank_decode(views, 10)) == ["w0", "w2", "w4", "w1", "w3", "w5"]
    assert names(rank_prefill(views, 10, {})) == [f"w{i}" for i in range(6)]
