"""Both sides of the handoff, two engines' memories, a router, and a network that loses, reorders and duplicates.

What must hold (DESIGN, "What must always hold"), crashes included: no request's block ever takes another request's KV;
the engine frees a block only when nobody reads or writes it, and once; only the current attempt's confirmation
releases; and when everything has come to rest, no ticket, lease, credit, reader, writer or block is left anywhere.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.protocol import actions as act
from tandem.kvtransfer.protocol.credits import CreditLedger
from tandem.kvtransfer.protocol.holder import HandoffHolder
from tandem.kvtransfer.protocol.puller import HandoffPuller
from tandem.kvtransfer.ticket import RefusalReason, Ticket

BLOCK_SIZE = 4
NUM_BLOCKS = 7
TOKEN = SampledToken(1)
LEASE_S, WAIT_S, CREDIT_TTL_S, TIMEOUT_S = 10.0, 5.0, 4.0, 20.0

Content = tuple[str, int] | None
"""Whose KV a block of memory holds: (request, index of the block)."""


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


class Memory:
    """Blocks with generations and content, as an engine's pool hands them out."""

    def __init__(self) -> None:
        self.free = list(range(NUM_BLOCKS))
        self.generation = dict.fromkeys(range(NUM_BLOCKS), 0)
        self.content: dict[int, Content] = dict.fromkeys(range(NUM_BLOCKS))

    def take(self, count: int) -> tuple[BlockRef, ...] | None:
        if len(self.free) < count:
            return None
        ids = [self.free.pop(0) for _ in range(count)]
        for block in ids:
            self.generation[block] += 1
        return tuple(BlockRef(block, self.generation[block]) for block in ids)

    def give_back(self, refs: tuple[BlockRef, ...]) -> None:
        for ref in refs:
            assert ref.block_id not in self.free, "freed twice"
            assert self.generation[ref.block_id] == ref.generation
            self.free.append(ref.block_id)


@dataclass
class Prefilling:
    request: str
    tokens: int
    computed: int = 0
    held: bool = False
    blocks: tuple[BlockRef, ...] = ()


@dataclass
class Stream:
    """An open pull as the holder's transport sees it."""

    ticket: Ticket
    to: tuple[str, int]
    """Decode worker and its life."""
    pull_index: int
    index: int


@dataclass
class PrefillSide:
    epoch: int
    memory: Memory = field(default_factory=Memory)
    sequences: dict[str, Prefilling] = field(default_factory=dict)
    events: deque[tuple[Any, ...]] = field(default_factory=deque)
    """What the engine did and the holder has not heard: they run in different threads."""
    commands: deque[tuple[str, str]] = field(default_factory=deque)
    streams: dict[int, Stream] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    """Keys that `ReleaseBlocks` or `AbortPrefill` came for."""
    newest_attempt: dict[str, int] = field(default_factory=dict)
    aborted: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.holder = HandoffHolder(
            worker_id="P",
            epoch=self.epoch,
            fingerprint="fp",
            block_size=BLOCK_SIZE,
            lease_s=LEASE_S,
            pull_wait_s=WAIT_S,
            max_tickets=4,
            max_tombstones=64,
        )

    def free(self, key: str) -> None:
        sequence = self.sequences.pop(key, None)
        if sequence is not None:
            self.memory.give_back(sequence.blocks)


@dataclass
class Decoding:
    ticket: Ticket
    blocks: tuple[BlockRef, ...] = ()
    cached: int = 0
    aborted: bool = False
    writer_done: bool = False
    ready: bool = False


@dataclass
class DecodeSide:
    name: str
    epoch: int
    memory: Memory = field(default_factory=Memory)
    sequences: dict[str, Decoding] = field(default_factory=dict)
    grants: deque[str] = field(default_factory=deque)
    confirming: deque[str] = field(default_factory=deque)
    aborted: dict[str, int] = field(default_factory=dict)
    writers: dict[str, tuple[int, bool]] = field(default_factory=dict)
    """By key: pull index of the writer that runs, and whether it was told to stop."""

    def __post_init__(self) -> None:
        credits = CreditLedger(limit_blocks=NUM_BLOCKS, ttl_s=CREDIT_TTL_S, max_credits=3)
        self.puller = HandoffPuller(
            block_size=BLOCK_SIZE, credits=credits, max_sequences=3, max_tombstones=64, max_pull_retries=1
        )

    def maybe_free(self, key: str) -> None:
        """The engine's rule: an aborted sequence's blocks are free when no writer can write into them."""
        sequence = self.sequences[key]
        if sequence.aborted and (sequence.writer_done or not sequence.blocks):
            del self.sequences[key]
            self.memory.give_back(sequence.blocks)


@dataclass
class Request:
    name: str
    tokens: int
    prefill_attempt: int = 0
    decode_attempt: int = 0


class Handoff(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now_s, self.deaths = 0.0, 0
        self.epochs = itertools.count(100)
        self.p = PrefillSide(next(self.epochs))
        self.d = {name: DecodeSide(name, next(self.epochs)) for name in "AB"}
        self.requests: dict[str, Request] = {}
        self.network: list[tuple[Any, ...]] = []

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

    def send_prefill(self, request: Request) -> None:
        self.network.append(("prefill", request.name, request.prefill_attempt, request.tokens, self.p.epoch))

    # The network

    def deliver(self, pick: int) -> None:
        """Any of the older messages, not only the oldest; now and then it stays, to come again."""
        index = pick % min(len(self.network), 4)
        if pick % 13 and self.network[index][0] in ("frame", "end"):  # a stream keeps its order, nearly always
            stream = self.network[index][1:4]
            index = next(i for i, m in enumerate(self.network) if m[0] in ("frame", "end") and m[1:4] == stream)
        stays = pick % 23 == 0 and len(self.network) < 30
        message = self.network[index] if stays else self.network.pop(index)
        if message[0] == "frame" and pick % 17 == 0:
            self.on_frame(*message[1:], torn=True)
        else:
            getattr(self, f"on_{message[0]}")(*message[1:])

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    def on_prefill(self, name: str, attempt: int, tokens: int, epoch: int) -> None:
        if epoch != self.p.epoch:
            return  # the connection of that life is gone
        actions = self.p.holder.prefill_submitted(name, 0, attempt, tokens, self.now_s)
        if not any(isinstance(action, act.Refuse) for action in actions):
            key = f"{name}/0/p{attempt}"
            assert key not in self.p.sequences
            assert attempt > self.p.aborted.get(name, -1), "an abort that came first was forgotten"
            self.p.sequences[key] = Prefilling(name, tokens)
        self.do_p(actions)

    def on_reserve(self, worker: str, name: str, attempt: int) -> None:
        d, request = self.d[worker], self.requests[name]
        for action in d.puller.reserve(name, 0, attempt, blocks_for(request.tokens), self.now_s):
            if isinstance(action, act.Credit):
                ticket = Ticket(
                    request_id=name,
                    choice=0,
                    prefill_attempt=request.prefill_attempt,
                    decode_attempt=attempt,
                    prefill_worker="P",
                    epoch=self.p.epoch,
                    num_tokens=request.tokens,
                    fingerprint="fp",
                )
                self.network.append(("decode", worker, d.epoch, ticket, action.credit_id))

    def on_decode(self, worker: str, epoch: int, ticket: Ticket, credit_id: int) -> None:
        d = self.d[worker]
        if epoch != d.epoch:
            return
        actions = d.puller.submit(ticket, credit_id, self.now_s + TIMEOUT_S, self.now_s)
        if not actions:
            assert ticket.decode_key not in d.sequences
            assert ticket.decode_attempt > d.aborted.get(ticket.request_id, -1)
            d.sequences[ticket.decode_key] = Decoding(ticket)

    def on_abort_prefill(self, name: str, attempt: int) -> None:
        self.p.aborted[name] = max(attempt, self.p.aborted.get(name, -1))
        self.do_p(self.p.holder.abort_attempt(name, 0, attempt, self.now_s))

    def on_abort_decode(self, worker: str, name: str, attempt: int) -> None:
        d = self.d[worker]
        d.aborted[name] = max(attempt, d.aborted.get(name, -1))
        covered = [
            key
            for key, sequence in d.sequences.items()
            if sequence.ticket.request_id == name and sequence.ticket.decode_attempt <= attempt
        ]
        for key in covered:
            self.abort_in_engine(d, key)
        self.do_d(d, d.puller.abort(name, 0, attempt, self.now_s))

    def abort_in_engine(self, d: DecodeSide, key: str) -> None:
        """`Scheduler.abort`: a sequence without a writer goes at once, any other when its writer is done."""
        if key in d.sequences:
            d.sequences[key].aborted = True
            d.maybe_free(key)

    def on_pull(self, to: tuple[str, int], ticket: Ticket, first: int, pull_index: int) -> None:
        for action in (actions := self.p.holder.pull(ticket, first, pull_index, self.now_s)):
            if isinstance(action, act.Serve):
                self.p.streams[action.reader_id] = Stream(ticket, to, pull_index, first)
                assert ticket.epoch == self.p.epoch
                newest = self.p.newest_attempt.get(ticket.prefill_key, -1)
                assert ticket.decode_attempt >= newest
                self.p.newest_attempt[ticket.prefill_key] = ticket.decode_attempt
            elif isinstance(action, act.Refuse):
                self.network.append(("refused", to, ticket.decode_key, pull_index, action.reason))
        self.do_p([action for action in actions if not isinstance(action, act.Serve | act.Refuse)])

    def on_frame(
        self,
        to: tuple[str, int],
        key: str,
        pull_index: int,
        ticket: Ticket,
        index: int,
        content: Content,
        *,
        torn: bool = False,
    ) -> None:
        """`torn`: its memory was handed out anew while it was copied (mapped reads)."""
        d = self.writer_of(to, key, pull_index)
        if d is None:
            if (late := self.d[to[0]]).epoch == to[1]:
                assert isinstance(late.puller.block_arrived(key, pull_index, ticket, index)[0], act.Refuse)
            return
        for action in d.puller.block_arrived(key, pull_index, ticket, index):
            if isinstance(action, act.Refuse):
                self.end_writer(d, key, action.reason)
                return
            assert isinstance(action, act.WriteBlock)
            assert ticket.decode_key == key
            sequence = d.sequences[key]
            assert not sequence.writer_done, "a write after the engine was told that none would come"
            assert action.block_id == sequence.blocks[index].block_id
            assert content == (ticket.request_id, index), "another request's KV"
            if torn:
                d.memory.content[action.block_id] = ("torn", index)
                self.end_writer(d, key, RefusalReason.WRONG_GENERATION)
                return
            d.memory.content[action.block_id] = content
            d.puller.block_written(key, pull_index, index)

    def on_end(self, to: tuple[str, int], key: str, pull_index: int, ticket: Ticket) -> None:
        d = self.writer_of(to, key, pull_index)
        if d is None:
            return
        actions = d.puller.end_arrived(key, pull_index, ticket, ticket.num_tokens, TOKEN)
        if isinstance(actions[0], act.Refuse):
            self.end_writer(d, key, actions[0].reason)
            return
        assert ticket.decode_key == key
        self.do_d(d, actions)
        self.end_writer(d, key, None)

    def misroute(self, pick: int) -> None:
        """A block turns up in another stream, where the next was due. Were it ever so, it must be found."""
        frames = [message for message in self.network if message[0] == "frame"]
        for d in self.d.values():
            for key, (pull_index, _) in sorted(d.writers.items()):
                _, _, _, _, ticket, _, content = frames[pick % len(frames)]
                if ticket.decode_key != key and pick % 5 == 0:
                    due = d.puller._records[key].next_block
                    self.on_frame((d.name, d.epoch), key, pull_index, ticket, due, content)
                    return

    def on_refused(self, to: tuple[str, int], key: str, pull_index: int, reason: RefusalReason) -> None:
        d = self.writer_of(to, key, pull_index)
        if d is not None:
            self.end_writer(d, key, reason)

    def on_confirm(self, ticket: Ticket) -> None:
        actions = self.p.holder.confirm(ticket, self.now_s)
        if any(isinstance(action, act.Revoke | act.ReleaseBlocks) for action in actions):
            assert ticket.epoch == self.p.epoch
            assert ticket.decode_attempt == self.p.newest_attempt[ticket.prefill_key], "not the current attempt"
        self.do_p(actions)

    def on_abort_ticket(self, ticket: Ticket) -> None:
        self.do_p(self.p.holder.abort_ticket(ticket, self.now_s))

    # The prefill worker's engine and its readers

    def prefill_engine(self, pick: int) -> None:
        key = next(key for key, sequence in self.p.sequences.items() if not sequence.held)
        sequence = self.p.sequences[key]
        what = {0: "finish", 1: "preempt", 2: "fail"}.get(pick % 17, "compute")
        if not sequence.blocks:
            refs = self.p.memory.take(blocks_for(sequence.tokens))
            if refs is not None:
                sequence.blocks = refs
                self.p.events.append(("blocks_granted", key, refs, 0))
            return
        if what == "preempt":
            self.p.memory.give_back(sequence.blocks)
            sequence.blocks, sequence.computed = (), 0
            self.p.events.append(("preempted", key))
            return
        sequence.computed = min(sequence.tokens, sequence.computed + 5)
        for index in range(blocks_for(sequence.computed)):
            self.p.memory.content[sequence.blocks[index].block_id] = (sequence.request, index)
        self.p.events.append(("advanced", key, sequence.computed))
        done = sequence.computed == sequence.tokens
        if what == "fail" or (what == "finish" and done):
            self.p.free(key)
            reason = RefusalReason.FINISHED if what == "finish" else RefusalReason.PREFILL_FAILED
            self.p.events.append(("prefill_failed", key, reason))
        elif done:
            sequence.held = True
            self.p.events.append(("prefill_done", key, TOKEN))

    def holder_hears(self, pick: int = 0) -> None:
        name, *rest = self.p.events.popleft()
        timed = name in ("prefill_done", "prefill_failed")
        self.do_p(getattr(self.p.holder, name)(*rest, *([self.now_s] if timed else [])))

    def prefill_engine_obeys(self, pick: int = 0) -> None:
        command, key = self.p.commands.popleft()
        sequence = self.p.sequences.get(key)
        if command == "abort" or (sequence is not None and sequence.held):
            self.p.free(key)

    def reader_reads(self, pick: int) -> None:
        self.read(sorted(self.p.streams)[pick % len(self.p.streams)])

    def read(self, reader_id: int) -> None:
        stream = self.p.streams[reader_id]
        view = self.p.holder.view(reader_id)
        key = stream.ticket.decode_key
        if view.refused is not None:
            self.network.append(("refused", stream.to, key, stream.pull_index, view.refused))
            self.end_reader(reader_id)
        elif stream.index < view.readable_blocks:
            ref = view.blocks[stream.index]
            if self.p.memory.generation[ref.block_id] != ref.generation:
                wrong = RefusalReason.WRONG_GENERATION
                self.network.append(("refused", stream.to, key, stream.pull_index, wrong))
                self.end_reader(reader_id)
                return
            content = self.p.memory.content[ref.block_id]
            self.network.append(("frame", stream.to, key, stream.pull_index, stream.ticket, stream.index, content))
            stream.index += 1
            self.do_p(self.p.holder.pull_progress(reader_id, self.now_s))
        elif view.first_token is not None:
            self.network.append(("end", stream.to, key, stream.pull_index, stream.ticket))
            self.end_reader(reader_id)

    @precondition(lambda self: self.p.streams)
    @rule(data=st.data())
    def reader_breaks(self, data: st.DataObject) -> None:
        self.end_reader(data.draw(st.sampled_from(sorted(self.p.streams))))

    def end_reader(self, reader_id: int) -> None:
        del self.p.streams[reader_id]
        self.do_p(self.p.holder.pull_ended(reader_id, self.now_s))

    def do_p(self, actions: list[act.HolderAction]) -> None:
        for action in actions:
            if isinstance(action, act.ReleaseBlocks | act.AbortPrefill):
                key = action.key
                assert all(s.ticket.prefill_key != key for s in self.p.streams.values()), "released under a reader"
                assert key not in self.p.ended, "released twice"
                self.p.ended.append(key)
                self.p.commands.append(("abort" if isinstance(action, act.AbortPrefill) else "release", key))

    # The decode workers' engines and their writers

    def decode_engine_admits(self, pick: int) -> None:
        d, cached = self.d["AB"[pick % 2]], pick % 3
        for key, sequence in d.sequences.items():
            if sequence.blocks or sequence.aborted:
                continue
            refs = d.memory.take(blocks_for(sequence.ticket.num_tokens))
            if refs is not None:
                sequence.blocks = refs
                sequence.cached = min(cached, (sequence.ticket.num_tokens - 1) // BLOCK_SIZE)
                for index in range(sequence.cached):
                    d.memory.content[refs[index].block_id] = (sequence.ticket.request_id, index)
                d.grants.append(key)
            return

    def puller_hears(self, pick: int) -> None:
        self.hear_grant(next(d for d in self.d.values() if d.grants))

    def hear_grant(self, d: DecodeSide) -> None:
        key = d.grants.popleft()
        sequence = d.sequences.get(key)
        if sequence is not None:
            self.do_d(d, d.puller.blocks_granted(key, sequence.blocks, sequence.cached * BLOCK_SIZE))

    def first_step(self, pick: int) -> None:
        d = self.d["AB"[pick % 2]]
        for key, sequence in d.sequences.items():
            if sequence.ready:
                self.do_d(d, d.puller.first_step(key))
                sequence.aborted = True  # it decodes to its end, then its blocks are free
                d.maybe_free(key)
                return

    @precondition(lambda self: any(d.writers for d in self.d.values()))
    @rule(data=st.data())
    def writer_ends(self, data: st.DataObject) -> None:
        """A cancelled writer stops; any other loses its connection."""
        d = next(d for d in self.d.values() if d.writers)
        self.end_writer(d, data.draw(st.sampled_from(sorted(d.writers))), RefusalReason.PEER_LOST)

    def writer_of(self, to: tuple[str, int], key: str, pull_index: int) -> DecodeSide | None:
        """The worker, if that life of it still reads that stream. Every other message falls on deaf ears."""
        d = self.d[to[0]]
        return d if d.epoch == to[1] and d.writers.get(key, (None, False))[0] == pull_index else None

    def end_writer(self, d: DecodeSide, key: str, reason: RefusalReason | None) -> None:
        pull_index, _ = d.writers.pop(key)
        self.do_d(d, d.puller.pull_ended(key, pull_index, reason, "", self.now_s))

    def do_d(self, d: DecodeSide, actions: list[act.PullerAction]) -> None:
        for action in actions:
            match action:
                case act.StartPull(key, ticket, first, pull_index, _):
                    assert key not in d.writers
                    assert not d.sequences[key].writer_done
                    d.writers[key] = (pull_index, False)
                    self.network.append(("pull", (d.name, d.epoch), ticket, first, pull_index))
                case act.CancelPull(key):
                    d.writers[key] = (d.writers[key][0], True)
                case act.KvReady(key, _):
                    sequence = d.sequences[key]
                    for index, ref in enumerate(sequence.blocks):
                        assert d.memory.content[ref.block_id] == (sequence.ticket.request_id, index)
                    sequence.ready = sequence.writer_done = True
                case act.WriterDone(key):
                    assert key not in d.writers, "the engine was told too early"
                    if key in d.sequences:
                        d.sequences[key].writer_done = True
                        d.maybe_free(key)
                case act.Failed(key, _, _):
                    self.abort_in_engine(d, key)
                case act.Confirm(ticket):
                    self.network.append(("confirm", ticket))
                    d.confirming.append(ticket.decode_key)
                case act.SendAbort(ticket):
                    self.network.append(("abort_ticket", ticket))

    def confirmation_ends(self, pick: int) -> None:
        """Its reply came, or its deadline."""
        d = next(d for d in self.d.values() if d.confirming)
        self.do_d(d, d.puller.confirm_ended(d.confirming.popleft(), self.now_s))

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

    def tick(self) -> None:
        self.do_p(self.p.holder.tick(self.now_s))
        for d in self.d.values():
            self.do_d(d, d.puller.tick(self.now_s))

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


Handoff.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestHandoff = Handoff.TestCase
