"""A simulated request: what is asked, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..hashing import block_keys
from ..types import SLO
from .prompt import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request of a workload."""

    request_id: str
    arrival_s: float
    prompt_token_ids: Sequence[int]
    output_tokens: int
    slo_class: str = ""

    def block_keys(self, block_size: int) -> list[bytes]:
        """Names of the prompt's full blocks: see `cluster.hashing`."""
        ids = self.prompt_token_ids
        return ids.block_keys(block_size) if isinstance(ids, Prompt) else block_keys(ids, block_size)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of it, seconds of virtual time; None: that never came."""

    asked: Asked
    refused: str = ""
    """Why it was not let in; empty: it was."""
    failed: str = ""
    """Why it was given up after it was let in; empty: it was not. Both are codes of `router.errors`."""
    dispatched_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_queue_s: float = 0.0
    exposed_transfer_s: float = 0.0
    transferred_bytes: int = 0
    cached_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    path: str = ""
    tries: int = 0

    @property
    def done(self) -> bool:
        """Answered to its end."""
        return self.output_tokens >= self.asked.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.asked.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token, first token excluded; None for an answer of one token."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    def attains(self, slo: SLO) -> bool:
        """Both promises kept; one on TPOT binds only answers that have one."""
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        if not self.done or ttft_s is None:
            return False
        kept = slo.ttft_s is None or ttft_s <= slo.ttft_s
        return kept and (slo.tpot_s is None or tpot_s is None or tpot_s <= slo.tpot_s)
