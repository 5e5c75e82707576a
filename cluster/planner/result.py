"""What a search found: candidates, what became of each, and the answer. Plain data that can be saved and drawn.

Rates are requests a second of the whole candidate. Goodput is the highest rate at which, in every SLO class, the target
share of the requests keeps both promises, over the whole run and over its second half (a queue that grows shows there).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ..types import Role


class Affinity(StrEnum):
    """Where a candidate comes from."""

    HIGH = "algorithm 1"
    """DistServe's Algorithm 1 (OSDI '24, §4.1): phases placed apart, KV goes anywhere."""
    LOW = "algorithm 2"
    """DistServe's Algorithm 2 (§4.2): the same stages of both phases share a node."""
    COLOCATED = "colocated"
    """Mixed workers with chunked prefill."""
    NEIGHBOR = "local search"
    """Made from the best of the above by changing counts or limits."""


class Fate(StrEnum):
    """How far the search looked at something."""

    REFUSED = "refused"
    """Cannot run: the reason says why, with the arithmetic."""
    HOPELESS = "hopeless"
    """Not even one request alone keeps the promises."""
    BOUNDED = "bounded"
    """Its capacity bound lies below what was found elsewhere: not simulated."""
    ESTIMATED = "estimated"
    """A quick estimate lies well below what was found elsewhere: not simulated."""
    SCREENED = "screened"
    """Simulated under one seed."""
    SIMULATED = "simulated"
    """Simulated under all seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers of one role, all alike."""

    role: Role
    count: int
    tensor_parallel: int = 1
    pipeline_stages: int = 1
    max_batched_tokens: int = 2048
    """Of a step: the chunk that prompts are cut into."""
    max_running: int = 256
    batching: str = "iteration"

    @property
    def gpus(self) -> int:
        """Of all its workers."""
        return self.count * self.worker_gpus

    @property
    def worker_gpus(self) -> int:
        """Of one worker."""
        return self.tensor_parallel * self.pipeline_stages

    @property
    def label(self) -> str:
        """`2 x prefill TP 4`."""
        stages = f" PP {self.pipeline_stages}" if self.pipeline_stages > 1 else ""
        return f"{self.count} x {self.role.value} TP {self.tensor_parallel}{stages}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One placement: a pool of mixed workers, or one of prefill and one of decode workers."""

    pools: tuple[Pool, ...]
    affinity: Affinity
    cells: int = 1
    """Algorithm 2: how many groups of workers that hand off only among themselves the pools fall into; counts of the
    pools are those of all cells."""

    @property
    def gpus(self) -> int:
        """Devices in use."""
        return sum(pool.gpus for pool in self.pools)

    @property
    def disaggregated(self) -> bool:
        """Whether prefill and decode have workers of their own."""
        return len(self.pools) > 1

    @property
    def kind(self) -> str:
        """`disaggregated` or `colocated`."""
        return "disaggregated" if self.disaggregated else "colocated"

    def pool(self, role: Role) -> Pool | None:
        """Its workers of that role; None: it has none."""
        return next((pool for pool in self.pools if pool.role is role), None)

    @property
    def label(self) -> str:
        """`2 x prefill TP 2 + 1 x decode TP 1`, with the chunk where prompts and decode rows share steps."""
        text = " + ".join(pool.label for pool in self.pools)
        if not self.disaggregated:
            text += f", chunks of {self.pools[0].max_batched_tokens}"
        return text + (f" in {self.cells} cells" if self.cells > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoint:
    """One offered rate under one seed."""

    rate: float
    seed: int
    attainment: float
    """Of the worst class relative to the others: all classes have the same target."""
    late_attainment: float
    """The same over the second half of the run."""
    requests: int
    decided_early: bool = False
    """The run was ended when nothing could have changed the answer: the attainments are bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What limits goodput: the promise that is broken most just above it."""

    promise: str
    """`ttft` or `tpot`."""
    slo_class: str
    share: float
    """Of all misses there, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % interval (Student's t); as wide as it is with few seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of a latency over all answered requests, seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What clients would see of a candidate at one rate, over all seeds."""

    rate: float
    attainment: float
    """Of all requests under a promise, whatever their class."""
    by_class: dict[str, float]
    """Attainment by SLO class."""
    ttft: Quantiles
    tpot: Quantiles | None
    """None: no answer had more than one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """One split of one phase alone, the other phase costless (Algorithm 1)."""

    role: Role
    tensor_parallel: int
    pipeline_stages: int
    fate: Fate
    goodput: float = 0.0
    """Of one worker."""
    bound: float = 0.0
    """Of one worker: its capacity, before any simulation."""
    max_batched_tokens: int = 0
    max_running: int = 0
    why: str = ""
    """Where refused or hopeless: the arithmetic."""

    @property
    def gpus(self) -> int:
        """Of one worker."""
        return self.tensor_parallel * self.pipeline_stages

    @property
    def goodput_per_gpu(self) -> float:
        """What Algorithm 1 compares."""
        return self.goodput / self.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What became of one candidate."""

    candidate: Candidate
    fate: Fate
    why: str = ""
    """Where refused, hopeless or bounded, and where nothing is expected of it."""
    bound: float = 0.0
    """Of its capacity, requests a second."""
    estimate: float = 0.0
    """Of its goodput, before any simulation."""
    goodput: Interval = Interval(mean=0.0, low=0.0, high=0.0)
    seeds: tuple[float, ...] = ()
    """Goodput under each seed."""
    points: tuple[RatePoint, ...] = ()
    """Attainment against rate, by rate and seed."""
    binding: Binding | None = None
    piles_up: bool = False
    """Above goodput load is left over before a promise tells: what it computes binds, none of them."""
    keeps_target_rate: bool | None = None
    """None: no rate was asked for."""
    simulated_requests: int = 0
    simulated_s: float = 0.0
    """Processor seconds that it took."""
    prediction: Prediction | None = None
    """At the rate that was asked for, else at goodput; of the best of their kind only."""
    decided: bool = True
    """False: the time limit or an interruption cut the simulations of it short. `goodput` and `seeds` are then what had
    been seen of it, its lowest that is sure; 0 and none where nothing was, and there is the `estimate` only."""

    @property
    def at_bound(self) -> bool:
        """Whether what it computes at most holds it down under every seed: its interval then knows no chance."""
        return len(self.seeds) > 1 and self.bound > 0.0 and min(self.seeds) >= self.bound

    @property
    def goodput_per_gpu(self) -> float:
        """Requests a second for each device in use."""
        return self.goodput.mean / self.candidate.gpus

    def cost_per_million_tokens(self, price_per_gpu_hour: float, tokens_per_request: float, rate: float = 0.0) -> float:
        """In the price's currency, at `rate` requests a second (0: at goodput); inf where nothing is served."""
        tokens_per_s = (rate or self.goodput.mean) * tokens_per_request
        return self.candidate.gpus * price_per_gpu_hour / 3600 / tokens_per_s * 1e6 if tokens_per_s else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marginal:
    """What one more worker of a role would bring to the best plan."""

    role: Role
    gpus: int
    goodput: float
    """With it."""
    gain: float
    """Requests a second more than without: under a seed that is expected to be like the mean, than that; else under the
    first one, than there."""

    @property
    def gain_per_gpu(self) -> float:
        """Of the added devices."""
        return self.gain / self.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """The answer."""

    disaggregated: Evaluation | None
    """The best one; None: none is possible here (`why` of those in `explored` says why), or the side is not decided."""
    colocated: Evaluation | None
    difference: Interval | None
    """Disaggregated minus colocated, goodput for each GPU, paired by seed; None without both."""
    explored: tuple[Evaluation, ...]
    """Everything that was looked at, best first, those that were refused last."""
    phases: tuple[PhaseResult, ...]
    marginal: tuple[Marginal, ...] = ()
    infeasible: str = ""
    """Why nobody could keep the promises, with the numbers; empty: somebody can."""
    input_tokens: float = 0.0
    """Of a request, mean."""
    output_tokens: float = 0.0
    target_rate: float | None = None
    seeds: tuple[int, ...] = ()
    resolution: float = 0.0
    """Relative: how finely goodput was searched for."""
    simulated_requests: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of all processes together."""
    complete: bool = True
    """False: the time budget or an interruption ended the search early."""
    interrupted: bool = False
    """It was a signal (Ctrl-C, SIGTERM), not the time limit."""
    disaggregated_decided: bool = True
    """False: the search ended before this side was looked at as a whole search would. `disaggregated` is then the best
    so far, under as many seeds as its `seeds` says, or None where nothing was simulated: see `likely`."""
    colocated_decided: bool = True
    """The same of the other side."""
    notes: tuple[str, ...] = field(default=())

    @property
    def decided(self) -> bool:
        """Whether both sides are, so that the verdict is one."""
        return self.disaggregated_decided and self.colocated_decided

    def likely(self, disaggregated: bool) -> Evaluation | None:
        """What promises most of one side by its estimate alone (`Evaluation.estimate`, requests a second; nothing of it
        need have been simulated): what to name of a side that is not decided. None: no estimate was made.
        """
        able = [one for one in self.explored if one.candidate.disaggregated is disaggregated and one.estimate > 0.0]
        return max(able, key=lambda one: one.estimate / one.candidate.gpus, default=None)

    @property
    def best(self) -> Evaluation | None:
        """Disaggregated or colocated: with a target rate, who keeps it with fewer devices; else more goodput a GPU."""
        found = [one for one in (self.disaggregated, self.colocated) if one is not None and one.goodput.mean > 0.0]
        if not found:
            return None
        if self.target_rate is not None:
            return max(found, key=lambda one: (bool(one.keeps_target_rate), -one.candidate.gpus, one.goodput.mean))
        return max(found, key=lambda one: one.goodput_per_gpu)
