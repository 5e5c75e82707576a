"""What the simulator says of a cluster of real processes on this machine: the same workers, requests and promises, and
what the machine adds to them as measured constants (`Overheads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...router.slo_classes import INTERACTIVE_SHARE, Promise
from ..config import EngineConfig, RouterConfig
from ..latency.links import Link
from ..latency.measured import read_measured
from ..latency.model_facts import model_facts
from ..latency.profile import MEASURED, StepProfile, read_json, read_profile
from ..sim.cluster import ClusterSpec, SimCluster
from ..sim.record import record
from ..sim.request import Asked, Outcome
from ..sim.router import RouterSpec
from ..sim.worker_spec import WorkerSpec
from ..types import SLO, Role
from ..workload.sweep import SweepRun
from ..workload.traces import TraceRequest
from .claims_cluster import System
from .claims_load import Staircase, judge, quantiles_ms
from .validate_beside import slowed
from .validate_pace import AS_MEASURED, Pace

FIRST_TOKEN_CALLS = 4
"""Of one call's time each, from admission to the first token at the router: credit and its answer, the prompt's
command, the token's way back."""
_INSTANT_GB_S = 1e6
_MAX_HANDOFF_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What processes on this machine add to what the latency model says, seconds of the real clock."""

    first_token_s: float = 0.0
    """To the first token of an answer that nothing else disturbs; half of it is the router's own, half is calls."""
    prompt_token_s: float = 0.0
    """The same for each token of its prompt: read, checked, sent on."""
    step_s: float = 0.0
    """To every step: what a worker does between two, and by how much it oversleeps."""
    row_s: float = 0.0
    """To a decode step, for each row."""
    handoff_s: float = 0.0
    """From the end of prefill to where its KV can be used, beyond one call's time and what its bytes take."""
    handoff_byte_s: float = 0.0
    """For each byte of KV that is not hidden behind prefill; of paced workers, whose KV is next to nothing: 0."""
    beside_share: float = 0.0
    """Of its own time, that an engine takes longer while another one computes (`validate_beside`)."""
    others_busy: float = 0.0
    """Of the machine's processors, what others used while these were measured: it makes them larger."""

    @property
    def rpc_s(self) -> float:
        """One call's time, one way."""
        return self.first_token_s / (2 * FIRST_TOKEN_CALLS)

    @property
    def own_s(self) -> float:
        """The router's work before admission, with the client's way to it."""
        return self.first_token_s / 2

    def on(self, profile: StepProfile) -> StepProfile:
        """The steps of that profile on this machine."""
        return replace(
            profile,
            overhead_s=profile.overhead_s + self.step_s,
            decode=replace(profile.decode, row_s=profile.decode.row_s + self.row_s),
            large_decode=replace(profile.large_decode, row_s=profile.large_decode.row_s + self.row_s),
        )


NONE = Overheads()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A cluster that can be started and simulated."""

    system: System
    profile: str | None = None
    """File of the step profile of an engine that computes; None: each engine's own, `paced_profile`."""
    pace: Pace = AS_MEASURED
    """The machine's, beside when that was measured."""
    router: RouterConfig = field(default_factory=lambda: RouterConfig(max_waiting=1024))
    """Its bounds and settings; promises are the load's."""

    @property
    def label(self) -> str:
        """Of the system."""
        return self.system.label

    def workers(self, overheads: Overheads) -> tuple[WorkerSpec, ...]:
        """The same in virtual time. ValueError where no profile is known."""
        system = self.system
        pools = (
            (Role.PREFILL, system.prefill, system.prefill_engine or system.engine),
            (Role.DECODE, system.decode, system.engine),
            (Role.MIXED, system.mixed, system.engine),
        )
        return tuple(
            self._worker(f"{role.value}-{number}", role, engine, overheads)
            for role, count, engine in pools
            for number in range(count)
        )

    def profile_of(self, engine: EngineConfig) -> StepProfile:
        """Its steps at the machine's pace, as if it were alone. ValueError."""
        file = self.profile or engine.paced_profile
        if file is None:
            raise ValueError("profile: is missing; allowed: the file of a step profile (tandem profile)")
        return self.pace.on(read_profile(Path(file)))

    def link(self) -> Link | None:
        """What KV crosses between two workers of this machine, by the profile's transfers; None: it has none, or the
        workers' KV is next to nothing, as paced ones' is. ValueError.
        """
        if self.profile is None or MEASURED not in read_json(self.profile):
            return None
        links = read_measured(self.profile).links
        return links.get("mapped") or links.get("grpc")

    def _worker(self, worker_id: str, role: Role, engine: EngineConfig, overheads: Overheads) -> WorkerSpec:
        facts = model_facts(engine.model.removeprefix("dummy:"), dtype=engine.dtype)
        block_bytes = facts.kv_bytes_per_token() * engine.block_size
        return WorkerSpec(
            worker_id=worker_id,
            role=role,
            costs=overheads.on(self.profile_of(engine)),
            num_blocks=engine.kv_cache_bytes // block_bytes,
            block_size=engine.block_size,
            block_bytes=block_bytes,
            max_batched_tokens=engine.max_batched_tokens,
            max_running=engine.max_running,
            max_waiting=engine.max_waiting,
            max_model_len=engine.max_model_len or facts.config.max_model_len,
            batching=engine.batching,
            prefix_cache=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedStair:
    """One rate under one seed."""

    run: SweepRun
    quantiles_ms: dict[str, tuple[float, ...]]
    """See `claims_load.quantiles_ms`."""


def router_for(subject: Subject, load: Staircase) -> RouterConfig:
    """The router as it would serve: it refuses what it cannot serve within the load's first promise."""
    promise = load.promises[0]
    slo = SLO(ttft_s=promise.ttft_s * load.time_scale, tpot_s=promise.tpot_s * load.time_scale)
    return replace(subject.router, slo=slo, slo_classes={}, request_timeout_s=3600.0)


def predict(subject: Subject, load: Staircase, overheads: Overheads, warmups: int) -> list[PredictedStair]:
    """Each rate of the staircase, under its first promise and seed. ValueError."""
    outcomes = simulate(subject, load, overheads, warmups)
    records = [record(outcome) for outcome in outcomes]
    judged = load.judged()
    found = []
    for place in range(len(load.rates)):
        run = judge(records, load, load.promises[0], place, client_late=False)
        own = [record for record, on in zip(records, judged, strict=True) if on == place]
        found.append(PredictedStair(run=run, quantiles_ms=quantiles_ms(own, load.time_scale)))
    return found


def simulate(subject: Subject, load: Staircase, overheads: Overheads, warmups: int) -> list[Outcome]:
    """The load in virtual time, on the clock of the real run, behind warm-ups that come one by one."""
    warm = load.warmup_rows(warmups)
    workers = subject.workers(overheads)
    gap_s = 2 * _longest_s(workers, warm) if warm else 0.0
    begin_s = gap_s * len(warm)
    asked = [_asked(f"warm-{place}", place * gap_s, row) for place, row in enumerate(warm)]
    asked += [
        _asked(str(place), begin_s + arrival_s, row)
        for place, (arrival_s, row) in enumerate(zip(load.arrivals_s(), load.rows(), strict=True))
    ]
    spec = ClusterSpec(
        workers=workers,
        router=router_spec(router_for(subject, load), overheads),
        inside=this_machine(overheads),
        between=this_machine(overheads),
    )
    return slowed(SimCluster(spec).run(asked)[len(warm) :], overheads.beside_share)


def router_spec(config: RouterConfig, overheads: Overheads) -> RouterSpec:
    """That router in virtual time: the same promise, the same bounds."""
    promise = Promise(slo_class="", share=INTERACTIVE_SHARE, ttft_s=config.slo.ttft_s, tpot_s=config.slo.tpot_s)
    return RouterSpec(
        promises={"": promise},
        max_waiting=config.max_waiting,
        refuses=True,
        own_s=overheads.own_s,
        own_token_s=overheads.prompt_token_s,
        rpc_s=overheads.rpc_s,
        local_threshold_tokens=config.local_prefill_threshold_tokens,
    )


def this_machine(overheads: Overheads) -> Link:
    """What KV crosses between two processes."""
    handoff_s, byte_s = min(overheads.handoff_s, _MAX_HANDOFF_S), overheads.handoff_byte_s
    bandwidth_gb_s = min(_INSTANT_GB_S, 1e-9 / byte_s) if byte_s > 0.0 else _INSTANT_GB_S
    return Link(name="this machine", bandwidth_gb_s=bandwidth_gb_s, latency_us=handoff_s * 1e6)


def _asked(name: str, arrival_s: float, row: TraceRequest) -> Asked:
    return Asked(
        request_id=name,
        arrival_s=arrival_s,
        prompt_token_ids=(0,) * row.input_tokens,
        output_tokens=row.output_tokens,
    )


def _longest_s(workers: Sequence[WorkerSpec], rows: Sequence[TraceRequest]) -> float:
    """What any of them takes at most on an idle cluster."""
    found = 0.0
    for worker in workers:
        for row in rows:
            prompt_s = worker.costs.step_time_s(row.input_tokens, row.input_tokens**2, 0, 0)
            found = max(found, prompt_s + row.output_tokens * worker.costs.step_time_s(0, 0, 1, row.input_tokens))
    return found
