"""A simulated cluster: a router, workers and the links between them, and a workload through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ..latency.links import Link
from ..types import Role
from .links import Medium
from .member import SimMember
from .request import Asked, Outcome
from .router import RouterSpec, SimRouter
from .timeline import Timeline
from .worker import SimWorker, WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What is simulated."""

    workers: tuple[WorkerSpec, ...]
    router: RouterSpec
    inside: Link
    """Between two workers of one node; each node has one such medium a direction."""
    between: Link
    """Out of a node, and into one."""


class SimCluster:
    """One run: `run` once."""

    def __init__(self, spec: ClusterSpec) -> None:
        """ValueError where the workers are neither mixed ones nor prefill and decode."""
        roles = {worker.role for worker in spec.workers}
        if roles not in ({Role.MIXED}, {Role.PREFILL, Role.DECODE}):
            found = ", ".join(sorted(roles)) or "none"
            raise ValueError(f"workers: {found} are not allowed; allowed: mixed ones, or prefill and decode")
        self.timeline = Timeline()
        self._spec = spec
        self._in_flight = 0
        self.workers = [
            SimWorker(self.timeline, worker, epoch=number, rpc_s=spec.router.rpc_s)
            for number, worker in enumerate(spec.workers, 1)
        ]
        self._members = [SimMember(worker) for worker in self.workers]
        self.router = SimRouter(self.timeline, spec.router, self._members, self._on_end)
        self._by_id = {worker.spec.worker_id: worker for worker in self.workers}
        self._links: dict[str, Medium] = {}
        for worker in self.workers:
            worker.wire(
                find=self._by_id.get,
                links=self._links_between,
                on_heard=self.router.on_heard,
                on_refused=self.router.on_refused,
            )

    def run(
        self,
        workload: Iterable[Asked],
        *,
        decided: Callable[[float, Sequence[Outcome]], bool] | None = None,
        decided_period_s: float = 1.0,
    ) -> list[Outcome]:
        """Serves the workload, in order of arrival, to its end; outcomes in the same order. ValueError where a request
        could never run here.

        `decided`: asked every `decided_period_s` of virtual time with the time and all outcomes as they stand; True
        ends the run there, because the rest would not change what its caller wants to know.
        """
        outcomes = [Outcome(asked=asked) for asked in workload]
        room = min(min(worker.max_model_len, worker.num_blocks * worker.block_size) for worker in self._spec.workers)
        for outcome in outcomes:
            _check(outcome.asked, room)
        self._in_flight = len(outcomes)
        coming = iter(outcomes)

        def next_arrival() -> None:
            outcome = next(coming, None)
            if outcome is not None:
                self.timeline.at(outcome.asked.arrival_s, lambda: arrive(outcome))

        def arrive(outcome: Outcome) -> None:
            next_arrival()
            self.router.arrive(outcome.asked, outcome)

        next_arrival()
        period_s = self._spec.router.heartbeat_s
        for number, member in enumerate(self._members):
            self.timeline.after(period_s * number / len(self._members), partial(self._beat, member))
        if decided is not None:
            self._ask(decided, decided_period_s, outcomes)
        self.timeline.run()
        return outcomes

    def _ask(
        self, decided: Callable[[float, Sequence[Outcome]], bool], period_s: float, outcomes: Sequence[Outcome]
    ) -> None:
        def ask() -> None:
            if decided(self.timeline.now_s(), outcomes):
                self.timeline.end()
            elif self._in_flight:
                self.timeline.after(period_s, ask)

        self.timeline.after(period_s, ask)

    def _beat(self, member: SimMember) -> None:
        if not self._in_flight:
            return
        member.worker.tick()
        member.heartbeat()
        self.router.changed()
        self.timeline.after(self._spec.router.heartbeat_s, lambda: self._beat(member))

    def _on_end(self, outcome: Outcome) -> None:
        self._in_flight -= 1

    def _links_between(self, source: SimWorker, target: SimWorker) -> Sequence[Medium]:
        if source.spec.node == target.spec.node:
            return (self._link(f"inside {source.spec.node}", self._spec.inside),)
        out, into = f"out of {source.spec.node}", f"into {target.spec.node}"
        return (self._link(out, self._spec.between), self._link(into, self._spec.between))

    def _link(self, name: str, link: Link) -> Medium:
        if name not in self._links:
            bytes_per_s, latency_s = link.bandwidth_gb_s * 1e9, link.latency_us * 1e-6
            self._links[name] = Medium(name=name, bytes_per_s=bytes_per_s, latency_s=latency_s)
        return self._links[name]

    def crossed_bytes(self) -> dict[str, int]:
        """KV that crossed each medium, by its name."""
        return {name: medium.bytes_total for name, medium in self._links.items()}


def _check(asked: Asked, room: int) -> None:
    longest = len(asked.prompt_token_ids) + asked.output_tokens
    if longest > room:
        raise ValueError(
            f"{asked.request_id}: {longest} tokens of prompt and output are not allowed; allowed: at most {room}, "
            "what the smallest worker holds"
        )
