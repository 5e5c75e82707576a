"""What the contexts of penalised sequences ask of their logits, kept from step to step: a step adds a token to what is
known instead of counting a whole context again. Pure.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from ..plan import SampleSpec

_ROOM = 256


def penalizes(spec: SampleSpec) -> bool:
    """Whether a row's logits depend on its context's tokens."""
    params = spec.params
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class PenalizedContext:
    """Distinct token ids of one sequence's context, and what is subtracted from the logit of each: presence_penalty +
    frequency_penalty × count of those in the output, 0 of those that only the repetition penalty concerns. Ids that the
    vocabulary lacks are left out, as `sampler_penalties` does.
    """

    def __init__(self, spec: SampleSpec, vocab_size: int) -> None:
        self._params = spec.params
        self._vocab_size = vocab_size
        self._prompt_tokens = len(spec.prompt_token_ids)
        known = np.empty(0, dtype=np.int64)
        if spec.params.repetition_penalty != 1.0:
            known = np.unique(np.fromiter(spec.prompt_token_ids, dtype=np.int64, count=self._prompt_tokens))
            known = known[(known >= 0) & (known < vocab_size)]
        self._ids = np.empty(len(known) + _ROOM, dtype=np.int32)
        self._ids[: len(known)] = known
        self._penalties = np.zeros(len(known) + _ROOM, dtype=np.float32)
        self._counts: dict[int, int] = {}
        self._places = {token_id: place for place, token_id in enumerate(known.tolist())}
        self._outputs = 0
        self._last = -1
        self.follow(spec)

    def is_of(self, spec: SampleSpec) -> bool:
        """Whether `spec` may be a later one of the same sequence."""
        outputs = spec.output_token_ids
        return (
            len(spec.prompt_token_ids) == self._prompt_tokens
            and len(outputs) >= self._outputs
            and (self._outputs == 0 or outputs[self._outputs - 1] == self._last)
            and (spec.params is self._params or spec.params == self._params)
        )

    def follow(self, spec: SampleSpec) -> None:
        """Counts what the output has gained."""
        gained = spec.output_token_ids[self._outputs :]
        for token_id in gained:
            if 0 <= token_id < self._vocab_size:
                self._count(token_id)
        if gained:
            self._outputs += len(gained)
            self._last = gained[-1]

    def _count(self, token_id: int) -> None:
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = len(self._places)
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._penalties = np.concatenate((self._penalties, np.zeros_like(self._penalties)))
            self._ids[place] = token_id
        count = self._counts[place] = self._counts.get(place, 0) + 1
        params = self._params
        self._penalties[place] = params.presence_penalty + params.frequency_penalty * count

    @property
    def ids(self) -> NDArray[np.int32]:
        """[E], each once. Valid until the next `follow`."""
        return self._ids[: len(self._places)]

    @property
    def penalties(self) -> NDArray[np.float32]:
        """[E], to be subtracted."""
        return self._penalties[: len(self._places)]


class Contexts:
    """Those of the sequences that were sampled last, at most `most` of them."""

    def __init__(self, vocab_size: int, most: int) -> None:
        self._vocab_size = vocab_size
        self._most = most
        self._kept: OrderedDict[str, PenalizedContext] = OrderedDict()

    def of(self, seq_id: str, spec: SampleSpec) -> PenalizedContext:
        """As it is now."""
        context = self._kept.get(seq_id)
        if context is not None and context.is_of(spec):
            context.follow(spec)
        else:
            context = self._kept[seq_id] = PenalizedContext(spec, self._vocab_size)
        self._kept.move_to_end(seq_id)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return context
