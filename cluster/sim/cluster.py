"""A simulated cluster: a router, workers and the links between them, and a workload through it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

from ..latency.links import Link
from ..types import EngineLoad, Role
from .links import Medium
from .member import SimMember
from .observer import Observer, WorkerSample
from .request import Asked, Outcome
from .router import RouterSpec, SimRouter
from .timeline import Timeline
from .worker import SimWorker, Wiring
from .worker_spec import WorkerSpec

Decided = Callable[[float, Sequence[Outcome]], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A worker that fails: everything that it held and ran is lost."""

    worker_id: str
    at_s: float
    back_s: float | None = None
    """When it is there again, empty; None: never."""
    silent: bool = False
    """Its machine is gone, and the router is not told: it finds out by the heartbeats that do not come. Else its
    process has died, and its streams break at once. Who reads KV there finds out at once in both cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What is simulated."""

    workers: tuple[WorkerSpec, ...]
    router: RouterSpec
    inside: Link
    """Between two workers of one node; each node has one such medium a direction."""
    between: Link
    """Out of a node, and into one."""
    failures: tuple[Failure, ...] = ()


class SimCluster:
    """One run: `run` once."""

    def __init__(self, spec: ClusterSpec, observer: Observer | None = None) -> None:
        """ValueError where no worker, or no two of them, can serve a request, or a failure makes no sense."""
        _check(spec)
        self.timeline = Timeline()
        self._spec = spec
        self._observer = observer
        self._in_flight = 0
        self._inside = 0
        """Requests that came and have not ended."""
        self._next_arrival_s = math.inf
        self._epochs: Iterator[int] = count(1)
        spans = observer if observer is not None and observer.wants_spans else None
        self._by_id: dict[str, SimWorker] = {}
        self._links: dict[str, Medium] = {}
        self._wiring = Wiring(
            find=self._living,
            links=self._links_between,
            heard=lambda heard: self.router.on_heard(heard),
            turned=lambda turned: self.router.on_turned(turned),
            on_step=None if spans is None else spans.step,
            on_transfer=None if spans is None else spans.transfer,
        )
        members = [SimMember(self._worker(worker)) for worker in spec.workers]
        self._members = {member.worker.spec.worker_id: member for member in members}
        self.router = SimRouter(self.timeline, spec.router, members, self._on_end)

    @property
    def workers(self) -> list[SimWorker]:
        """Every worker in its current life, or its last one, in the order of the spec."""
        return list(self._by_id.values())

    def _worker(self, spec: WorkerSpec) -> SimWorker:
        worker = SimWorker(self.timeline, spec, self._wiring, epoch=next(self._epochs), rpc_s=self._spec.router.rpc_s)
        self._by_id[spec.worker_id] = worker
        return worker

    def _living(self, worker_id: str) -> SimWorker | None:
        worker = self._by_id.get(worker_id)
        return worker if worker is not None and worker.alive else None

    def run(
        self, workload: Iterable[Asked], *, decided: Decided | None = None, decided_period_s: float = 1.0
    ) -> list[Outcome]:
        """Serves the workload, in order of arrival, to its end; outcomes in the same order. What could never run here
        is refused.

        `decided`: asked every `decided_period_s` of virtual time with the time and all outcomes as they stand; True
        ends the run there, because the rest would not change what its caller wants to know.
        """
        outcomes = [Outcome(asked=asked) for asked in workload]
        self._in_flight = len(outcomes)
        coming = iter(outcomes)

        def next_arrival() -> None:
            outcome = next(coming, None)
            self._next_arrival_s = math.inf if outcome is None else outcome.asked.arrival_s
            if outcome is not None:
                self.timeline.do_at(outcome.asked.arrival_s, partial(arrive, outcome))

        def arrive(outcome: Outcome) -> None:
            self._inside += 1
            next_arrival()
            self.router.arrive(outcome.asked, outcome)

        next_arrival()
        period_s = self._spec.router.heartbeat_s
        for number, member in enumerate(self._members.values()):
            self.timeline.do_after(period_s * number / len(self._members), partial(self._beat, member))
        for failure in self._spec.failures:
            self.timeline.at(failure.at_s, partial(self._fail, failure))
        if decided is not None:
            self._ask(decided, decided_period_s, outcomes)
        if self._observer is not None and outcomes and math.isfinite(self._observer.sample_period_s):
            self.timeline.at(outcomes[0].asked.arrival_s, partial(self._sample, self._observer))
        with _seldom_collected():
            self.timeline.run()
        return outcomes

    def _ask(self, decided: Decided, period_s: float, outcomes: Sequence[Outcome]) -> None:
        def ask() -> None:
            if decided(self.timeline.time_s, outcomes):
                self.timeline.end()
            elif self._in_flight:
                self.timeline.after(period_s, ask)

        self.timeline.after(period_s, ask)

    def _beat(self, member: SimMember) -> None:
        if not self._in_flight or not member.worker.alive:
            return
        member.worker.tick()
        member.heartbeat()
        self.router.changed()
        period_s = self._spec.router.heartbeat_s
        if not self._inside and member.worker.idle and math.isfinite(self._next_arrival_s):
            # Until somebody comes, each beat would say what this one said.
            period_s *= max(1.0, (self._next_arrival_s - self.timeline.time_s) // period_s)
        self.timeline.do_after(period_s, partial(self._beat, member))

    def _on_end(self, outcome: Outcome) -> None:
        self._in_flight -= 1
        self._inside -= 1

    # --- failures ---------------------------------------------------------------------------------------------------

    def _fail(self, failure: Failure) -> None:
        if not self._in_flight:
            return
        member, router, spec = self._members[failure.worker_id], self.router, self._spec.router
        member.worker.die()
        if failure.silent:
            self.timeline.after(spec.heartbeat_timeout_s, partial(router.on_stale, member))
            self.timeline.after(spec.worker_lost_after_s, partial(router.on_lost, member, silent=True))
        else:
            self.timeline.after(spec.rpc_s, partial(router.on_lost, member, silent=False))
        if failure.back_s is not None:
            self.timeline.at(failure.back_s, partial(self._come_back, member))

    def _come_back(self, older: SimMember) -> None:
        if not self._in_flight:
            return
        member = SimMember(self._worker(older.worker.spec))
        self._members[member.worker.spec.worker_id] = member
        self.router.on_joined(member)
        self._beat(member)

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _sample(self, observer: Observer) -> None:
        if not self._in_flight:
            return
        workers = [_sample(worker) for worker in self.workers]
        observer.sample(self.timeline.time_s, self.router.waiting, workers)
        self.timeline.after(observer.sample_period_s, partial(self._sample, observer))

    def _links_between(self, source: SimWorker, target: SimWorker) -> Sequence[Medium]:
        if source.spec.node == target.spec.node:
            return (self._link(f"inside {source.spec.node}", self._spec.inside),)
        out, into = f"out of {source.spec.node}", f"into {target.spec.node}"
        return (self._link(out, self._spec.between), self._link(into, self._spec.between))

    def _link(self, name: str, link: Link) -> Medium:
        if name not in self._links:
            self._links[name] = Medium(name=name, bytes_per_s=link.bytes_per_s, latency_s=link.latency_s)
        return self._links[name]

    def crossed_bytes(self) -> dict[str, int]:
        """KV that crossed each medium, by its name."""
        return {name: medium.bytes_total for name, medium in self._links.items()}


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """A run makes millions of small objects and hardly any cycle: they are looked for a hundred times as seldom."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _sample(worker: SimWorker) -> WorkerSample:
    load = worker.load() if worker.alive else EngineLoad(num_blocks=worker.spec.num_blocks)
    used = load.num_blocks - load.free_blocks - load.cached_blocks if worker.alive else 0
    return WorkerSample(
        worker_id=worker.spec.worker_id,
        up=worker.alive,
        waiting=load.waiting,
        running=load.running,
        held=load.held,
        queued_prefill_tokens=load.queued_prefill_tokens,
        num_blocks=load.num_blocks,
        used_blocks=used,
        cached_blocks=load.cached_blocks,
        preemptions_total=load.preemptions_total,
    )


def _check(spec: ClusterSpec) -> None:
    roles, ids = {worker.role for worker in spec.workers}, [worker.worker_id for worker in spec.workers]
    if Role.MIXED not in roles and not {Role.PREFILL, Role.DECODE} <= roles:
        found = ", ".join(sorted(roles)) or "none"
        raise ValueError(f"workers: {found} are not allowed; allowed: mixed ones, or prefill and decode, or both")
    if len(set(ids)) < len(ids):
        raise ValueError(f"workers: {', '.join(ids)} are not allowed; allowed: each worker_id once")
    last_s: dict[str, float] = {}
    for failure in spec.failures:
        if failure.worker_id not in ids:
            raise ValueError(f"failures: worker {failure.worker_id!r} is not allowed; allowed: {', '.join(ids)}")
        at_s, back_s = failure.at_s, math.inf if failure.back_s is None else failure.back_s
        if not last_s.get(failure.worker_id, 0.0) <= at_s < back_s:
            found = f"{failure.worker_id} at {at_s:g} s, back at {back_s:g} s"
            raise ValueError(f"failures: {found} is not allowed; allowed: from 0 on, back later, one after another")
        last_s[failure.worker_id] = back_s
    if spec.failures and not math.isfinite(spec.router.timeout_s):
        raise ValueError("router.timeout_s: inf is not allowed where workers fail; allowed: seconds")
