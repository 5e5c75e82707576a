"""Both sides of the handoff, two engines' memories, a router, and a network that loses, reorders and duplicates.

What must hold (DESIGN, "What must always hold"), crashes included: no request's block ever takes another request's KV;
the engine frees a block only when nobody reads or writes it, and once; only the current attempt's confirmation
releases; and when everything has come to rest, no ticket, lease, credit, reader, writer or block is left anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from handoff_sides import (
    LEASE_S,
    NUM_BLOCKS,
    TIMEOUT_S,
    WAIT_S,
    DecodeSide,
    PrefillSide,
    Request,
)
from handoff_world import World
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tandem.kvtransfer.ticket import RefusalReason


class Handoff(World):
    @initialize()
    def start(self) -> None:
        self.begin()

    # The router

    @precondition(lambda self: len(self.requests) < 12)
    @rule(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), worker=st.sampled_from("AB"))
    def new_requests(self, sizes: list[int], worker: str) -> None:
        for tokens in sizes:
            request = Request(f"r{len(self.requests)}", tokens)
            self.requests[request.name] = request
            self.network.append(("reserve", worker, request.name, request.decode_attempt))
            self.send_prefill(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), worker=st.sampled_from("AB"), again=st.booleans())
    def retry(self, data: st.DataObject, worker: str, again: bool) -> None:
        """Other decode attempts, after a new prefill or on the one that is held."""
        for name in data.draw(st.lists(st.sampled_from(sorted(self.requests)), min_size=1, max_size=4, unique=True)):
            request = self.requests[name]
            request.decode_attempt += 1
            if again:
                request.prefill_attempt += 1
                self.send_prefill(request)
            self.network.append(("reserve", worker, name, request.decode_attempt))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        self.network.append(("abort_prefill", request.name, request.prefill_attempt))
        for worker in "AB":
            self.network.append(("abort_decode", worker, request.name, request.decode_attempt))

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @precondition(lambda self: self.p.streams)
    @rule(data=st.data())
    def reader_breaks(self, data: st.DataObject) -> None:
        self.end_reader(data.draw(st.sampled_from(sorted(self.p.streams))))

    @precondition(lambda self: any(d.writers for d in self.d.values()))
    @rule(data=st.data())
    def writer_ends(self, data: st.DataObject) -> None:
        """A cancelled writer stops; any other loses its connection."""
        d = next(d for d in self.d.values() if d.writers)
        self.end_writer(d, data.draw(st.sampled_from(sorted(d.writers))), RefusalReason.PEER_LOST)

    # Everybody at work, in any order

    @rule(seed=st.integers(0, 2**32), count=st.sampled_from([10, 50, 200]))
    def work(self, seed: int, count: int) -> None:
        """`count` things that happen by themselves; the order is drawn from a seed, which reaches deep at once."""
        order = random.Random(seed)
        for _ in range(count):
            pick = order.randrange(10_000)
            ready: list[Callable[[int], None]] = [self.decode_engine_admits, self.first_step]
            ready += [self.deliver] * (2 * bool(self.network))
            ready += [self.misroute] * any(message[0] == "frame" for message in self.network)
            ready += [self.prefill_engine] * any(not s.held for s in self.p.sequences.values())
            ready += [self.holder_hears] * bool(self.p.events)
            ready += [self.prefill_engine_obeys] * bool(self.p.commands)
            ready += [self.reader_reads] * (2 * bool(self.p.streams))
            ready += [self.confirmation_ends] * any(d.confirming for d in self.d.values())
            ready += [self.puller_hears] * any(d.grants for d in self.d.values())
            ready[pick % len(ready)](pick // len(ready))
            self.integrity()

    # Time and death

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 3.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.tick()

    @precondition(lambda self: self.deaths < 2)
    @rule(who=st.sampled_from("PAB"))
    def worker_dies(self, who: str) -> None:
        """Its memory starts again with the same ids and generations; messages that it sent are still under way."""
        self.deaths += 1
        if who == "P":
            self.p = PrefillSide(next(self.epochs))
        else:
            self.d[who] = DecodeSide(who, next(self.epochs))

    # What must hold

    @invariant()
    def integrity(self) -> None:
        if not hasattr(self, "p"):
            return
        self.p.holder.check_integrity()
        for d in self.d.values():
            d.puller.check_integrity()
            live = d.puller.counts()
            assert live.pulling + live.cancelling == len(d.writers)

    def teardown(self) -> None:
        """Everything still under way is lost. Time alone must bring both sides to rest."""
        if not hasattr(self, "p"):
            return
        self.network.clear()
        for _ in range(4):
            self.settle()
            self.network.clear()
            self.now_s += TIMEOUT_S + LEASE_S + WAIT_S
            self.tick()
        self.settle()
        assert self.p.holder.counts().live == 0, self.p.holder.counts()
        assert self.p.holder.counts().leases == 0
        assert not self.p.sequences
        assert len(self.p.memory.free) == NUM_BLOCKS
        for d in self.d.values():
            assert d.puller.counts().live == 0, d.puller.counts()
            assert not d.sequences
            assert len(d.memory.free) == NUM_BLOCKS

    def settle(self) -> None:
        """What runs by itself runs to its end: engines, readers, cancelled writers, confirmations."""
        while self.p.events:
            self.holder_hears()
        while self.p.commands:
            self.prefill_engine_obeys()
        for key in sorted(self.p.sequences):
            sequence = self.p.sequences[key]
            if not sequence.held:  # its deadline passes
                self.do_p(self.p.holder.abort_attempt(sequence.request, 0, int(key.rpartition("p")[2]), self.now_s))
        while self.p.commands:
            self.prefill_engine_obeys()
        for reader_id in sorted(self.p.streams):
            for _ in range(9):
                if reader_id in self.p.streams:
                    self.read(reader_id)
        for d in self.d.values():
            while d.grants:
                self.hear_grant(d)
            for key, (_, cancelled) in list(d.writers.items()):
                if cancelled:
                    self.end_writer(d, key, RefusalReason.CLOSED)
            for _ in range(4):
                self.first_step("AB".index(d.name))
            while d.confirming:
                self.do_d(d, d.puller.confirm_ended(d.confirming.popleft(), self.now_s))


TestHandoff = Handoff.TestCase
