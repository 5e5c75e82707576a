"""Where one try at a request may run: which workers are to be asked for a credit, best first. Pure: the decision that
`placer` carries out over the network and `cluster.sim` in virtual time.

The views are hints: workers decide, and may refuse.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .errors import Unavailable
from .placement import WorkerView, keeps_tpot, missing, pair, rank_decode, rank_mixed, rank_prefill


class Path(enum.StrEnum):
    """How a choice is served. Whatever is not `split` is counted and visible."""

    SPLIT = "split"
    LOCAL = "local"
    """The decode worker prefills a short prompt itself (conditional disaggregation)."""
    MIXED = "mixed"
    PREFILL_ONLY = "prefill_only"
    """One output token: nothing to hand off."""


class NoWorkers(Unavailable):
    """None that could serve it is ready; more may come."""

    def __init__(self, missing: str) -> None:
        super().__init__(f"no {missing} is ready", retry_after_s=1.0)
        self.missing = missing
        """Of which kind, in words."""


class Pools:
    """The workers that can take work now."""

    __slots__ = ("decode", "decode_workers", "mixed", "paired", "prefill", "prompt_workers")

    def __init__(
        self, prefill: tuple[WorkerView, ...], decode: tuple[WorkerView, ...], mixed: tuple[WorkerView, ...]
    ) -> None:
        self.prefill, self.decode, self.mixed = prefill, decode, mixed
        self.paired = pair(prefill, decode)
        """Prefill and decode workers that can hand off to one another."""
        self.prompt_workers = self.paired[0] or mixed
        """Those that would compute a prompt that came now."""
        self.decode_workers = decode or mixed
        """Those that would decode it."""


class Needs(NamedTuple):
    """What one try needs of the workers."""

    context_tokens: int
    left_tokens: int
    """Output tokens that are still to be drawn."""
    tpot_s: float = math.inf
    """What it is promised as time per output token; inf: nothing."""
    avoid: frozenset[str] = frozenset()
    """Workers that refused or failed the try before: asked again only where there are no others."""
    kv: str | None = None
    """Fingerprint of the KV that an earlier try's prefill has made, or makes; None: it is to be prefilled."""


class Place(NamedTuple):
    """Where a try may run."""

    path: Path
    prefill: WorkerView | None
    """The worker that would prefill; None: the one that grants the credit, or one that has."""
    decode: tuple[WorkerView, ...]
    """To be asked for a credit one after the other, best first; unless the path is PREFILL_ONLY, one must grant it."""
    cached_tokens: Mapping[str, int]
    """Of the context, what those that may prefill it probably have, by worker id."""


CachedTokens = Callable[[tuple[WorkerView, ...]], Mapping[str, int]]
"""Tokens of the context that each of these workers probably has; at least the last one is always computed."""


def find_place(needs: Needs, pools: Pools, cached_tokens: CachedTokens, local_threshold_tokens: int) -> Place:
    """`NoWorkers` where none is there that could serve it. `local_threshold_tokens`: decode workers that lack less than
    that of the context prefill it themselves; 0: never.
    """
    if needs.kv is not None:
        able = tuple(view for view in pools.decode_workers if view.fingerprint == needs.kv)
        if not able:
            raise NoWorkers("decode worker")
        return Place(Path.SPLIT, None, _decode(needs, able), {})
    prefill, decode = pools.paired
    if prefill and decode:
        return _split(needs, prefill, decode, cached_tokens, local_threshold_tokens)
    if pools.mixed:
        return _alone(needs, pools.mixed, cached_tokens(pools.mixed), Path.MIXED)
    raise NoWorkers(missing(pools.prefill, pools.decode))


def _split(
    needs: Needs,
    prefill: tuple[WorkerView, ...],
    decode: tuple[WorkerView, ...],
    cached_tokens: CachedTokens,
    local_threshold_tokens: int,
) -> Place:
    cached = cached_tokens(prefill)
    ranked = rank_prefill(prefill, needs.context_tokens, cached)
    best = _avoided_last(needs, ranked)[0]
    if needs.left_tokens == 1:
        return Place(Path.PREFILL_ONLY, best, (), cached)
    if local_threshold_tokens:
        own, below = cached_tokens(decode), needs.context_tokens - local_threshold_tokens
        near = tuple(view for view in decode if own[view.worker_id] > below)
        if near:
            return _alone(needs, near, own, Path.LOCAL)
    matching = tuple([view for view in decode if view.fingerprint == best.fingerprint])
    return Place(Path.SPLIT, best, _decode(needs, matching), cached)


def _decode(needs: Needs, views: tuple[WorkerView, ...]) -> tuple[WorkerView, ...]:
    return _avoided_last(needs, rank_decode(_keeping(needs, views), needs.context_tokens))


def _alone(needs: Needs, views: tuple[WorkerView, ...], cached: Mapping[str, int], path: Path) -> Place:
    """On one worker that prefills and decodes."""
    ranked = rank_mixed(_keeping(needs, views), needs.context_tokens, cached)
    return Place(path, None, _avoided_last(needs, ranked), cached)


def _keeping(needs: Needs, views: tuple[WorkerView, ...]) -> tuple[WorkerView, ...]:
    """Those that could decode it within its promise, and within those of the others there."""
    return tuple([view for view in views if keeps_tpot(view, needs.context_tokens, needs.tpot_s)])


def _avoided_last(needs: Needs, ranked: tuple[WorkerView, ...]) -> tuple[WorkerView, ...]:
    if not needs.avoid:
        return ranked
    return tuple(sorted(ranked, key=lambda view: view.worker_id in needs.avoid))
