"""Finds the workers for one attempt: asks those that `placing` names, best first, for a credit. Waiting where
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
from .attempt import Attempt, PrefillHalf, Work
from .link import WorkerLink
from .members import Membership
from .placement import WorkerView
from .placing import Path, Place, Pools, find_place

logger = logging.getLogger(__name__)
ROLES = tuple(Role)


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
        self._views: tuple[WorkerView, ...] = ()
        self._pools = Pools((), (), ())
        """Of these views."""

    def pools(self) -> Pools:
        """The workers that can take work now."""
        views = self._members.routable(*ROLES)
        if views != self._views:
            prefill, decode, mixed = (
                tuple([view for view in views if view.role is role]) for role in (Role.PREFILL, Role.DECODE, Role.MIXED)
            )
            self._views, self._pools = views, Pools(prefill, decode, mixed)
        return self._pools

    async def try_place(self, work: Work) -> Attempt | None:
        """One round over the workers: an attempt, or None while every one of them refuses. `NoWorkers` when there is
        none that could serve it; `Refusal` (INVALID_ARGUMENT) when it can never be placed.
        """
        place = find_place(
            work.needs, self.pools(), lambda views: self.cached_tokens(work, views), self._local_threshold_tokens
        )
        if place.path is Path.PREFILL_ONLY:
            return self._attempt(work, place)
        granted = await self._reserve(work, place.decode)
        return None if granted is None else self._attempt(work, place, granted)

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
        for view in ranked:
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

    def _attempt(self, work: Work, place: Place, granted: _Granted | None = None) -> Attempt | None:
        half, prefill = work.half, place.prefill
        computes = prefill or (granted.view if granted and half is None else None)
        uncached_tokens = work.context_tokens - place.cached_tokens[computes.worker_id] if computes else 0
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
            place.path,
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
