"""The seam between the worker shell and the two services that a worker may hold (`prefill_worker`, `decode_worker`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from asyncio import TimerHandle
from dataclasses import dataclass

from ..engine.scheduler_events import SchedulerEvent
from ..proto import tandem_internal_v1_pb2 as pb
from ..types import Role, Side, seq_id


@dataclass(slots=True)
class LiveSequence:
    """One attempt that this worker runs for a router: who hears about it and who handles its events."""

    seq_id: str
    request_id: str
    choice: int
    attempt: int
    router_id: str
    side: Side
    owner: RoleService
    timer: TimerHandle | None = None
    """Fires at the request's deadline."""
    told: bool = False
    """Whether the router has had the timings that go with this side's first tokens."""

    @classmethod
    def of(cls, message: pb.Sequence, attempt: int, owner: RoleService) -> LiveSequence:
        """The attempt that a router asks `owner` for."""
        key = seq_id(message.request_id, message.choice, owner.side, attempt)
        return cls(key, message.request_id, message.choice, attempt, message.router_id, owner.side, owner)


class RoleService(ABC):
    """One role's behavior. All calls come on the worker's event loop."""

    side: Side
    roles: frozenset[Role]
    """Roles in which this service takes work."""

    @abstractmethod
    def on_event(self, sequence: LiveSequence, event: SchedulerEvent) -> None:
        """The scheduler did something with one of this service's sequences. Once per event; must not block."""

    @abstractmethod
    def end(self, sequence: LiveSequence, reason: str) -> None:
        """Ends a sequence at any stage and frees what it holds: abort, deadline, its router is gone. Idempotent."""

    @abstractmethod
    def tick(self, now_s: float) -> None:
        """Several times a second: expire leases, credits and waits."""

    @abstractmethod
    def fill_status(self, status: pb.WorkerStatus) -> None:
        """Adds this service's counts to a heartbeat."""

    @abstractmethod
    def idle(self) -> bool:
        """Whether nothing is promised to anybody: the end of a drain."""

    @abstractmethod
    async def close(self) -> None:
        """Ends transports and tasks; idempotent."""


class PrefillHandler(RoleService):
    """What the `Worker` servicer needs of the prefill service."""

    side = Side.PREFILL
    roles = frozenset({Role.PREFILL, Role.MIXED})

    @abstractmethod
    async def prefill(self, request: pb.PrefillRequest) -> None:
        """Admits a prompt. Raises `rpc.Refusal`."""

    @abstractmethod
    def abort(self, request: pb.AbortRequest) -> None:
        """Aborts the named attempt and all before it; remembers it for a while if it has not come yet."""


class DecodeHandler(RoleService):
    """What the `Worker` servicer needs of the decode service."""

    side = Side.DECODE
    roles = frozenset({Role.DECODE, Role.MIXED})

    @abstractmethod
    async def reserve(self, request: pb.ReserveRequest) -> int:
        """Grants a credit and returns its id. Raises `rpc.Refusal`."""

    @abstractmethod
    def router_gone(self, router_id: str) -> None:
        """A router's stream broke: credits that it has not redeemed end. Its sequences are ended one by one."""

    @abstractmethod
    async def decode(self, request: pb.DecodeRequest) -> None:
        """Redeems a credit. Raises `rpc.Refusal`."""

    @abstractmethod
    def abort(self, request: pb.AbortRequest) -> None:
        """Aborts the named attempt and all before it, credit included; remembers it if it has not come yet."""
