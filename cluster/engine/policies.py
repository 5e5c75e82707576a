"""The three roles as batch policies: how a step's token budget is shared between running decodes and prompts.

A policy only decides; `Scheduler` carries out: within their shares older decodes go before newer ones, and prompts in
the order of the queue (`service_queue`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from ..types import Role

MAX_SHARES = 4096
"""Answers of a policy that are remembered."""


class StepView(NamedTuple):
    """What a policy may look at before a step. Token counts; a decode row is one token."""

    budget_tokens: int
    """Most tokens a step may compute (`max_batched_tokens`); at least 1 more than `decode_rows` if a prompt waits."""
    decode_rows: int
    """Running sequences that could draw their next token now."""
    prefill_tokens: int
    """Tokens of prompts, queued and admitted, that are not yet scheduled."""


class StepShares(NamedTuple):
    """Upper bounds of one step; together at most the budget (`PromptsAlone`: each)."""

    decode_rows: int
    prefill_tokens: int


class BatchPolicy(ABC):
    """Decides shares and headroom. Both methods are called once a step by `Scheduler.schedule`, must not block, and
    must not keep state from one step to the next (a role flip replaces the policy between any two steps).
    """

    role: Role
    whole_batches: bool = False
    """Sequences are taken in together, when none is resident, and nobody joins before the last of them has ended."""
    prompts_alone: bool = False
    """A step computes prompts or decode rows, never both, and prompts where there are any that have room."""
    pads_prompts: bool = False
    """Prompts of a step are computed as long as the longest of them."""
    pulls_alone: bool = False
    """A context is pulled between two steps: none is under way when it begins, none planned before it has come."""
    swaps: bool = False
    """Who is preempted keeps its KV, in the host's memory, and goes on from there; or it is computed again."""

    @abstractmethod
    def shares(self, view: StepView) -> StepShares:
        """Splits the budget. Whatever has waited must get at least one token in the end, or it starves."""

    @abstractmethod
    def headroom_blocks(self, growing: int) -> int:
        """Blocks that must stay available after an admission, given `growing` sequences that will yet need blocks."""


class Shares:
    """What a policy says of a step, asked once for each kind of step: it keeps no state."""

    def __init__(self, policy: BatchPolicy, budget_tokens: int) -> None:
        self._policy = policy
        self._budget_tokens = budget_tokens
        self._known: dict[tuple[int, int], StepShares] = {}

    def of(self, decode_rows: int, prefill_tokens: int) -> StepShares:
        """See `BatchPolicy.shares`."""
        asked = (decode_rows, prefill_tokens)
        shares = self._known.get(asked)
        if shares is None:
            if len(self._known) >= MAX_SHARES:
                self._known.clear()
            shares = self._known[asked] = self._policy.shares(StepView(self._budget_tokens, *asked))
        return shares


class PrefillPolicy(BatchPolicy):
    """Prompts first. Decodes (left over from a role flip) get what prompts leave, and never less than
    `1/decode_divisor` of the budget, so that they drain.
    """

    role = Role.PREFILL

    def __init__(self, *, decode_divisor: int = 8) -> None:
        if decode_divisor < 1:
            raise ValueError(f"decode_divisor: {decode_divisor} is not at least 1")
        self._decode_divisor = decode_divisor

    def shares(self, view: StepView) -> StepShares:
        left = view.budget_tokens - view.prefill_tokens
        decode_rows = min(view.decode_rows, max(left, view.budget_tokens // self._decode_divisor, 1))
        return StepShares(decode_rows=decode_rows, prefill_tokens=view.budget_tokens - decode_rows)

    def headroom_blocks(self, growing: int) -> int:
        """None: a prompt takes all its blocks at admission and leaves before it grows."""
        return 0


class DecodePolicy(BatchPolicy):
    """Decodes first. While anything decodes, prompts prefilled here (short ones, preempted ones) get at most
    `1/prefill_divisor` of the budget, which bounds what they add to a step and so to TPOT (Sarathi-Serve, OSDI '24,
    §4.2).
    """

    role = Role.DECODE

    def __init__(self, *, prefill_divisor: int = 4) -> None:
        if prefill_divisor < 1:
            raise ValueError(f"prefill_divisor: {prefill_divisor} is not at least 1")
        self._prefill_divisor = prefill_divisor

    def shares(self, view: StepView) -> StepShares:
        if view.decode_rows == 0:
            return StepShares(decode_rows=0, prefill_tokens=view.budget_tokens)
        left = view.budget_tokens - view.decode_rows
        bound = max(1, view.budget_tokens // self._prefill_divisor)
        return StepShares(decode_rows=view.decode_rows, prefill_tokens=min(left, bound))

    def headroom_blocks(self, growing: int) -> int:
        """One block for each, so that an admission is not paid for by a preemption a few steps later."""
        return growing


class MixedPolicy(BatchPolicy):
    """Decodes first, prompt chunks fill the rest: the colocated baseline (Sarathi-Serve's stall-free batching)."""

    role = Role.MIXED

    def shares(self, view: StepView) -> StepShares:
        return StepShares(decode_rows=view.decode_rows, prefill_tokens=view.budget_tokens - view.decode_rows)

    def headroom_blocks(self, growing: int) -> int:
        """One block for each growing sequence."""
        return growing


class RequestLevel(BatchPolicy):
    """Another policy at request level: systems before Orca (OSDI '22, §2, challenge C1), for comparison. The place of a
    sequence that ends early stays empty until the batch has ended. Better than such systems in two points: prompts and
    ended sequences are not padded, and tokens leave as they are drawn.
    """

    whole_batches = True

    def __init__(self, inner: BatchPolicy) -> None:
        self.role = inner.role
        self._inner = inner

    def shares(self, view: StepView) -> StepShares:
        return self._inner.shares(view)

    def headroom_blocks(self, growing: int) -> int:
        """The inner policy's, beside what the batch itself may yet grow by: it is never preempted."""
        return self._inner.headroom_blocks(growing)


class PromptsAlone(BatchPolicy):
    """Another policy without mixed steps: iterations of whole prompts go before iterations of decode rows, which wait
    meanwhile, as in vLLM before chunked prefill (SOSP '23, §4.5; the colocated baseline of DistServe, OSDI '24, §2.3).
    """

    prompts_alone = True

    def __init__(self, inner: BatchPolicy) -> None:
        self.role = inner.role
        self._inner = inner

    def shares(self, view: StepView) -> StepShares:
        """Each kind may have the whole step: only one of them will."""
        return StepShares(decode_rows=view.decode_rows, prefill_tokens=view.budget_tokens)

    def headroom_blocks(self, growing: int) -> int:
        """The inner policy's."""
        return self._inner.headroom_blocks(growing)


class PaddedPrompts(PromptsAlone):
    """vLLM 0.2.1 to 0.2.7 (its `_prepare_prompt`), for comparison: prompts of a step are rows of one rectangle. For
    virtual time: no device of ours pads.
    """

    pads_prompts = True


class DistServeDecode(DecodePolicy):
    """DistServe's decoding stage (its `DecodingStageFCFSScheduler` and `DecodingStageLLMEngine`), for comparison: one
    loop that fetches contexts between two steps and waits for each, lets in whoever has room now, and swaps the newest
    out when those that run have grown. For virtual time: no device of ours swaps.
    """

    pulls_alone = True
    swaps = True

    def headroom_blocks(self, growing: int) -> int:
        """None: whoever runs may be swapped out a few steps later."""
        return 0


def policy_for(role: Role, batching: str = "iteration") -> BatchPolicy:
    """The policy that makes an engine play `role`; `batching` as `EngineConfig.batching` has it, or "padded" or
    "distserve", which only virtual time can carry out.
    """
    policies = {Role.PREFILL: PrefillPolicy, Role.DECODE: DecodePolicy, Role.MIXED: MixedPolicy}
    policy: BatchPolicy = policies[role]()
    match batching:
        case "request":
            return RequestLevel(policy)
        case "prompts_alone":
            return PromptsAlone(policy)
        case "padded":
            return PaddedPrompts(policy)
        case "distserve":
            return DistServeDecode() if role is Role.DECODE else PromptsAlone(policy)
        case _:
            return policy
