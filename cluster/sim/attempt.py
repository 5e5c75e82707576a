"""What the router in virtual time keeps of one try at a request: a prompt that was sent, a prefill and the KV that
comes of it, and where both halves run. The runtime's is `router.attempt.Attempt`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...router.placing import Path
from ...router.tries import PrefillKeep
from ..types import Urgency
from .member import SimMember


class SentPrompt:
    """A prompt that a worker was sent and has no token of yet: the router's own account of it."""

    __slots__ = ("_member", "_patient_tokens", "_tokens", "waiting")

    def __init__(self, member: SimMember, tokens: int, urgency: Urgency) -> None:
        self._member, self._tokens = member, tokens
        self._patient_tokens = 0 if math.isfinite(urgency.deadline_s) else tokens
        self.waiting = True
        member.sent.prompt_sent(tokens, self._patient_tokens)

    def done(self) -> bool:
        """Its first token is here, or nobody waits for it. False: that was said before."""
        if not self.waiting:
            return False
        self.waiting = False
        self._member.sent.prompt_done(self._tokens, self._patient_tokens)
        return True


class Half:
    """A prefill and the KV that comes of it, on one life of one worker."""

    __slots__ = ("keep", "member", "number", "output_tokens", "prompt")

    def __init__(self, member: SimMember, number: int, output_tokens: int, prompt: SentPrompt) -> None:
        self.member = member
        self.number = number
        self.output_tokens = output_tokens
        """Of the context: what had been sent when it was begun."""
        self.prompt = prompt
        self.keep = PrefillKeep()


@dataclass(slots=True)
class Try:
    """One try, placed."""

    number: int
    path: Path
    half: Half | None
    decode: SimMember | None
    credit_id: int
    output_tokens: int
    prompt: SentPrompt
    decode_open: bool
    """The decode worker may have something of it: from its credit on, until it has ended there."""
