"""Who is in the cluster now: workers heartbeat to the router, the router attaches to them.

A worker is routable while its heartbeats are fresh, its stream is attached, and it is not draining. Late heartbeats
only stop new work; requests in flight end with the stream. A worker that is silent for long though its stream stands
(a stopped process: its kernel still answers for it) is given up: the stream is ended, requests go on elsewhere, and if
the worker ever goes on it finds that out, drops what it ran, and is routed to again. A worker that comes back as
another process has a new epoch and is a new member; the old epoch is remembered as dead and never routed to again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc import aio

from ..cluster.auth import OPEN, MemberCredentials
from ..cluster.clock import Clock
from ..cluster.latency.linear import DEFAULT_TOKEN_BUDGET, StepTimeModel
from ..cluster.messages import step_time_from_proto
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.proto.tandem_internal_v1_pb2_grpc import RegistryServicer
from ..cluster.rpc import PROTOCOL_VERSION
from ..cluster.types import Role
from .link import WorkerLink
from .placement import WorkerView
from .prefix_index import PrefixIndex
from .sent_load import WorkerSeen

logger = logging.getLogger(__name__)
MAX_MEMBERS = 4096
MAX_DEAD_EPOCHS = 4096
FORGET_AFTER_S = 60.0


def kv_identity(status: pb.WorkerStatus) -> str:
    """What two workers must have in common to hand KV off: fingerprint and layout, or every pull would be refused."""
    return f"{status.fingerprint}/{hashlib.blake2b(status.kv_layout, digest_size=8).hexdigest()}"


def malformed(status: pb.WorkerStatus) -> str:
    """What is wrong with a heartbeat, whoever else is here; empty: nothing, it can be ranked. Pure."""
    if not status.worker_id or not status.epoch or not status.address:
        return "worker_id, epoch and address: all three must be set"
    if status.protocol_version != PROTOCOL_VERSION:
        return f"protocol_version: {status.protocol_version} is not {PROTOCOL_VERSION}, which this router speaks"
    if status.role not in {role.value for role in Role}:
        return f"role: {status.role!r} is not one of {[role.value for role in Role]}"
    try:
        StepTimeModel(step_time_from_proto(status.step_time))
    except ValueError as error:
        return f"step_time.{error}"
    return ""


@dataclass(slots=True)
class Member:
    """One worker in its current life."""

    status: pb.WorkerStatus
    heard_s: float
    link: WorkerLink
    identity: str
    """`kv_identity` of the status."""
    seen: WorkerSeen
    silent_s: float = 0.0
    """Time without a heartbeat while the router itself was running."""


class Membership(RegistryServicer):
    """The registry service and the view that placement ranks. Lives on the router's event loop."""

    def __init__(
        self,
        *,
        router_id: str,
        clock: Clock,
        heartbeat_timeout_s: float,
        worker_lost_after_s: float = 10.0,
        credentials: MemberCredentials = OPEN,
    ) -> None:
        """`credentials`: what workers are shown."""
        self.prefixes = PrefixIndex()
        self._credentials = credentials
        self._router_id = router_id
        self._clock = clock
        self._timeout_s = heartbeat_timeout_s
        self._lost_after_s = max(worker_lost_after_s, heartbeat_timeout_s)
        self._watching: asyncio.Task[None] | None = None
        self._members: dict[str, Member] = {}
        self._dead_epochs: OrderedDict[int, None] = OrderedDict()
        self._forgotten: OrderedDict[str, int] = OrderedDict()
        """Last epoch of workers that were silent for long: welcome again, until another life of theirs has come."""
        self._on_change: Callable[[], None] = lambda: None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    async def Heartbeat(self, status: pb.WorkerStatus, context: aio.ServicerContext) -> pb.HeartbeatReply:
        """A worker says that it lives and how loaded it is. Mismatched members are refused here, not per request."""
        if self._closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the router is stopping")
        if status.worker_id not in self._members:
            self.members()  # drops those that are long gone, though nobody looks at them
        refusal = self._refusal(status)
        if refusal:
            logger.warning("heartbeat of %s refused: %s", status.worker_id, refusal)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        member = self._members.get(status.worker_id)
        if member is None or member.status.epoch != status.epoch:
            self._join(status)
        else:
            if status.kv_layout != member.status.kv_layout or status.fingerprint != member.status.fingerprint:
                member.identity = kv_identity(status)
            member.status = status
            member.heard_s, member.silent_s = self._clock.now_s(), 0.0
            member.seen.hear(as_said(status, member.identity))
        self._changed()
        return pb.HeartbeatReply(router_id=self._router_id)

    def _refusal(self, status: pb.WorkerStatus) -> str:
        if wrong := malformed(status):
            return wrong
        if status.epoch in self._dead_epochs:
            return f"epoch: {status.epoch} of {status.worker_id} has been replaced by a newer life"
        if status.worker_id not in self._members and len(self._members) >= MAX_MEMBERS:
            return f"worker_id: the router already has {MAX_MEMBERS} members"
        return ""

    def _join(self, status: pb.WorkerStatus) -> None:
        older = self._members.pop(status.worker_id, None)
        if older is not None:
            logger.info("worker %s is back with a new epoch", status.worker_id)
            self._outlive(older.status.epoch)
            self._part(older)
        forgotten = self._forgotten.pop(status.worker_id, status.epoch)
        if forgotten != status.epoch:
            self._outlive(forgotten)
        if self._watching is None:
            self._watching = asyncio.create_task(self._give_up_silent())
        link = WorkerLink(
            worker_id=status.worker_id,
            address=status.address,
            epoch=status.epoch,
            router_id=self._router_id,
            on_change=self._changed,
            credentials=self._credentials,
        )
        identity = kv_identity(status)
        seen = WorkerSeen(as_said(status, identity), link.sent)
        self._members[status.worker_id] = Member(status, self._clock.now_s(), link, identity, seen)
        logger.info("worker %s (%s) joined from %s", status.worker_id, status.role, status.address)

    def _outlive(self, epoch: int) -> None:
        """A newer life of that worker is here: whatever this one still says is refused."""
        self._dead_epochs[epoch] = None
        while len(self._dead_epochs) > MAX_DEAD_EPOCHS:
            self._dead_epochs.popitem(last=False)

    def _forget(self, member: Member) -> None:
        del self._members[member.status.worker_id]
        self._forgotten[member.status.worker_id] = member.status.epoch
        while len(self._forgotten) > MAX_DEAD_EPOCHS:
            self._forgotten.popitem(last=False)
        self._part(member)

    async def _give_up_silent(self) -> None:
        """Gives up the streams of workers that have fallen silent. Silence counts while this loop runs: a router that
        was stopped itself has heard nobody.
        """
        period_s = min(1.0, self._lost_after_s / 4)
        last_s = self._clock.now_s()
        while True:
            await asyncio.sleep(period_s)
            now_s = self._clock.now_s()
            passed_s, last_s = min(now_s - last_s, 2 * period_s), now_s
            for member in self._members.values():
                before_s, member.silent_s = member.silent_s, member.silent_s + passed_s
                if before_s <= self._lost_after_s < member.silent_s and member.link.attached:
                    logger.warning("worker %s is silent: its requests go on elsewhere", member.status.worker_id)
                    member.link.give_up(f"no heartbeat for {self._lost_after_s:g} s")

    def _part(self, member: Member) -> None:
        self.prefixes.forget(member.status.worker_id)
        task = asyncio.create_task(member.link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    @property
    def clock(self) -> Clock:
        """The router's."""
        return self._clock

    def watch(self, on_change: Callable[[], None]) -> None:
        """`on_change` is called when a heartbeat, a stream or this router's own load may have changed the views; it
        must not block. One watcher.
        """
        self._on_change = on_change

    # --- views ------------------------------------------------------------------------------------------------------

    def routable(self, *roles: Role) -> tuple[WorkerView, ...]:
        """Workers of these roles that can take work now."""
        now_s = self._clock.now_s()
        return tuple(
            [
                member.seen.view
                for member in self._members.values()
                if member.status.role in roles and not self._why_not_routable(member, now_s)
            ]
        )

    def why_not_routable(self, member: Member) -> str:
        """Empty if it is."""
        return self._why_not_routable(member, self._clock.now_s())

    def _why_not_routable(self, member: Member, now_s: float) -> str:
        if member.status.draining:
            return "draining"
        if now_s - member.heard_s > self._timeout_s:
            return "no heartbeat"
        if not member.link.attached:
            return "not attached"
        return ""

    def link(self, worker_id: str) -> WorkerLink | None:
        """The link to the worker's current life."""
        member = self._members.get(worker_id)
        return member.link if member else None

    def kv_address(self, worker_id: str) -> str:
        """Where the worker's KV is read; empty if it is unknown."""
        member = self._members.get(worker_id)
        return member.status.kv_address if member else ""

    def members(self) -> tuple[Member, ...]:
        """All of them, routable or not; those silent for a minute are dropped first."""
        now_s = self._clock.now_s()
        for member in list(self._members.values()):
            if now_s - member.heard_s > FORGET_AFTER_S and not member.link.attached:
                self._forget(member)
        return tuple(self._members.values())

    def statuses(self) -> tuple[pb.WorkerStatus, ...]:
        """For metrics."""
        return tuple(member.status for member in self.members())

    async def close(self) -> None:
        """Closes every link, and lets no worker join any more; idempotent."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        members, self._members = self._members, {}
        await asyncio.gather(*(member.link.close() for member in members.values()), *self._closing)

    def _changed(self) -> None:
        self._on_change()


def as_said(status: pb.WorkerStatus, identity: str) -> WorkerView:
    """The worker as its heartbeat has it. `identity`: `kv_identity` of the status."""
    return WorkerView(
        worker_id=status.worker_id,
        role=Role(status.role),
        fingerprint=identity,
        block_size=max(1, status.block_size),
        num_blocks=status.num_blocks,
        available_blocks=status.free_blocks + status.cached_blocks,
        credited_blocks=status.credited_blocks,
        credit_limit_blocks=status.credit_limit_blocks,
        queued_prefill_tokens=status.queued_prefill_tokens,
        running=status.running,
        waiting=status.waiting,
        max_running=max(1, status.max_running),
        max_batched_tokens=status.max_batched_tokens or DEFAULT_TOKEN_BUDGET,
        max_waiting=status.max_waiting,
        context_tokens=status.context_tokens,
        step_time=step_time_from_proto(status.step_time),
        steps_total=max(status.learned_steps, status.steps_total),
        patient_prefill_tokens=status.patient_prefill_tokens,
    )
