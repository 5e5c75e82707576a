"""Who of those that decode has a slot for its next token, and who gives way where blocks are lacking."""

from __future__ import annotations

from collections.abc import Callable

from ..types import Handoff
from .sequence import Sequence, State
from .sequence_kv import SequenceKV


def with_slots(
    decoding: list[Sequence], by_age: list[Sequence], kv: SequenceKV, preempt: Callable[[Sequence], None]
) -> list[Sequence]:
    """Those of `decoding` (oldest first) whose next position has a slot, taking blocks and preempting as needed.

    Victims, of `by_age`, are strictly newer than who asks, newest first, so that the oldest always gets on; who finds
    none keeps its blocks and waits for the next step. A victim in an outstanding plan is only doomed: its blocks come
    when that plan is complete. OUT sequences are never victims: they never grow, leave soon, and a reader is at their
    blocks.
    """
    granted: list[Sequence] = []
    victims = [seq for seq in by_age if seq.spec.handoff is not Handoff.OUT]
    if any(seq.doomed for seq in victims):
        victims = []  # blocks are on their way
    for seq in decoding:
        if seq.doomed or seq.state is not State.RUNNING:
            continue  # has become a victim itself
        has_slot = kv.grow(seq)
        while not has_slot and victims and victims[-1].order > seq.order:
            victim = victims.pop()
            if victim.plans > 0:
                victim.doomed = True
                victims = []
            else:
                preempt(victim)
                has_slot = kv.grow(seq)
        if has_slot:
            granted.append(seq)
    return granted
