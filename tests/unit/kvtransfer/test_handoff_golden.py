"""Runs tests/golden/handoff_*.txt: transcripts of both sides of the handoff driven event by event, meant to be read.

A line that begins with `> ` is an event, the indented lines under it are what came of it: actions (`→ …`), then the
state of the attempt it was about and of all that are not over (`= …`). Everything else is comment.
`UPDATE_GOLDEN=1 pytest …` rewrites the indented lines.

    > holder lease=10 wait=5 tickets=8        > puller credits=8 ttl=10 sequences=8 retries=1     (first in each file)
    > time 3                                  time passes, both sides tick
    > h submit p0 10 | blocks p0 cached=0 | advance p0 8 | preempted p0 | done p0 | failed p0 finished | abort p0
    > h pull d0 first=0 n=0 | progress 1 | ended 1 | confirm d0 | drop d0     (progress and ended name a reader)
    > d reserve d0 3 | submit d0 credit=1 timeout=60 | local d0 credit=1 | blocks d0 cached=0 | block d0 0 n=0
    > d torn d0 0 n=0 | written d0 0 n=0     (`block` is both)
    > d end d0 n=0 | ended d0 peer_lost n=0 | step d0 | confirmed d0 | abort d0 notify=yes

`p1` is prefill attempt 1, `d1` decode attempt 1. Tickets take p=0, epoch=7, worker=P, tokens=10, fingerprint=fp unless
said otherwise. Blocks have 4 tokens. After every event `check_integrity` must hold on both sides.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer.protocol import actions as act
from tandem.kvtransfer.protocol.credits import CreditLedger
from tandem.kvtransfer.protocol.holder import HandoffHolder
from tandem.kvtransfer.protocol.holder_state import HolderEvent, HolderState
from tandem.kvtransfer.protocol.puller import HandoffPuller
from tandem.kvtransfer.protocol.puller_state import PullerEvent, PullerState
from tandem.kvtransfer.ticket import RefusalReason, Ticket

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
TRANSCRIPTS = sorted(path for path in GOLDEN.glob("handoff_*.txt") if "table" not in path.name)
BLOCK_SIZE = 4
TOKEN = SampledToken(42)


def ticket_of(name: str, **options: str) -> Ticket:
    return Ticket(
        request_id="r",
        choice=0,
        prefill_attempt=int(options.get("p", 0)),
        decode_attempt=int(name[1:]),
        prefill_worker=options.get("worker", "P"),
        epoch=int(options.get("epoch", 7)),
        num_tokens=int(options.get("tokens", 10)),
        fingerprint=options.get("fingerprint", "fp"),
    )


def refs_of(tokens: int, first: int = 0) -> tuple[BlockRef, ...]:
    return tuple(BlockRef(first + i, 1) for i in range(-(-tokens // BLOCK_SIZE)))


def show(action: object) -> str:
    """One action, in words."""
    match action:
        case act.Refuse(_, reason):
            return f"refuse: {reason}"
        case act.Serve(_, reader):
            return f"serve reader {reader}"
        case act.Wake(_):
            return "wake the readers"
        case act.Revoke(_, readers, reason):
            return f"revoke reader {', '.join(map(str, readers))}: {reason}"
        case act.ReleaseBlocks(key, outcome):
            return f"RELEASE {key}: {outcome}"
        case act.AbortPrefill(key):
            return f"ABORT PREFILL {key}"
        case act.Credit(_, credit):
            return f"credit {credit}"
        case act.StartPull(key, _, first, index, delay):
            return f"start pull {index} of {key} from block {first}" + (f" in {delay:g} s" if delay else "")
        case act.CancelPull(key):
            return f"cancel the pull of {key}"
        case act.WriteBlocks(_, blocks):
            return f"write block {', '.join(map(str, blocks))}"
        case act.KvReady(key, token):
            return f"KV READY {key}, first token {token.token_id}"
        case act.WriterDone(key):
            return f"WRITER DONE {key}"
        case act.Failed(key, reason, _):
            return f"FAILED {key}: {reason}{', retryable' if reason.retryable else ''}"
        case act.Confirm(ticket):
            return f"send confirmation of {ticket.prefill_key} by {ticket.decode_key}"
        case act.SendAbort(ticket):
            return f"send abort of {ticket.prefill_key} by {ticket.decode_key}"
    raise AssertionError(action)


class Transcript:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.seen: list[str] = []
        self.tokens: dict[str, int] = {}
        self.sides: dict[str, HandoffHolder | HandoffPuller] = {}

    def run(self, line: str) -> list[str]:
        words = [word for word in line.split() if "=" not in word]
        options = dict(word.split("=", 1) for word in line.split() if "=" in word)
        subject: str | None = None
        if words[0] in ("holder", "puller", "time"):
            done = getattr(self, f"do_{words[0]}")(*words[1:], **options)
        else:
            subject = words[2] if words[2][0] in "pd" else None
            if words[1] in ("pull", "confirm", "drop"):
                subject = f"p{options.get('p', 0)}"
            if subject is not None and subject not in self.seen:
                self.seen.append(subject)
            done = getattr(self, f"{words[0]}_{words[1]}")(*words[2:], **options)
        for side in self.sides.values():
            side.check_integrity()
        return [*(f"→ {show(action)}" for action in done), *self.states(subject)]

    def states(self, subject: str | None) -> list[str]:
        """Of the attempt that the event was about, and of every one that is not over."""
        words = []
        for name in sorted(self.seen, key=lambda n: (n[0] == "d", n)):
            side = self.sides.get(name[0])
            state = side.state_of(f"r/0/{name}").value if side is not None else None
            if state is not None and (name == subject or state not in ("absent", "done")):
                words.append(f"{name} {state}")
        if "p" in self.sides and (readers := self.holder.counts().readers):
            words.append(f"readers {readers}")
        if "d" in self.sides and (blocks := self.puller.counts().credited_blocks):
            words.append(f"promised {blocks} blocks")
        return ["= " + (" | ".join(words) or "nothing left")] if self.seen else []

    def do_holder(self, lease: str = "10", wait: str = "5", tickets: str = "8") -> list[object]:
        self.sides["p"] = self.holder = HandoffHolder(
            worker_id="P",
            epoch=7,
            fingerprint="fp",
            block_size=BLOCK_SIZE,
            lease_s=float(lease),
            pull_wait_s=float(wait),
            max_tickets=int(tickets),
            max_tombstones=8,
            tombstone_ttl_s=100.0,
        )
        return []

    def do_puller(self, credits: str = "8", ttl: str = "10", sequences: str = "8", retries: str = "1") -> list[object]:
        ledger = CreditLedger(limit_blocks=int(credits), ttl_s=float(ttl), max_credits=8)
        self.sides["d"] = self.puller = HandoffPuller(
            block_size=BLOCK_SIZE,
            credits=ledger,
            max_sequences=int(sequences),
            max_tombstones=8,
            tombstone_ttl_s=100.0,
            max_pull_retries=int(retries),
        )
        return []

    def do_time(self, seconds: str) -> list[object]:
        self.now_s += float(seconds)
        done: list[object] = []
        for side in self.sides.values():
            done += side.tick(self.now_s)
        return done

    def h_submit(self, name: str, tokens: str) -> list[object]:
        self.tokens[name] = int(tokens)
        return list(self.holder.prefill_submitted("r", 0, int(name[1:]), int(tokens), self.now_s))

    def h_blocks(self, name: str, cached: str = "0") -> list[object]:
        return list(self.holder.blocks_granted(f"r/0/{name}", refs_of(self.tokens.get(name, 10)), int(cached)))

    def h_advance(self, name: str, tokens: str) -> list[object]:
        return list(self.holder.advanced(f"r/0/{name}", int(tokens)))

    def h_preempted(self, name: str) -> list[object]:
        return list(self.holder.preempted(f"r/0/{name}"))

    def h_done(self, name: str) -> list[object]:
        return list(self.holder.prefill_done(f"r/0/{name}", TOKEN, self.now_s))

    def h_failed(self, name: str, reason: str = "prefill_failed") -> list[object]:
        return list(self.holder.prefill_failed(f"r/0/{name}", RefusalReason(reason), self.now_s))

    def h_abort(self, name: str) -> list[object]:
        return list(self.holder.abort_attempt("r", 0, int(name[1:]), self.now_s))

    def h_pull(self, name: str, first: str = "0", n: str = "0", **options: str) -> list[object]:
        return list(self.holder.pull(ticket_of(name, **options), int(first), int(n), self.now_s))

    def h_progress(self, reader: str) -> list[object]:
        return list(self.holder.pull_progress(int(reader), self.now_s))

    def h_ended(self, reader: str) -> list[object]:
        return list(self.holder.pull_ended(int(reader), self.now_s))

    def h_read(self, name: str, **options: str) -> list[object]:
        return list(self.holder.read(ticket_of(name, **options), self.now_s))

    def h_confirm(self, name: str, **options: str) -> list[object]:
        return list(self.holder.confirm(ticket_of(name, **options), self.now_s))

    def h_drop(self, name: str, **options: str) -> list[object]:
        return list(self.holder.abort_ticket(ticket_of(name, **options), self.now_s))

    def d_reserve(self, name: str, blocks: str) -> list[object]:
        return list(self.puller.reserve("r", 0, int(name[1:]), int(blocks), self.now_s, router_id="router"))

    def d_gone(self, router_id: str) -> list[object]:
        return list(self.puller.router_gone(router_id))

    def d_submit(self, name: str, credit: str = "1", timeout: str = "60", **options: str) -> list[object]:
        ticket = ticket_of(name, **options)
        return list(self.puller.submit(ticket, int(credit), self.now_s + float(timeout), self.now_s))

    def d_local(self, name: str, credit: str = "1") -> list[object]:
        return list(self.puller.submit_local("r", 0, int(name[1:]), int(credit), self.now_s))

    def d_blocks(self, name: str, cached: str = "0") -> list[object]:
        return list(self.puller.blocks_granted(f"r/0/{name}", refs_of(10, first=5), int(cached)))

    def d_block(self, name: str, index: str, n: str = "0", **options: str) -> list[object]:
        """The frame, and where it may be written, that it is."""
        actions = list(self.puller.blocks_arrived(f"r/0/{name}", int(n), [ticket_of(name, **options)], [int(index)]))
        written = self.d_written(name, index, n) if any(isinstance(a, act.WriteBlocks) for a in actions) else []
        return [*actions, *written]

    def d_torn(self, name: str, index: str, n: str = "0", **options: str) -> list[object]:
        """A frame whose memory changed while it was copied."""
        return list(self.puller.blocks_arrived(f"r/0/{name}", int(n), [ticket_of(name, **options)], [int(index)]))

    def d_written(self, name: str, index: str, n: str = "0") -> list[object]:
        return list(self.puller.blocks_written(f"r/0/{name}", int(n), [int(index)]))

    def d_end(self, name: str, n: str = "0", sent: str = "10", **options: str) -> list[object]:
        return list(self.puller.end_arrived(f"r/0/{name}", int(n), ticket_of(name, **options), int(sent), TOKEN))

    def d_ended(self, name: str, reason: str = "", n: str = "0") -> list[object]:
        why = RefusalReason(reason) if reason else None
        return list(self.puller.pull_ended(f"r/0/{name}", int(n), why, "", self.now_s))

    def d_step(self, name: str) -> list[object]:
        return list(self.puller.first_step(f"r/0/{name}"))

    def d_confirmed(self, name: str) -> list[object]:
        return list(self.puller.confirm_ended(f"r/0/{name}", self.now_s))

    def d_abort(self, name: str, notify: str = "yes") -> list[object]:
        return list(self.puller.abort("r", 0, int(name[1:]), self.now_s, notify=notify == "yes"))


def replay(text: str) -> str:
    """The transcript with the indented lines replaced by what happens."""
    transcript = Transcript()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("    "):
            continue
        lines.append(line)
        if line.startswith("> "):
            lines += [f"    {printed}" for printed in transcript.run(line[2:])]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    expected = path.read_text()
    happened = replay(expected)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(happened)
        return
    assert happened == expected


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 10


# Every event in every state. The tables are made from the enums, so a new state or event cannot be forgotten.

SUBMITTED = ["h submit p0 10", "h pull d0"]
COMPUTING = [*SUBMITTED, "h blocks p0"]
HOLDER_STATES = {
    HolderState.ABSENT: [],
    HolderState.AWAITED: ["h pull d0"],
    HolderState.QUEUED: SUBMITTED,
    HolderState.COMPUTING: COMPUTING,
    HolderState.HELD: [*COMPUTING, "h done p0"],
    HolderState.REVOKED: [*COMPUTING, "h done p0", "h abort p0"],
    HolderState.DONE: [*COMPUTING, "h done p0", "h ended 1", "h confirm d0"],
}
HOLDER_EVENTS = {
    HolderEvent.PREFILL_SUBMITTED: "h submit p0 10",
    HolderEvent.BLOCKS_GRANTED: "h blocks p0",
    HolderEvent.ADVANCED: "h advance p0 8",
    HolderEvent.PREEMPTED: "h preempted p0",
    HolderEvent.PREFILL_DONE: "h done p0",
    HolderEvent.PREFILL_FAILED: "h failed p0",
    HolderEvent.PULL: "h pull d1",
    HolderEvent.PULL_PROGRESS: "h progress 1",
    HolderEvent.PULL_ENDED: "h ended 1",
    HolderEvent.READ: "h read d0",
    HolderEvent.CONFIRM: "h confirm d0",
    HolderEvent.ABORT_TICKET: "h drop d0",
    HolderEvent.ABORT_ATTEMPT: "h abort p0",
    HolderEvent.TICK: "time 10",
}
WAITING = ["d reserve d0 3", "d submit d0 timeout=5"]
READY = [*WAITING, "d blocks d0 cached=12", "d end d0"]
PULLER_STATES = {
    PullerState.ABSENT: [],
    PullerState.CREDITED: ["d reserve d0 3"],
    PullerState.WAITING_BLOCKS: WAITING,
    PullerState.PULLING: [*WAITING, "d blocks d0 cached=8"],
    PullerState.CANCELLING: [*WAITING, "d blocks d0 cached=8", "d abort d0"],
    PullerState.READY: READY,
    PullerState.RUNNING: [*READY, "d step d0"],
    PullerState.DONE: [*READY, "d step d0", "d confirmed d0"],
}
PULLER_EVENTS = {
    PullerEvent.RESERVE: "d reserve d0 3",
    PullerEvent.SUBMIT: "d submit d0",
    PullerEvent.SUBMIT_LOCAL: "d local d0",
    PullerEvent.BLOCKS_GRANTED: "d blocks d0",
    PullerEvent.BLOCKS_ARRIVED: "d torn d0 2",
    PullerEvent.BLOCKS_WRITTEN: "d written d0 2",
    PullerEvent.END_ARRIVED: "d end d0",
    PullerEvent.PULL_ENDED: "d ended d0 wrong_epoch",
    PullerEvent.FIRST_STEP: "d step d0",
    PullerEvent.CONFIRM_ENDED: "d confirmed d0",
    PullerEvent.ABORT: "d abort d0",
    PullerEvent.ROUTER_GONE: "d gone router",
    PullerEvent.TICK: "time 10",
}


def table(first: str, name: str, states: dict[Any, list[str]], events: dict[Any, str]) -> str:
    """One line for each state and event: where it leads, and what is to be done."""
    lines = ["# From each state, by each event (of a first attempt): the next state, and the actions."]
    for state, event in itertools.product(states, events):
        transcript = Transcript()
        for line in (first, *states[state]):
            transcript.run(line)
        side = transcript.sides[name[0]]
        assert side.state_of(f"r/0/{name}") is state
        printed = transcript.run(events[event])
        actions = [line[2:] for line in printed if line.startswith("→ ")]
        after = side.state_of(f"r/0/{name}")
        verdict = f"→ {after}" if after is not state or actions else "ignored"
        lines.append(f"{state:<14} {event:<18} {verdict:<17} {'; '.join(actions)}".rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("side", ["holder", "puller"])
def test_every_event_in_every_state(side: str) -> None:
    if side == "holder":
        assert (set(HOLDER_STATES), set(HOLDER_EVENTS)) == (set(HolderState), set(HolderEvent))
        happened = table("holder", "p0", HOLDER_STATES, HOLDER_EVENTS)
    else:
        assert (set(PULLER_STATES), set(PULLER_EVENTS)) == (set(PullerState), set(PullerEvent))
        happened = table("puller", "d0", PULLER_STATES, PULLER_EVENTS)
    path = GOLDEN / f"handoff_table_{side}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(happened)
    assert happened == path.read_text()


@pytest.mark.parametrize(("machine", "events"), [(HandoffHolder, HolderEvent), (HandoffPuller, PullerEvent)])
def test_events_are_methods(machine: type, events: Any) -> None:
    public = {name for name in vars(machine) if not name.startswith("_")}
    assert public - set(events) == {"check_integrity", "counts", "state_of"} | (
        {"view"} if machine is HandoffHolder else {"credited_blocks", "retries_of", "targets_of", "waiting_blocks"}
    )
    assert set(events) <= public
