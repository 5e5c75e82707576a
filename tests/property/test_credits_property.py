"""Credits under several routers that know nothing of each other: never more is promised than there is, who waits
longest or most urgently is next, and who has gone away stops nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.types import Urgency
from tandem.kvtransfer.protocol.credits import CreditLedger
from tandem.kvtransfer.protocol.memory import ChoiceKey
from tandem.kvtransfer.protocol.wants import WANT_TTL_S

LIMIT, PLACES, TTL_S = 20, 4, 5.0
POLL_S = 0.05
URGENT, BATCH = Urgency(slo_class="interactive", share=8.0), Urgency(slo_class="batch", share=1.0)

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "redeem", "drop", "abort", "pass"]),
        st.integers(0, 8),  # which request; each belongs to one of three routers
        st.sampled_from([1, 3, 7, 20, 50]),  # blocks
        st.sampled_from([0.01, 0.2, WANT_TTL_S, TTL_S]),
        st.sampled_from([URGENT, BATCH, Urgency(deadline_s=3.0), Urgency()]),
    ),
    max_size=60,
)


@dataclass
class Worker:
    """A ledger, and what a careful reader of its answers knows about it."""

    ledger: CreditLedger = field(
        default_factory=lambda: CreditLedger(limit_blocks=LIMIT, ttl_s=TTL_S, max_credits=PLACES)
    )
    now_s: float = 0.0
    promised: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Blocks of unexpired promises, and when they lapse."""
    wanted: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Blocks of refused asks, and when they were asked for last."""
    ids: dict[str, int] = field(default_factory=dict)

    def ask(self, number: int, blocks: int, urgency: Urgency = URGENT) -> bool:
        name = f"r{number % 3}-{number}"
        key = f"{name}/0/d1"
        credit = self.ledger.grant(key, ChoiceKey(name, 0), 1, blocks, self.now_s, urgency=urgency)
        self.wanted.pop(key, None)
        if credit is None:
            if key not in self.promised and len(self.wanted) < PLACES:  # as many are remembered
                self.wanted[key] = (blocks, self.now_s)
            return False
        self.ids[key] = credit
        held = self.promised.get(key, (blocks, 0.0))[0]
        self.promised[key] = (held, self.now_s + TTL_S)
        return True

    def expire(self) -> None:
        self.ledger.expire(self.now_s)
        self.promised = {k: v for k, v in self.promised.items() if v[1] > self.now_s}
        self.wanted = {k: v for k, v in self.wanted.items() if v[1] + WANT_TTL_S > self.now_s}

    def check(self) -> None:
        self.ledger.check_integrity()
        blocks = [b for b, _ in self.promised.values()]
        assert self.ledger.blocks == sum(blocks)
        assert sum(blocks) <= LIMIT or len(blocks) == 1
        assert len(self.ledger) == len(blocks) <= PLACES


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_never_more_is_promised_than_there_is_and_nobody_is_refused_for_who_has_gone(
    events: list[tuple[str, int, int, float, Urgency]],
) -> None:
    worker = Worker()
    for event, number, blocks, seconds, urgency in events:
        worker.expire()
        name = f"r{number % 3}-{number}"
        key = f"{name}/0/d1"
        if event == "ask":
            others = {k: v for k, v in worker.wanted.items() if k != key}
            held = [b for b, _ in worker.promised.values()]
            alone = not held and not others
            fits = sum(held) + sum(b for b, _ in others.values()) + blocks <= LIMIT
            room = len(held) + len(others) < PLACES
            redeemed = worker.promised.get(key, (0, 0.0))[1] == math.inf
            if not worker.ask(number, blocks, urgency):
                assert redeemed or not (room and (fits or alone)), "refused, though nobody is in the way"
        elif event == "redeem" and worker.ledger.redeem(worker.ids.get(key, 0), key, worker.now_s) is None:
            worker.promised[key] = (worker.promised[key][0], math.inf)
        elif event == "drop":  # its blocks were granted
            worker.ledger.drop(key)
            worker.promised.pop(key, None)
        elif event == "abort":
            worker.ledger.drop_unredeemed(ChoiceKey(name, 0), 1)
            worker.wanted.pop(key, None)
            if worker.promised.get(key, (0, 0.0))[1] < math.inf:
                worker.promised.pop(key, None)
        elif event == "pass":
            worker.now_s += seconds
            worker.expire()
        assert worker.ledger.wants == len(worker.wanted)
        worker.check()
    worker.now_s += TTL_S
    for key in [k for k, (_, end) in worker.promised.items() if end == math.inf]:
        worker.ledger.drop(key)
    worker.promised = {}
    worker.wanted = {}
    worker.expire()
    assert (len(worker.ledger), worker.ledger.blocks, worker.ledger.wants) == (0, 0, 0)
    assert worker.ask(99, 3 * LIMIT)


@dataclass
class Router:
    """Keeps `width` requests of `blocks` going; asks for those that wait at every poll, in the order of its own."""

    name: str
    blocks: int
    width: int
    urgency: Urgency
    waiting: list[str] = field(default_factory=list)
    made: int = 0

    def poll(self, ledger: CreditLedger, now_s: float) -> list[str]:
        while len(self.waiting) < self.width:
            self.made += 1
            self.waiting.append(f"{self.name}{self.made}")
        got = []
        for request in self.waiting:
            owner = ChoiceKey(request, 0)
            if ledger.grant(request, owner, 1, self.blocks, now_s, urgency=self.urgency) is not None:
                got.append(request)
        self.waiting = [request for request in self.waiting if request not in got]
        return got


@settings(max_examples=60, deadline=None)
@given(
    small=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=3),
    large=st.sampled_from([15, 20, 50]),
    hold_polls=st.integers(1, 6),
    batch=st.booleans(),
)
def test_a_large_one_gets_its_credit_under_a_stream_of_small_ones(
    small: list[tuple[int, int]], large: int, hold_polls: int, batch: bool
) -> None:
    """Each promise is kept for `hold_polls` polls. Within a class the large one is next as soon as those before it are
    gone; of a class with an eighth of the share, after eight times its blocks at the latest.
    """
    ledger = CreditLedger(limit_blocks=LIMIT, ttl_s=1000.0, max_credits=64)
    routers = [Router(f"s{n}-", blocks, width, URGENT) for n, (blocks, width) in enumerate(small)]
    releases: list[tuple[int, str]] = []
    poll = 0

    def step(*asking: Router) -> list[str]:
        nonlocal poll, releases
        for end, key in releases:
            if end <= poll:
                ledger.drop(key)
        releases = [(end, key) for end, key in releases if end > poll]
        got = [request for router in asking for request in router.poll(ledger, poll * POLL_S)]
        releases += [(poll + hold_polls, request) for request in got]
        poll += 1
        ledger.check_integrity()
        return got

    for _ in range(10):
        step(*routers)
    late = Router("large", large, 1, BATCH if batch else URGENT)
    started = poll
    rounds = 4 * hold_polls + (8 * large * hold_polls if batch else 0) + 10
    while not any(request.startswith("large") for request in step(*routers, late)):
        assert poll - started <= rounds, "the large one is overtaken for ever"


def test_a_want_that_lapses_stops_nobody() -> None:
    ledger = CreditLedger(limit_blocks=10, ttl_s=100.0, max_credits=8)

    def ask(name: str, blocks: int, now_s: float) -> bool:
        return ledger.grant(name, ChoiceKey(name, 0), 1, blocks, now_s) is not None

    assert ask("a", 6, 0.0)
    assert not ask("large", 8, 0.0)
    assert not ask("small", 2, 0.1), "the blocks that large waits for"
    assert not ask("small", 2, WANT_TTL_S - 0.01)
    assert ask("small", 2, WANT_TTL_S)
    assert not ask("large", 8, WANT_TTL_S), "it begins anew"
    ledger.drop("a")
    ledger.drop("small")
    assert ask("large", 8, 2 * WANT_TTL_S - 0.01)


def test_who_is_more_urgent_goes_before_who_asked_first() -> None:
    ledger = CreditLedger(limit_blocks=10, ttl_s=100.0, max_credits=8)

    def ask(name: str, blocks: int, due_s: float) -> bool:
        urgency = Urgency(deadline_s=due_s)
        return ledger.grant(name, ChoiceKey(name, 0), 1, blocks, 0.0, urgency=urgency) is not None

    assert ask("a", 10, 1.0)
    assert not ask("patient", 5, 9.0)
    assert not ask("urgent", 8, 2.0)
    ledger.drop("a")
    assert not ask("patient", 5, 9.0)
    assert ask("urgent", 8, 2.0)
    assert ledger.wants == 1


def test_places_are_wanted_as_blocks_are() -> None:
    ledger = CreditLedger(limit_blocks=100, ttl_s=100.0, max_credits=8)

    def ask(name: str, places: int | None = 1) -> bool:
        return ledger.grant(name, ChoiceKey(name, 0), 1, 1, 0.0, places=places) is not None

    assert ask("a")
    assert not ask("b")
    assert not ask("c", places=2), "b is before it"
    ledger.drop_unredeemed(ChoiceKey("b", 0), 1)
    assert ask("c", places=2)
    assert not ask("d", places=-3)
    assert "2 sequences" in ledger.fullness()
