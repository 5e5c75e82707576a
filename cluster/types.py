"""Values that cross the seams between Tandem's parts: requests, sampling, tokens, KV block references.

Pure data, imported by everything above `kernels`. No torch, no Ray, no I/O.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**64 - 1


class Role(enum.StrEnum):
    """What a worker does now. Role is run-time state of a worker, not a kind of worker."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class FinishReason(enum.StrEnum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class Handoff(enum.StrEnum):
    """How a sequence's KV comes to, or leaves, the engine that runs it."""

    NONE = "none"
    """Prefilled and decoded here: mixed workers, conditional local prefill, one-token answers."""
    OUT = "out"
    """Prefilled here; the blocks are held after the first token until `Scheduler.release`."""
    IN = "in"
    """Prefilled elsewhere; decode starts when the KV and the first token have arrived (`Scheduler.kv_ready`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one choice are drawn. Ranges are checked once, at the router's door (`router.params`).

    `seed` is always set here: the router draws one when the client sent none. Together with `choice`, the output index
    and a purpose it keys the counter-based generator, so a token depends on nothing else (DESIGN: resumable).
    """

    temperature: float = 1.0
    """0 = greedy."""
    top_k: int = 0
    """0 = all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """1 = off; CTRL (Keskar et al. 2019) §4.1, over prompt and output."""
    presence_penalty: float = 0.0
    """OpenAI's, over output tokens only."""
    frequency_penalty: float = 0.0
    """OpenAI's, over output tokens only."""
    seed: int = 0
    choice: int = 0
    """Index among the request's `n` choices."""
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs added to the logits before penalties and temperature."""
    top_logprobs: int | None = None
    """None: no logprobs; k: the chosen token's and the k most likely ones'."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One drawn token. Logprobs are of the raw model distribution (before bias, penalties, temperature), natural
    log.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first."""


class BlockRef(NamedTuple):
    """Names one block as it was handed out: the pool raises the generation each time it hands a block out anew."""

    block_id: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Urgency:
    """A request's place in a queue (`cluster.fair_queue`): its class's share of the service, and when it is due."""

    slo_class: str = ""
    share: float = 1.0
    """Weight of the class while requests of other classes wait as well; above 0."""
    deadline_s: float = math.inf
    """When its first token is due, on the clock of the queue's owner; inf: no promise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """One choice of one request as an engine sees it. Times are seconds on that engine's `Clock`."""

    seq_id: str
    """Unique on its engine: request, choice, side and attempt (`cluster.types.seq_id`)."""
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    """Tokens that an earlier attempt already sent to the client; context like the prompt, but counted as output."""
    sampling: SamplingParams
    handoff: Handoff = Handoff.NONE
    arrival_s: float = 0.0
    cache_salt: bytes = b""
    """Whatever changes KV beside the token ids; part of the prefix-cache key."""
    urgency: Urgency = Urgency()
    """Its place in the engine's queue."""
    block_keys: tuple[bytes, ...] = ()
    """Prefix-cache keys of its first full blocks, where whoever asks has them already."""

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV must exist before the next token can be drawn."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


class Side(enum.StrEnum):
    """The half of a request that a worker runs."""

    PREFILL = "prefill"
    DECODE = "decode"


def seq_id(request_id: str, choice: int, side: Side, attempt: int) -> str:
    """The engine-local name of one attempt at one half of one choice; a mixed worker may run both halves."""
    return f"{request_id}/{choice}/{side[0]}{attempt}"


class StepTimeCoefficients(NamedTuple):
    """Linear step-time model reported by a worker; see `cluster.latency.linear`. All in seconds."""

    step_s: float = 0.0
    prefill_token_s: float = 0.0
    decode_row_s: float = 0.0
    context_token_s: float = 0.0


class EngineLoad(NamedTuple):
    """What a scheduler reports about itself, for heartbeats, routing and metrics. Counts, not shares."""

    waiting: int = 0
    running: int = 0
    held: int = 0
    """Prefilled sequences whose blocks wait for a decode worker."""
    queued_prefill_tokens: int = 0
    """Prompt tokens admitted but not yet computed."""
    patient_prefill_tokens: int = 0
    """Those of them that are due at no time."""
    context_tokens: int = 0
    """Sum of context over running sequences."""
    num_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    """Blocks nobody holds that a prefix-cache hit could revive; they count as available."""
    preemptions_total: int = 0
    prefix_queries_tokens_total: int = 0
    prefix_hits_tokens_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """The waterfall of one choice, seconds. Each duration is measured on the clock of the process that did the work."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    transfer_s: float = 0.0
    exposed_transfer_s: float = 0.0
    decode_queue_s: float = 0.0
    """How long the decode worker had no blocks for it; its KV waited in the prefill worker."""
    decode_s: float = 0.0
    e2e_s: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    path: str = "split"
    """`split`, `local`, `mixed` or `prefill_only`: a request served without the split is visible, never silent."""
    transferred_bytes: int = 0
    transport: str = ""
    """How the KV came to the decode worker; empty where none was handed off."""
    slo_class: str = ""
    """The class of the request's promise."""
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def tpot_s(self) -> float | None:
        """Time per output token, first token excluded; None for one output token (PEERS: trouble 9)."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Latency promise of a class of requests, seconds; None: none was made. Attained where both are met.

    The default is loose: nobody has promised anything yet, and a laptop must not refuse what it can serve.
    """

    ttft_s: float | None = 10.0
    tpot_s: float | None = 0.5
