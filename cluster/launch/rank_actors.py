"""The other ranks of a worker as actors of Ray, beside their leader in the cluster's placement group.

1. The driver books a bundle of its placement group for each pipeline stage of a worker, so that a stage's ranks share a
   node, and makes the leader's actor in the first of them.
2. The leader makes an actor for each other rank (`RankActors.recruit`), in its stage's bundle, and waits at a door
   (`engine.parallel.door`) until all have come. It owns them: Ray ends them with it, wherever they are.
3. An actor joins its leader and then is what a child of the worker would be (`engine.parallel.follower`).
4. A rank that ends ends the leader's engine, and so its process; Ray makes the leader again, and that makes all ranks
   again: a worker starts and ends as a whole.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from ..auth import MemberCredentials
from ..config import ConfigError, SecurityConfig, WorkerConfig, is_loopback
from ..engine.parallel.door import Joined, Offer, RankDoor, join
from ..engine.parallel.followers import START_S
from ..engine.parallel.messages import RankLost
from ..engine.parallel.rank_process import RankProcess
from .local_process import LocalProcess
from .process_setup import ignore_interrupts, set_threads

_POLL_S = 0.02
_BOOKED_S = 30.0
"""How long a worker waits, as it starts, for bundles that Ray is moving off a lost node."""
_WILDCARDS = ("0.0.0.0", "::")


class RankActor:
    """One rank, in a thread of this process. Called by Ray only; the leader's end is this process's end."""

    def __init__(self, offer: Offer, security: SecurityConfig, reference: str, threads: int) -> None:
        ignore_interrupts()
        set_threads(threads)
        self._error = ""
        arguments = (offer, security, reference)
        threading.Thread(target=self._run, args=arguments, name="rank", daemon=True).start()

    def error(self) -> str:
        """Why it could not join; empty where nothing is known to be wrong."""
        return self._error

    def _run(self, offer: Offer, security: SecurityConfig, reference: str) -> None:
        from ..engine.parallel.follower import serve

        try:
            link, kv_link = join(offer, MemberCredentials.load(security), START_S)
        except Exception as error:  # Whatever it was, the leader must hear of it.
            self._error = f"{type(error).__name__}: {error}"
            return
        serve(link, kv_link, None if offer.is_local else reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class Booked:
    """Where a worker's ranks stand."""

    group: Any
    """Ray's placement group."""
    first_bundle: int
    """Of the worker's first stage, where its leader is; the other stages' follow."""
    cpus: float
    """What Ray books for a rank."""


class RankActors:
    """The leader's side. `recruit` is a `rank_process.Recruit`."""

    def __init__(self, booked: Booked, config: WorkerConfig) -> None:
        self._booked = booked
        self._config = config
        self._actors: dict[int, Any] = {}
        self.pids: tuple[int, ...] = ()
        """Of the ranks' processes, once they are there."""

    def recruit(self, num_ranks: int) -> list[RankProcess]:
        """Makes actors for ranks 1 … n - 1 and waits until they have joined. Raises RankLost, ConfigError, OSError."""
        import ray

        bundles = {
            rank: self._booked.first_bundle + rank // self._config.engine.tensor_parallel for rank in range(num_ranks)
        }
        nodes, here = self._nodes(), ray.get_runtime_context().get_node_id()
        remote = {rank: nodes[bundles[rank]] != here for rank in range(1, num_ranks)}
        host = leader_host(self._config, remote=any(remote.values()), node_host=str(ray.util.get_node_ip_address()))
        door = RankDoor(remote, host, MemberCredentials.load(self._config.security))
        try:
            for rank in remote:
                self._actors[rank] = self._make(door.offer(rank), bundles[rank])
            joined = door.wait(START_S, self._check)
        except BaseException:
            for actor in self._actors.values():
                _end(actor)
            raise
        finally:
            door.close()
        self.pids = tuple(one.pid for one in joined)
        return [_Actor(one, self._actors[one.rank]) for one in joined]

    def _nodes(self) -> dict[int, str]:
        """The node of each bundle of the placement group, as Ray names it."""
        import ray

        deadline_s = time.monotonic() + _BOOKED_S
        while True:
            table = ray.util.placement_group_table(self._booked.group)
            if table["state"] == "CREATED":
                return dict(table["bundles_to_node_id"])
            if time.monotonic() > deadline_s:
                raise RankLost(f"Ray has no room for all of this worker's ranks (its placement is {table['state']})")
            time.sleep(_POLL_S)

    def _make(self, offer: Offer, bundle: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        engine, booked = self._config.engine, self._booked
        strategy = PlacementGroupSchedulingStrategy(booked.group, placement_group_bundle_index=bundle)
        actor = ray.remote(RankActor).options(
            num_cpus=booked.cpus,
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy=strategy,
        )
        return actor.remote(offer, self._config.security, engine.model, engine.threads)

    def _check(self) -> None:
        """Raises RankLost for an actor that will not join."""
        import ray

        questions = {actor.error.remote(): rank for rank, actor in self._actors.items()}
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=0.5)
        for question in answered:
            try:
                error = ray.get(question)
            except ray.exceptions.RayError as lost:
                error = _in_short(lost)
            if error:
                raise RankLost(f"rank {questions[question]}: {error}")


class _Actor(RankProcess):
    """A rank that has joined."""

    def __init__(self, joined: Joined, actor: Any) -> None:
        self.rank, self.pid = joined.rank, joined.pid
        self.link, self.kv_link = joined.link, joined.kv_link
        self.host, self.leader_host = joined.host, joined.leader_host
        self._actor = actor
        self._process = LocalProcess(self.pid, self.link) if self.is_local else None

    def ended(self) -> str:
        return ", which has ended" if self.is_local and self.wait(0.2) else ""  # its socket's end comes before its own

    def kill(self) -> None:
        if self._process is not None:  # at once, and also when Ray's head is away
            self._process.kill()
            return
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)  # it ends itself; and Ray ends it with its owner

    def wait(self, timeout_s: float) -> bool:
        return self._process is None or self._process.wait(timeout_s)


def leader_host(config: WorkerConfig, *, remote: bool, node_host: str) -> str:
    """Where a worker's other ranks reach it; `remote`: some stand on other nodes, `node_host`: the node's own address.
    ConfigError where they cannot, or may not.
    """
    if not remote:
        return config.host
    if is_loopback(config.host):
        raise ConfigError("host", config.host, "an address that the nodes of this worker's other ranks reach")
    if config.security.tls_cert is not None:
        allowed = (
            "none for a worker whose ranks stand on several nodes, as they cannot encrypt what they say to each other; "
            "give it one node (nodes), or fewer pipeline_stages"
        )
        raise ConfigError("security.tls_cert", config.security.tls_cert, allowed)
    return node_host if config.host in _WILDCARDS else config.host


def _end(actor: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor, no_restart=True)


def _in_short(lost: Exception) -> str:
    """What of Ray's words about an actor that is gone is for people."""
    words = " ".join(str(lost).split())
    return "its node is lost" if "node has died" in words else f"its actor is lost ({words[:200]})"
