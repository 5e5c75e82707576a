"""The two drivers together, where connections break, bytes are wrong, or one of them is gone."""

from __future__ import annotations

from typing import Any

import pytest
from driver_scenes import TOKEN, D, P, play, same_content
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.protocol.actions import Outcome
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason


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
