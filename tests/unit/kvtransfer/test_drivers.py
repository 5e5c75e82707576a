"""The two drivers together, over the in-memory transport: the good path, and what ends it on purpose."""

from __future__ import annotations

from typing import Any

import pytest
from driver_scenes import TOKEN, D, P, play, same_content
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.protocol.actions import Outcome
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason


def test_pull_behind_the_watermark_then_confirm(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.submit(pair.ticket())
        pair.source.on_advanced(P, 5)  # one full block
        await pair.until(lambda: pair.sink._sequences[D].received_blocks == 1)
        pair.source.on_advanced(P, 8)
        await pair.until(lambda: pair.sink._sequences[D].received_blocks == 2)
        pair.clock.advance(1.0)
        assert pair.source.counts().by_state() == {"computing": 1}
        assert pair.sink.counts().by_state() == {"pulling": 1}
        pair.source.on_done(P, TOKEN)
        await pair.hear("kv_ready", D, TOKEN)
        assert pair.source.counts().by_state() == {"held": 1}
        assert pair.sink.counts().by_state() == {"ready": 1}
        assert dict(pair.sink.pulls_total) == {pair.stats.transport: 1} == {"memory": 1}
        assert same_content(pair, layout, 3)
        assert pair.stats.bytes == 3 * layout.block_bytes
        assert pair.stats.transfer_s == 1.0
        assert pair.stats.exposed_transfer_s == 0.0
        assert pair.source.counts().leases == 1
        pair.sink.on_first_step(D)
        await pair.hear("release", P, Outcome.CONFIRMED)
        await pair.until(lambda: pair.sink.counts().live == 0)
        pair.nothing_left()
        assert pair.source.counts().by_state() == pair.sink.counts().by_state() == {}
        assert not pair.sink.failures_total

    pair = play(pair_class, scene)
    assert [what[0] for what in pair.said] == ["kv_ready", "release"]


def test_credits_and_failures_are_counted_by_name(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.sink.reserve("other", 0, 0, 1)
        credit = pair.sink.reserve("r", 0, 0, 3)
        pair.sink.submit(pair.ticket(), pair.peer, credit, 100.0)
        assert pair.sink.counts().by_state() == {"credited": 1, "waiting_blocks": 1}
        pair.clock.advance(101.0)
        pair.sink.tick()
        assert dict(pair.sink.failures_total) == {"deadline": 1}
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.clock.advance(11.0)
        pair.source.tick()
        assert pair.source.expired_total == 1

    play(pair_class, scene)


def test_pull_before_its_prefill_waits(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        pair.submit(pair.ticket())
        await pair.until(lambda: pair.source.counts().awaited == 1)
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        await pair.hear("kv_ready", D, TOKEN)
        assert same_content(pair, layout, 3)

    play(pair_class, scene)


def test_prefix_hit_is_not_transferred(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket(), cached_tokens=8)
        await pair.hear("kv_ready", D, TOKEN)
        assert pair.stats.blocks == 1
        assert same_content(pair, layout, 3, start=2)
        assert not any(pair.pulled.read_block(3))

    play(pair_class, scene)


def test_whole_prefix_hit_pulls_only_the_first_token(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill(num_tokens=8)
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket(num_tokens=8), cached_tokens=8)
        await pair.hear("kv_ready", D, TOKEN)
        assert (pair.stats.bytes, pair.stats.transfer_s) == (0, 0.0)

    play(pair_class, scene)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9])
def test_partial_last_block_is_whole(pair_class: Any, layout: KVLayout, num_tokens: int) -> None:
    # PEERS: trouble 6, "partial last block off by one".
    async def scene(pair: Any) -> None:
        refs = pair.prefill(num_tokens=num_tokens)
        pair.submit(pair.ticket(num_tokens=num_tokens))
        pair.source.on_advanced(P, num_tokens)
        pair.source.on_done(P, TOKEN)
        await pair.hear("kv_ready", D, TOKEN)
        assert pair.stats.blocks == len(refs)
        assert same_content(pair, layout, len(refs))

    play(pair_class, scene)


def test_hello_once_for_many_pulls(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        for attempt in range(3):
            pair.prefill(attempt=attempt)
            pair.source.on_done(f"r/0/p{attempt}", TOKEN)
            pair.submit(pair.ticket(prefill_attempt=attempt, decode_attempt=attempt))
        for attempt in range(3):
            await pair.hear("kv_ready", f"r/0/d{attempt}", TOKEN)
        assert pair.memory.hellos == 1

    play(pair_class, scene)


def test_abort_while_pulling_frees_both_sides(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.submit(pair.ticket())
        pair.source.on_advanced(P, 4)
        await pair.until(lambda: pair.sink._sequences[D].received_blocks == 1)
        pair.sink.abort("r", 0, 0)
        assert ("writer_done", D) not in pair.said  # the writer still runs
        await pair.hear("writer_done", D)
        await pair.hear("abort_prefill", P)
        pair.nothing_left()
        assert not [what for what in pair.said if what[0] in ("failed", "release")]

    play(pair_class, scene)


def test_router_abort_at_the_holder_stops_the_reader(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.submit(pair.ticket())
        await pair.until(lambda: pair.source.counts().readers == 1)
        pair.source.abort("r", 0, 0)
        assert ("abort_prefill", P) in pair.said
        await pair.hear("failed", D, RefusalReason.ABORTED, True)
        pair.nothing_left()

    play(pair_class, scene)


def test_abort_that_overtakes_is_remembered_on_both_sides(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.source.abort("r", 0, 1)
        pair.sink.abort("r", 0, 1)
        for attempt in (0, 1):
            with pytest.raises(HandoffRefused) as refused:
                pair.source.on_submitted("r", 0, attempt, 10)
            assert refused.value.reason is RefusalReason.ABORTED
            with pytest.raises(HandoffRefused) as refused:
                pair.sink.reserve("r", 0, attempt, 3)
            assert refused.value.reason is RefusalReason.ABORTED
        pair.source.on_submitted("r", 0, 2, 10)
        pair.sink.reserve("r", 0, 2, 3)

    play(pair_class, scene)


def test_second_decode_attempt_takes_over(pair_class: Any, layout: KVLayout) -> None:
    # DESIGN, life of a request 7: a decode worker that dies before its first step costs no second prefill.
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket())
        await pair.hear("kv_ready", D, TOKEN)
        pair.submit(pair.ticket(decode_attempt=1), first=8)
        await pair.hear("kv_ready", "r/0/d1", TOKEN)
        pair.sink.on_first_step(D)  # late, from the older attempt: must not release
        await pair.until(lambda: pair.sink.counts().running == 0)
        assert pair.source.counts().held == 1
        pair.sink.on_first_step("r/0/d1")
        await pair.hear("release", P, Outcome.CONFIRMED)
        assert same_content(pair, layout, 3, to=8)

    play(pair_class, scene)


def test_first_token_that_ends_the_choice_refuses_the_pull(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.submit(pair.ticket())
        await pair.until(lambda: pair.source.counts().readers == 1)
        pair.source.on_failed(P, RefusalReason.FINISHED)
        await pair.hear("failed", D, RefusalReason.FINISHED, False)
        pair.nothing_left()

    play(pair_class, scene)


def test_deadline_while_prefill_never_ends(pair_class: Any) -> None:
    # PEERS: trouble 3, one leg fails, the other hangs for minutes.
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.submit(pair.ticket(), timeout_s=7.0)
        await pair.until(lambda: pair.source.counts().readers == 1)
        pair.clock.advance(7.0)
        pair.sink.tick()
        await pair.hear("failed", D, RefusalReason.DEADLINE, False)
        await pair.hear("abort_prefill", P)
        pair.nothing_left()

    play(pair_class, scene)


def test_preempted_prefill_serves_the_new_blocks(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        refs = pair.prefill(num_tokens=8)
        pair.submit(pair.ticket(num_tokens=8))
        pair.source.on_advanced(P, 4)
        await pair.until(lambda: pair.sink._sequences[D].received_blocks == 1)
        pair.source.on_preempted(P)
        pair.generations[refs[1].block_id] = 5
        again = (type(refs[0])(9, 1), type(refs[0])(10, 1))
        pair.held.write_block(10, b"\x33" * layout.block_bytes)
        pair.source.on_blocks(P, again, 0)
        pair.source.on_done(P, TOKEN)
        await pair.hear("kv_ready", D, TOKEN)
        assert bytes(pair.pulled.read_block(4)) == b"\x33" * layout.block_bytes

    play(pair_class, scene)


def test_checksum_can_be_switched_off(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket())
        await pair.hear("kv_ready", D, TOKEN)
        assert same_content(pair, layout, 3)

    play(pair_class, scene, checksum=False)


def test_peer_must_be_the_tickets(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        credit = pair.sink.reserve("r", 0, 0, 3)
        other = type(pair.peer)("p", 1, "p:1")
        with pytest.raises(HandoffRefused, match="invalid"):
            pair.sink.submit(pair.ticket(), other, credit, 10.0)

    play(pair_class, scene)


def test_local_prefill_redeems_its_credit(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        credit = pair.sink.reserve("r", 0, 0, 3)
        assert pair.sink.counts().credited_blocks == 3
        assert pair.sink.submit_local("r", 0, 0, credit) == D
        pair.nothing_left()
        with pytest.raises(HandoffRefused, match="expired"):
            pair.sink.submit_local("r", 0, 0, credit)

    play(pair_class, scene)
