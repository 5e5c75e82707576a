"""Proves that a scheduler's sequences are where they say they are: in tests after every step, else when idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from .block_pool import IntegrityError
from .sequence import Sequence, State
from .service_queue import ServiceQueue


def check_sequences(
    sequences: Mapping[str, Sequence],
    queue: ServiceQueue,
    places: Mapping[State, Mapping[str, Sequence]],
    in_plans: Iterable[Sequence],
) -> None:
    """Every sequence is in exactly the place of its state, counts the outstanding plans that name it (`in_plans`: the
    sequences of all their rows), and no place names another one. Raises IntegrityError. O(sequences).
    """
    rows = Counter(seq.seq_id for seq in in_plans)
    for seq_id, seq in sequences.items():
        _require(seq.plans == rows.pop(seq_id, 0), f"{seq_id} miscounts its outstanding plans")
        _require(seq.state is not State.ENDED or seq.plans > 0, f"{seq_id} has ended and lingers")
        prefills = seq.state is State.RUNNING and seq.remaining_prefill > 0
        queued = prefills or seq.state is State.WAITING
        _require((seq in queue) == queued, f"{seq_id} is {seq.state}, the queue disagrees")
        for state, place in places.items():
            _require((seq_id in place) == (seq.state is state), f"{seq_id} is {seq.state}, but {state} disagrees")
    _require(not rows, f"outstanding plans name {sorted(rows)}, whom nobody knows")
    ended = sum(seq.state is State.ENDED for seq in sequences.values())
    members = queue.waiting + sum(len(place) for place in places.values())
    _require(members + ended == len(sequences), "a place names a sequence that has been forgotten")
    queue.check_integrity()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(f"scheduler: {message}")
