"""What a member says about itself to the driver, and what the driver makes of it. Plain data."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


class LaunchError(RuntimeError):
    """The cluster could not be started or has failed for good; the message is one line for the user."""


class Phase(enum.StrEnum):
    """Where in its life a member is."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LEAVING = "leaving"
    """It drains and then ends its process, because it was asked to: whoever watches starts it anew."""
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"
    """Its process does not answer; Ray is restarting it. Set by the driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberState:
    """A member's report about itself."""

    phase: Phase
    stage: str = ""
    """What it is doing, for people."""
    fraction: float | None = None
    """How much of the stage is done, 0 to 1; None: unknown."""
    error: str | None = None
    """One line, with phase FAILED."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Router: http, grpc, registry. Worker: grpc, kv. Each host:port."""
    epoch: int = 0
    healthy: bool = False
    not_serving: str = ""
    """The router's: why a request could not be served now; empty where one could."""
    warning: str = ""
    """One line for the operator about a member that serves; empty: nothing."""
    started_s: Mapping[str, float] = field(default_factory=dict)
    """Of a member that is ready: what its start took, stage by stage."""
    pid: int = 0
    rank_pids: tuple[int, ...] = ()
    """Of a worker's other ranks, those of other nodes included; empty where they are children of its process."""
    host: str = ""
    """IP address of its node."""

    def change(self, **changes: Any) -> MemberState:
        """Returns the state with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """A member as the driver sees it."""

    name: str
    """`router`, or where there are several `router-0` and so on, or the worker's id."""
    role: str
    """`router`, `prefill`, `decode` or `mixed`."""
    state: MemberState
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where clients go, each host:port."""

    http: str
    grpc: str
    registries: tuple[str, ...]
    """Of each router process."""

    @property
    def registry(self) -> str:
        """The first of them."""
        return self.registries[0]
