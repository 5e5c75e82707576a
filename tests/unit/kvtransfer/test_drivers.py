"""The two drivers together, over the in-memory transport: the good path and the ways it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tandem.cluster.types import SampledToken
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.protocol.actions import Outcome
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason

TOKEN = SampledToken(42, -0.5, ((42, -0.5), (7, -1.5)))
P, D = "r/0/p0", "r/0/d0"


def play(pair_class: Any, scene: Callable[[Any], Awaitable[None]], **settings: Any) -> Any:
    async def run() -> Any:
        pair = pair_class(**settings)
        try:
            await scene(pair)
            pair.check()
        finally:
            await pair.close()
        return pair

    return asyncio.run(run())


def same_content(pair: Any, layout: KVLayout, count: int, *, start: int = 0, to: int = 3) -> bool:
    return all(bytes(pair.pulled.read_block(to + i)) == bytes(pair.held.read_block(i)) for i in range(start, count))


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


def test_pull_whose_prefill_never_comes_is_refused(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.submit(pair.ticket())
        await pair.until(lambda: pair.source.counts().awaited == 1)
        pair.clock.advance(5.0)
        pair.source.tick()
        await pair.hear("failed", D, RefusalReason.UNKNOWN_TICKET, True)
        pair.nothing_left()
        assert pair.said.index(("writer_done", D)) < len(pair.said) - 1

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


def test_broken_connection_goes_on_at_the_first_missing_block(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.memory.faults.break_after_blocks = 2
        pair.submit(pair.ticket())
        await pair.hear("kv_ready", D, TOKEN)
        assert (pair.stats.retries, pair.stats.blocks, pair.memory.pulls) == (1, 3, 2)
        assert same_content(pair, layout, 3)

    play(pair_class, scene)


def test_corrupt_block_is_pulled_again(pair_class: Any, layout: KVLayout) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.memory.faults.corrupt_blocks = {1}
        pair.submit(pair.ticket())
        await pair.hear("kv_ready", D, TOKEN)
        assert pair.stats.retries == 1
        assert same_content(pair, layout, 3)

    play(pair_class, scene)


def test_corrupt_block_without_retries_fails(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.memory.faults.corrupt_blocks = {0}
        pair.submit(pair.ticket())
        await pair.hear("failed", D, RefusalReason.CORRUPT, True)
        assert not any(pair.pulled.read_block(3))
        assert pair.source.counts().held == 1  # another decode attempt may still have it

    play(pair_class, scene, max_pull_retries=0)


def test_holder_that_vanished_is_given_up_after_bounded_retries(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.memory.remove("p:1")
        pair.submit(pair.ticket())
        await pair.hear("failed", D, RefusalReason.PEER_LOST, True)
        assert pair.memory.hellos == 2
        assert pair.sink.counts().live == 0

    play(pair_class, scene, max_pull_retries=1)


def test_restarted_holder_is_refused_by_epoch(pair_class: Any) -> None:
    # PEERS: trouble 4, a stale peer after a prefill restart.
    async def scene(pair: Any) -> None:
        pair.memory.add("p:1", pair.make_source(epoch=78))
        pair.submit(pair.ticket())
        await pair.hear("failed", D, RefusalReason.WRONG_EPOCH, True)
        assert pair.memory.pulls == 0

    play(pair_class, scene)


def test_holder_restarted_after_they_met_is_refused_by_epoch(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket())
        await pair.hear("kv_ready", D, TOKEN)
        pair.memory.add("p:1", pair.make_source(epoch=78))
        pair.submit(pair.ticket(decode_attempt=1))
        await pair.hear("failed", "r/0/d1", RefusalReason.WRONG_EPOCH, True)
        assert pair.memory.hellos == 1

    play(pair_class, scene)


def test_pair_that_cannot_work_is_refused_when_it_meets(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.submit(pair.ticket())
        await pair.hear("failed", D, RefusalReason.FINGERPRINT_MISMATCH, False)
        assert pair.memory.pulls == 0

    play(pair_class, scene, decode_fingerprint="other")


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


def test_reused_block_is_refused_never_served(pair_class: Any) -> None:
    # PEERS: trouble 2, another prompt's answer from a stale block reference.
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.generations[1] = 2
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket())
        await pair.hear("failed", D, RefusalReason.WRONG_GENERATION, True)
        assert not any(pair.pulled.read_block(4))

    play(pair_class, scene)


def test_block_reused_while_it_is_copied_is_not_sent(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        read = pair.held.read_block

        def read_and_lose(block_id: int) -> memoryview:
            pair.generations[block_id] = 9
            return read(block_id)

        pair.held.read_block = read_and_lose
        pair.submit(pair.ticket())
        await pair.hear("failed", D, RefusalReason.WRONG_GENERATION, True)
        assert not any(pair.pulled.read_block(3))

    play(pair_class, scene, max_pull_retries=0)


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


def test_lost_confirmation_is_sent_again(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket())
        await pair.hear("kv_ready", D, TOKEN)
        pair.memory.faults.lost_confirms = 2
        pair.sink.on_first_step(D)
        await pair.hear("release", P, Outcome.CONFIRMED)

    play(pair_class, scene)


def test_confirmation_lost_for_good_costs_a_lease(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.source.on_done(P, TOKEN)
        pair.submit(pair.ticket())
        await pair.hear("kv_ready", D, TOKEN)
        pair.memory.faults.lost_confirms = 99
        pair.sink.on_first_step(D)
        await pair.until(lambda: pair.sink.counts().live == 0)
        assert pair.source.counts().held == 1
        pair.clock.advance(10.0)
        pair.source.tick()
        assert ("release", P, Outcome.EXPIRED) in pair.said
        pair.nothing_left()

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


def test_close_in_the_middle_fails_what_runs(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.submit(pair.ticket())
        await pair.until(lambda: pair.source.counts().readers == 1)
        await pair.sink.close()
        await pair.hear("failed", D, RefusalReason.CLOSED, True)
        with pytest.raises(HandoffRefused, match="closed"):
            pair.sink.reserve("q", 0, 0, 1)
        await pair.until(lambda: pair.source.counts().readers == 0)

    play(pair_class, scene)


def test_closing_source_refuses_readers(pair_class: Any) -> None:
    async def scene(pair: Any) -> None:
        pair.prefill()
        pair.submit(pair.ticket())
        await pair.until(lambda: pair.source.counts().readers == 1)
        await pair.source.close()
        await pair.hear("failed", D, RefusalReason.CLOSED, True)
        with pytest.raises(HandoffRefused, match="closed"):
            pair.source.on_submitted("q", 0, 0, 4)

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
