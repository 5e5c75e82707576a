"""The seam between the router's front ends (HTTP, gRPC) and its core: one checked request in, a stream of deltas
out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from ..cluster.types import FinishReason, SampledToken, SamplingParams, Timings
from .slo_classes import Promise


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A request that has passed every check at the door. `sampling.choice` is 0; choice i uses the same with
    choice=i.
    """

    request_id: str
    """Drawn by the router, unique; the caller's own id is only logged."""
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    stop: tuple[str, ...] = ()
    """Stop strings; cut from the output."""
    timeout_s: float = 600.0
    skip_special_tokens: bool = True
    client_request_id: str = ""
    continuation: bool = False
    """The output goes on behind the prompt's own text (completions), so that a leading space belongs to it."""
    promise: Promise | None = None
    """Under which it stands; None: that of the class `interactive`."""
    arrival_s: float | None = None
    """When the request came, on the router's clock: TTFT counts from there. None: when the core takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of one choice's output. A choice's last delta has `finish_reason` and `timings`."""

    choice: int
    text: str = ""
    """Whole characters only."""
    tokens: tuple[SampledToken, ...] = ()
    """The tokens behind the stream so far that no earlier delta carried; `text` may lag behind them."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice; None for end of sequence and for length."""
    timings: Timings | None = None


Tap = Callable[[Delta], bool]
"""Takes a delta (True) in the call that brings its tokens, before any task runs, or leaves it to who iterates: that one
gets whatever ends a choice. It neither blocks nor raises.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What `/v1/models` and ListModels say."""

    id: str
    max_model_len: int
    created_unix_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether a request could be served now, and why not. `ready` needs a prefill and a decode worker whose
    fingerprints match, or a mixed worker.
    """

    ready: bool
    reason: str = ""
    workers: tuple[dict[str, object], ...] = field(default=())


class GenerationService(ABC):
    """Implemented by the router core, called by the front ends, once a request."""

    @abstractmethod
    def generate(self, request: GenerateRequest, tap: Tap | None = None) -> AsyncIterator[Delta]:
        """Runs the request. `tap` may be offered, in order, deltas that nobody has to wait for; the rest is iterated.
        Deltas of the `n` choices interleave. Closing the iterator (`aclose`) or cancelling the
        task that iterates cancels the request on every worker. Raises `router.errors.ServiceError` subclasses, before
        the first delta or between deltas.
        """

    @abstractmethod
    def models(self) -> tuple[ModelCard, ...]:
        """The models served now."""

    @abstractmethod
    def readiness(self) -> Readiness:
        """Does not block."""
