"""Sequences that know how they would run alone: what every slot of their KV must hold and every token they draw, which
are functions of the tokens before (`test_scheduler_property`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from hypothesis import strategies as st
from tandem.cluster.engine.scheduler_events import BlocksGranted
from tandem.cluster.types import FinishReason, Handoff, SamplingParams, SequenceSpec, Urgency

VOCAB, EOS, MAX_LEN = 11, 0, 40
TEXTS = ([3, 1, 4, 1, 5, 9, 2, 6] * 6, [2, 7, 1, 8, 2, 8, 1, 8] * 6)


def kv_of(tokens: list[int], salt: bytes, start: int, end: int) -> list[int]:
    """What the slots of positions start … end-1 must hold: a hash of everything up to each."""
    value, values = crc32(salt), []
    for token in tokens[:end]:
        value = crc32(token.to_bytes(4, "little"), value)
        values.append(value)
    return values[start:]


def draw(kv: int, index: int, params: SamplingParams, outputs: Sequence[int]) -> int:
    token = (kv + (sum(outputs) if params.presence_penalty else 0)) % VOCAB
    while index < params.min_tokens and token in (EOS, *params.stop_token_ids):
        token = (token + 1) % VOCAB
    return token


def alone(spec: SequenceSpec) -> tuple[list[int], FinishReason]:
    """All output tokens of the sequence as it would run by itself, and how it ends."""
    outputs, params = list(spec.output_token_ids), spec.sampling
    while True:
        tokens = [*spec.prompt_token_ids, *outputs]
        token = draw(kv_of(tokens, spec.cache_salt, len(tokens) - 1, len(tokens))[0], len(outputs), params, outputs)
        outputs.append(token)
        if len(outputs) > params.min_tokens and (token in params.stop_token_ids or token == EOS):
            return outputs, FinishReason.STOP
        if len(outputs) == params.max_tokens or len(tokens) + 1 == MAX_LEN:
            return outputs, FinishReason.LENGTH


SPECS = st.builds(
    SequenceSpec,
    seq_id=st.just(""),
    prompt_token_ids=st.builds(
        lambda text, length, tail: (*TEXTS[text][:length], *tail),
        st.integers(0, 1),
        st.sampled_from([1, 3, 6, 6, 8, 9, 12]),
        st.sampled_from([(), (), (7,), (7, 8, 9)]),
    ),
    output_token_ids=st.sampled_from([(), (), (), (5,), (5, 6)]),
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.sampled_from([9, 5, 12, 2, 1]),
        min_tokens=st.sampled_from([12, 3, 0]),
        stop_token_ids=st.sampled_from([(), (), (4,)]),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    ),
    handoff=st.sampled_from([Handoff.NONE, Handoff.IN, Handoff.NONE, Handoff.OUT]),
    cache_salt=st.sampled_from([b"", b"", b"", b"x"]),
    urgency=st.builds(
        Urgency,
        slo_class=st.sampled_from(["", "", "batch"]),
        share=st.sampled_from([1.0, 1.0, 8.0]),
        deadline_s=st.sampled_from([math.inf, math.inf, 3.0, 1.0]),
    ),
)


@dataclass
class Run:
    spec: SequenceSpec
    expected: list[int]
    reason: FinishReason
    got: list[int] = field(default_factory=list)
    grant: BlocksGranted | None = None
    writing: bool = False
    kv_arrived: bool = False
    computed: int = 0
    finished: bool = False
    aborted: bool = False

    @property
    def held(self) -> bool:
        """OUT, prefilled, not finished: waits for `release`."""
        return self.spec.handoff is Handoff.OUT and bool(self.got) and not self.finished and not self.aborted

    def kv(self, start: int, end: int) -> list[int]:
        """What the slots of positions start … end-1 must hold."""
        tokens = [*self.spec.prompt_token_ids, *self.expected]
        return kv_of(tokens, self.spec.cache_salt, start, end)

    @property
    def active(self) -> bool:
        return not (self.finished or self.aborted)
