"""A sequence as the scheduler keeps it, from `add` to its end.

add ──▶ WAITING ──▶ RUNNING ──▶ (finished)          NONE: prefill, then decode, in the running batch
           │  ▲        │  └───▶ HELD ──▶ (released)  OUT: after the first token the blocks wait for their reader
           │  └────────┘ preempted
           └──▶ PULLING ──▶ RUNNING                  IN: blocks granted, KV on its way; "waiting for KV" whatever it
                                                     waits for
any ──▶ ENDED                                        finished or aborted; may still stand in an outstanding plan
"""

from __future__ import annotations

import enum

from ..hashing import extend_block_keys
from ..types import FinishReason, Handoff, SampledToken, SamplingParams, SequenceSpec
from .plan import SampleSpec


class State(enum.Enum):
    """Where a sequence stands; see the module's picture."""

    WAITING = "waiting"
    PULLING = "pulling"
    RUNNING = "running"
    HELD = "held"
    ENDED = "ended"


class Sequence:
    """Mutable state of one sequence. Only `Scheduler` writes to it.

    Tokens of a sequence, by position (token regions are half-open, 0 <= computed <= scheduled <= len(tokens)):

        |── KV written ──|── in outstanding plans ──|── not scheduled yet ──|
        0             computed                  scheduled             len(tokens)

    The last token of `tokens` is always one whose KV does not exist yet: computing it yields the next token. Where a
    device looks ahead, `scheduled` may be beyond it, by the tokens that are drawn but one: `drawing` - 1.
    """

    __slots__ = (
        "admitted_s",
        "cached_tokens",
        "computed",
        "doomed",
        "drawing",
        "joined",
        "keys",
        "last_len",
        "needs_pull",
        "order",
        "outputs",
        "plans",
        "prefill_end",
        "prefill_s",
        "registered",
        "released",
        "scheduled",
        "seq_id",
        "spec",
        "state",
        "swapped",
        "tokens",
        "told",
    )

    def __init__(self, spec: SequenceSpec, order: int, max_model_len: int) -> None:
        self.spec = spec
        self.seq_id = spec.seq_id
        self.order = order
        """Rank by arrival: lower is older, and older goes first."""
        self.state = State.WAITING
        self.tokens: list[int] = [*spec.prompt_token_ids, *spec.output_token_ids]
        """Prompt and output."""
        self.outputs: list[int] = list(spec.output_token_ids)
        self.last_len = min(len(spec.prompt_token_ids) + spec.sampling.max_tokens, max_model_len)
        """Length of `tokens` that ends it, whatever is drawn."""
        self.told = False
        """Tokens that were drawn here have been told of."""
        self.computed = 0
        self.scheduled = 0
        self.prefill_end = len(self.tokens)
        """Positions below it are computed in prefill chunks; raised to the whole context by a preemption."""
        self.drawing = 0
        """Tokens that are being drawn, each in an outstanding plan."""
        self.plans = 0
        """Outstanding plans with a row of this sequence."""
        self.needs_pull = spec.handoff is Handoff.IN
        """KV comes from elsewhere; False once it came, or was lost to a preemption and is recomputed here."""
        self.swapped = False
        """WAITING with its KV in the host's memory."""
        self.doomed = False
        """To be preempted as soon as it stands in no outstanding plan."""
        self.joined: int | None = None
        """In which of its steps `quiet_run.Lockstep` last brought `tokens`, `outputs`, `scheduled` and `computed` up to
        date; None: they are."""
        self.released = False
        """OUT: the reader let go before the prefill ended."""
        self.keys: list[bytes] = list(spec.block_keys)
        """Keys of the first full blocks of `tokens`, as far as they were asked for."""
        self.registered = 0
        """Blocks of the table already offered to the prefix cache."""
        self.admitted_s: float | None = None
        self.prefill_s: float | None = 0.0 if self.needs_pull else None
        self.cached_tokens = 0

    @property
    def remaining_prefill(self) -> int:
        """Context tokens to compute here and not scheduled yet."""
        left = self.prefill_end - self.scheduled
        return left if left > 0 and not self.needs_pull else 0

    @property
    def can_decode(self) -> bool:
        """Its next token could be drawn in the next plan, given a slot."""
        return (
            self.scheduled >= self.prefill_end and self.state is State.RUNNING and not self.doomed and not self.drawing
        )

    @property
    def can_look_ahead(self) -> bool:
        """The token after the one that is being drawn could be drawn in the next plan, given a slot, by a device that
        looks ahead: length does not end it before, and how it is drawn does not hang on a token that nobody knows yet.
        """
        return (
            self.drawing > 0
            and self.state is State.RUNNING
            and not self.doomed
            and self.spec.handoff is not Handoff.OUT
            and len(self.tokens) + self.drawing < self.last_len
            and not needs_history(self.spec.sampling)
        )

    @property
    def can_prefill(self) -> bool:
        """Its next prompt chunk could stand in the next plan."""
        return self.state is State.RUNNING and not self.doomed and self.scheduled < self.prefill_end

    def block_keys(self, block_size: int, start: int, stop: int) -> list[bytes]:
        """Keys of the full blocks start … stop-1 of `tokens`; each is hashed once in the sequence's life."""
        if len(self.keys) < stop:
            extend_block_keys(self.keys, self.tokens, block_size, self.spec.cache_salt)
        return self.keys[start:stop]

    def sample_spec(self, eos_token_ids: tuple[int, ...]) -> SampleSpec:
        """How the device draws the next token that is not being drawn yet."""
        params, index = self.spec.sampling, len(self.outputs) + self.drawing
        banned: tuple[int, ...] = ()
        if index < params.min_tokens:
            banned = params.stop_token_ids if params.ignore_eos else eos_token_ids + params.stop_token_ids
        return SampleSpec(params, index, self.spec.prompt_token_ids, self.outputs, banned)

    def append(self, token: SampledToken) -> None:
        """The next token of the choice."""
        self.tokens.append(token.token_id)
        self.outputs.append(token.token_id)

    def finish_reason(self, eos_token_ids: tuple[int, ...]) -> tuple[FinishReason | None, int | None]:
        """Whether the last output token ends the choice, and the stop token id if one did it (not for end of
        sequence).
        """
        params = self.spec.sampling
        if (eos_token_ids or params.stop_token_ids) and len(self.outputs) > params.min_tokens:
            last = self.outputs[-1]
            if last in eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
            if last in params.stop_token_ids:
                return FinishReason.STOP, last
        if len(self.tokens) >= self.last_len:
            return FinishReason.LENGTH, None
        return None, None

    def swap_out(self) -> None:
        """Gives its place up and keeps its KV elsewhere."""
        self.state = State.WAITING
        self.registered = 0
        self.swapped = True
        self.doomed = False

    def restart(self) -> None:
        """Forgets that any KV exists; everything up to the last token is prefilled again, here."""
        self.state = State.WAITING
        self.computed = self.scheduled = self.registered = 0
        self.prefill_end = len(self.tokens)
        self.needs_pull = False
        self.doomed = False


def needs_history(params: SamplingParams) -> bool:
    """Whether a draw depends on which tokens were drawn before, beside what the model makes of them."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def longest_context(spec: SequenceSpec, max_model_len: int) -> int:
    """Tokens whose KV `spec` may come to hold on this engine."""
    if spec.handoff is Handoff.OUT:
        return spec.context_tokens
    # The last token's KV is never written.
    return min(len(spec.prompt_token_ids) + spec.sampling.max_tokens, max_model_len) - 1


def check_spec(spec: SequenceSpec, *, num_blocks: int, block_size: int, max_model_len: int) -> None:
    """ValueError, naming the field and the numbers, if `spec` could never run to its end on such an engine."""
    context, params = spec.context_tokens, spec.sampling
    if not spec.prompt_token_ids:
        raise ValueError("prompt_token_ids: a sequence needs at least one prompt token")
    have = len(spec.output_token_ids)
    first = 0
    if spec.handoff is Handoff.IN:
        first = 1  # comes with the KV, and has not ended the choice
    if have + first >= params.max_tokens:
        raise ValueError(f"max_tokens: {params.max_tokens} leaves nothing to draw after {have + first} output tokens")
    if context + first >= max_model_len:
        raise ValueError(
            f"prompt_token_ids: a context of {context + first} tokens leaves no room for another one; "
            f"max_model_len is {max_model_len}"
        )
    longest = longest_context(spec, max_model_len)
    if -(-longest // block_size) > num_blocks:
        raise ValueError(
            f"max_tokens: prompt and output may need KV of {longest} tokens, "
            f"the whole KV memory holds {num_blocks * block_size} ({num_blocks} blocks of {block_size})"
        )
