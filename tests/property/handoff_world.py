"""A router, both sides of the handoff and the network between them: what each does with what it is sent.

The machine that decides what happens when, and what must hold, is test_handoff_protocol's.
"""

from __future__ import annotations

import itertools
from typing import Any

from handoff_sides import (
    BLOCK_SIZE,
    TIMEOUT_S,
    TOKEN,
    Content,
    DecodeSide,
    Decoding,
    Prefilling,
    PrefillSide,
    Request,
    Stream,
    blocks_for,
)
from hypothesis.stateful import RuleBasedStateMachine
from tandem.kvtransfer.protocol import actions as act
from tandem.kvtransfer.ticket import RefusalReason, Ticket
from tickets import ticket_of


class World(RuleBasedStateMachine):
    """See the module."""

    def begin(self) -> None:
        self.now_s, self.deaths = 0.0, 0
        self.epochs = itertools.count(100)
        self.p = PrefillSide(next(self.epochs))
        self.d = {name: DecodeSide(name, next(self.epochs)) for name in "AB"}
        self.requests: dict[str, Request] = {}
        self.network: list[tuple[Any, ...]] = []

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
                attempts = {"prefill_attempt": request.prefill_attempt, "decode_attempt": attempt}
                ticket = ticket_of(request.tokens, request_id=name, prefill_worker="P", epoch=self.p.epoch, **attempts)
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
                (late_action,) = late.puller.blocks_arrived(key, pull_index, [ticket], [index])
                assert isinstance(late_action, act.Refuse)
            return
        for action in d.puller.blocks_arrived(key, pull_index, [ticket], [index]):
            if isinstance(action, act.Refuse):
                self.end_writer(d, key, action.reason)
                return
            assert isinstance(action, act.WriteBlocks)
            assert ticket.decode_key == key
            sequence = d.sequences[key]
            assert not sequence.writer_done, "a write after the engine was told that none would come"
            (block_id,) = action.block_ids
            assert block_id == sequence.blocks[index].block_id
            assert content == (ticket.request_id, index), "another request's KV"
            if torn:
                d.memory.content[block_id] = ("torn", index)
                self.end_writer(d, key, RefusalReason.WRONG_GENERATION)
                return
            d.memory.content[block_id] = content
            d.puller.blocks_written(key, pull_index, [index])

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

    def tick(self) -> None:
        self.do_p(self.p.holder.tick(self.now_s))
        for d in self.d.values():
            self.do_d(d, d.puller.tick(self.now_s))
