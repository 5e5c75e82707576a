"""Finds the workers for one attempt: ranks them (`placement`) and asks the decode worker for a credit. Waiting where
none can is `router.dispatch`'s.

The credit comes first: prefill is only dispatched for a request that some decode worker has promised to take, so that
the second queue pushes back on the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc

from ..cluster.hashing import block_keys
from ..cluster.messages import urgency_to_proto
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.rpc import Refusal
from ..cluster.types import Role
from .attempt import Attempt, Path, PrefillHalf, Work
from .errors import Unavailable
from .link import WorkerLink
from .members import Membership
from .placement import WorkerView, keeps_tpot, missing, pair, rank_decode, rank_mixed, rank_prefill

logger = logging.getLogger(__name__)


class NoWorkers(Unavailable):
    """None that could serve it is ready; more may come."""

    def __init__(self, missing: str) -> None:
        super().__init__(f"no {missing} is ready", retry_after_s=1.0)
        self.missing = missing
        """Of which kind, in words."""


@dataclass(frozen=True, slots=True)
class _Granted:
    view: WorkerView
    link: WorkerLink
    """To the life that granted it."""
    reply: pb.ReserveReply


class Placer:
    """One per router."""

    def __init__(
        self,
        members: Membership,
        *,
        router_id: str,
        local_threshold_tokens: int,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """`spawn` runs a clean-up in the background, bounded, until it is done."""
        self._spawn = spawn
        self._members = members
        self._router_id = router_id
        self._local_threshold_tokens = local_threshold_tokens

    async def try_place(self, work: Work) -> Attempt | None:
        """One round over the workers: an attempt, or None while every one of them refuses. `NoWorkers` when there is
        none that could serve it; `Refusal` (INVALID_ARGUMENT) when it can never be placed.
        """
        if work.half is not None:
            return await self._place_decode(work, work.half)
        prefill, decode = pair(self._members.routable(Role.PREFILL), self._members.routable(Role.DECODE))
        mixed = self._members.routable(Role.MIXED)
        if prefill and decode:
            return await self._place_split(work, prefill, decode)
        if mixed:
            return await self._place_alone(work, mixed, Path.MIXED)
        raise NoWorkers(missing(self._members.routable(Role.PREFILL), self._members.routable(Role.DECODE)))

    async def _place_decode(self, work: Work, half: PrefillHalf) -> Attempt | None:
        """The prefill is under way, or done: any worker that can pull its KV will do."""
        able = self._members.routable(Role.DECODE) or self._members.routable(Role.MIXED)
        able = tuple(view for view in able if view.fingerprint == half.fingerprint)
        if not able:
            raise NoWorkers("decode worker")
        granted = await self._reserve(work, rank_decode(_keeping(work, able), work.context_tokens))
        return None if granted is None else self._attempt(work, Path.SPLIT, half=half, granted=granted)

    async def _place_split(
        self, work: Work, prefill: tuple[WorkerView, ...], decode: tuple[WorkerView, ...]
    ) -> Attempt | None:
        cached_tokens = self.cached_tokens(work, prefill)
        ranked = rank_prefill(prefill, work.context_tokens, cached_tokens)
        best = min(ranked, key=lambda view: view.worker_id in work.avoid)
        uncached_tokens = work.context_tokens - cached_tokens[best.worker_id]
        if work.sampling.max_tokens - len(work.output_token_ids) == 1:
            return self._attempt(work, Path.PREFILL_ONLY, prefill=best, uncached_tokens=uncached_tokens)
        if near := self._with_little_to_prefill(work, decode):
            return await self._place_alone(work, near, Path.LOCAL)
        matching = tuple(view for view in decode if view.fingerprint == best.fingerprint)
        granted = await self._reserve(work, rank_decode(_keeping(work, matching), work.context_tokens))
        if granted is None:
            return None
        return self._attempt(work, Path.SPLIT, prefill=best, granted=granted, uncached_tokens=uncached_tokens)

    def _with_little_to_prefill(self, work: Work, decode: tuple[WorkerView, ...]) -> tuple[WorkerView, ...]:
        """Decode workers that may prefill this prompt themselves: what *they* lack of it is below the threshold."""
        if not self._local_threshold_tokens:
            return ()
        cached_tokens = self.cached_tokens(work, decode)
        below = work.context_tokens - self._local_threshold_tokens
        return tuple(view for view in decode if cached_tokens[view.worker_id] > below)

    async def _place_alone(self, work: Work, views: tuple[WorkerView, ...], path: Path) -> Attempt | None:
        """On one worker that prefills and decodes."""
        cached_tokens = self.cached_tokens(work, views)
        granted = await self._reserve(work, rank_mixed(_keeping(work, views), work.context_tokens, cached_tokens))
        if granted is None:
            return None
        uncached_tokens = work.context_tokens - cached_tokens[granted.view.worker_id]
        return self._attempt(work, path, granted=granted, uncached_tokens=uncached_tokens)

    async def _reserve(self, work: Work, ranked: tuple[WorkerView, ...]) -> _Granted | None:
        """The first worker, best first, that grants a credit."""
        request = pb.ReserveRequest(
            request_id=work.request_id,
            choice=work.sampling.choice,
            decode_attempt=work.number,
            router_id=self._router_id,
            context_tokens=work.context_tokens,
            urgency=urgency_to_proto(work.urgency, self._members.clock.now_s()),
        )
        for view in sorted(ranked, key=lambda view: view.worker_id in work.avoid):
            link = self._members.link(view.worker_id)
            if link is None:
                continue
            request.epoch = link.epoch
            work.wants.add(link)
            try:
                reply = await link.reserve(request)
            except Refusal as refusal:
                if refusal.code is grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                logger.debug("no credit: %s", refusal.message)
                continue
            work.wants.discard(link)
            return _Granted(view, link, reply)
        return None

    def withdraw(self, work: Work) -> None:
        """The work waits no longer: workers that refused it a credit keep nothing back for it, and one that was asked
        when it left may have granted it all the same. Idempotent.
        """
        while work.wants:
            link = work.wants.pop()
            self._spawn(link.abort(work.abort_request(self._router_id, decode_attempt=work.number)))

    def _attempt(
        self,
        work: Work,
        path: Path,
        *,
        prefill: WorkerView | None = None,
        half: PrefillHalf | None = None,
        granted: _Granted | None = None,
        uncached_tokens: int = 0,
    ) -> Attempt | None:
        if prefill is not None:
            link = self._members.link(prefill.worker_id)
            if link is None:
                if granted is not None:
                    abort = work.abort_request(self._router_id, decode_attempt=work.number)
                    self._spawn(granted.link.abort(abort))
                return None
            half = PrefillHalf(
                work,
                link,
                router_id=self._router_id,
                kv_address=self._members.kv_address(prefill.worker_id),
                fingerprint=prefill.fingerprint,
                uncached_tokens=uncached_tokens,
            )
        # Both will hold the context: the one computes it, the other pulls it.
        for view in (prefill, granted.view if granted else None):
            if view is not None:
                self._members.prefixes.insert(view.worker_id, self._keys(work, view), view.num_blocks)
        return Attempt(
            work,
            path,
            router_id=self._router_id,
            clock=self._members.clock,
            half=half,
            decode=granted.link if granted else None,
            credit=granted.reply if granted else None,
            uncached_tokens=uncached_tokens,
        )

    def cached_tokens(self, work: Work, views: tuple[WorkerView, ...]) -> dict[str, int]:
        """Tokens of the context that each worker probably has; at least the last one is always computed."""
        return {
            view.worker_id: min(
                self._members.prefixes.match_blocks(view.worker_id, self._keys(work, view)) * view.block_size,
                work.context_tokens - 1,
            )
            for view in views
        }

    @staticmethod
    def _keys(work: Work, view: WorkerView) -> list[bytes]:
        """Hashed once per attempt and block size, however many workers are asked how often."""
        if view.block_size not in work.block_keys:
            token_ids = work.prompt_token_ids + work.output_token_ids
            work.block_keys[view.block_size] = block_keys(token_ids, view.block_size)
        return work.block_keys[view.block_size]


def _keeping(work: Work, views: tuple[WorkerView, ...]) -> tuple[WorkerView, ...]:
    """Those that could decode it within its promise, and within those of the others there."""
    return tuple(view for view in views if keeps_tpot(view, work.context_tokens, work.tpot_s))
