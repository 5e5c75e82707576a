"""The queue's own rules: who was preempted comes first and pays nothing, the others pay for what they are given."""

from __future__ import annotations

import math

import pytest
from tandem.cluster.engine.block_pool import IntegrityError
from tandem.cluster.engine.sequence import Sequence, State
from tandem.cluster.engine.service_queue import ServiceQueue
from tandem.cluster.types import Handoff, SamplingParams, SequenceSpec, Urgency


def sequence(
    order: int,
    prompt: int = 10,
    slo_class: str = "",
    handoff: Handoff = Handoff.NONE,
    deadline_s: float = math.inf,
) -> Sequence:
    spec = SequenceSpec(
        seq_id=f"{slo_class}{order}",
        prompt_token_ids=tuple(range(prompt)),
        sampling=SamplingParams(),
        handoff=handoff,
        urgency=Urgency(slo_class=slo_class, deadline_s=deadline_s),
    )
    return Sequence(spec, order, 10_000)


def compute(queue: ServiceQueue, seq: Sequence, tokens: int) -> None:
    seq.state = State.RUNNING
    seq.scheduled += tokens
    queue.served(seq, tokens)
    queue.check_integrity()


def preempt(queue: ServiceQueue, seq: Sequence) -> None:
    seq.restart()
    queue.push_preempted(seq)
    queue.check_integrity()


def names(queue: ServiceQueue) -> list[str]:
    return [seq.seq_id for seq in queue]


def test_preempted_ones_come_first_oldest_first_wherever_they_stood() -> None:
    queue = ServiceQueue()
    seqs = [sequence(order) for order in range(4)]
    for seq in seqs:
        queue.push(seq, 0.0)
    compute(queue, seqs[0], 10)  # decodes
    compute(queue, seqs[2], 4)  # in the middle of its prompt
    assert names(queue) == ["1", "2", "3"]
    preempt(queue, seqs[2])
    preempt(queue, seqs[0])
    assert names(queue) == ["0", "2", "1", "3"]
    assert (queue.waiting, queue.prefill_tokens) == (4, 40)
    compute(queue, seqs[0], 9)
    assert names(queue) == ["0", "2", "1", "3"], "its place is its own until its prompt is computed"
    preempt(queue, seqs[0])
    assert (queue.waiting, queue.prefill_tokens) == (4, 40)
    compute(queue, seqs[0], 10)
    queue.remove(seqs[2])
    queue.remove(seqs[2])
    assert names(queue) == ["1", "3"]


def test_who_was_preempted_does_not_pay_twice() -> None:
    queue = ServiceQueue()
    a, b, again = sequence(0, slo_class="a"), sequence(1, slo_class="b"), sequence(2, slo_class="a")
    for seq in (a, b, again):
        queue.push(seq, 0.0)
    compute(queue, a, 10)
    assert names(queue) == ["b1", "a2"], "class a has paid for 10"
    for _ in range(5):
        preempt(queue, a)
        compute(queue, a, 10)
    compute(queue, b, 10)
    late = sequence(3, slo_class="b")
    queue.push(late, 0.0)
    assert names(queue) == ["a2", "b3"], "both have paid for 10, and a's came first"


def test_a_pulled_context_pays_when_it_is_granted_and_leaves() -> None:
    queue = ServiceQueue()
    pulled, other = sequence(0, slo_class="a", handoff=Handoff.IN), sequence(1, slo_class="b")
    following = sequence(2, slo_class="a")
    for seq in (pulled, other, following):
        queue.push(seq, 0.0)
    assert (queue.waiting, queue.pulls, queue.prefill_tokens) == (3, 1, 20)
    pulled.state = State.PULLING
    queue.served(pulled, 10)
    queue.check_integrity()
    assert (queue.waiting, queue.pulls, queue.prefill_tokens) == (2, 0, 20)
    assert names(queue) == ["b1", "a2"]


def test_tokens_that_are_due_at_no_time_are_counted_apart_until_they_come_first() -> None:
    queue = ServiceQueue()
    patient, urgent = sequence(0), sequence(1, deadline_s=5.0)
    for seq in (patient, urgent):
        queue.push(seq, 0.0)
    assert (queue.prefill_tokens, queue.patient_tokens) == (20, 10)
    compute(queue, patient, 4)
    compute(queue, urgent, 10)
    assert (queue.prefill_tokens, queue.patient_tokens) == (6, 6)
    preempt(queue, patient)
    assert (queue.prefill_tokens, queue.patient_tokens) == (10, 0), "nobody goes before it now"
    queue.remove(patient)
    assert (queue.prefill_tokens, queue.patient_tokens) == (0, 0)


def test_a_miscount_is_noticed() -> None:
    queue = ServiceQueue()
    seq = sequence(0)
    queue.push(seq, 0.0)
    seq.scheduled = 3  # and nobody told the queue
    with pytest.raises(IntegrityError, match="miscounts"):
        queue.check_integrity()
