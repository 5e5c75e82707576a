"""What a search works on: a problem with its files read. Plain data, sent once to every process that simulates."""

from __future__ import annotations

from dataclasses import dataclass

from ...router.slo_classes import Promise
from ..latency.links import Link
from ..sim.compose import promises
from ..sim.deploy import DeviceModel
from ..types import Role
from ..workload.spec import Workload
from .problem import Problem
from .result import Pool

RPC_S = 0.0005
"""A command's way to a worker and a token's way back, on a network inside a data center."""
OWN_S = 0.001
"""The router's own work on a request."""
MIN_RUN_S, RUN_LIVES = 40.0, 2.0
MIN_REQUESTS, MAX_REQUESTS = 300, 700
LASTING_REQUESTS = 5000
"""Of the longest run that looks whether a rate lasts."""
UNSEEN = 0.03
"""Of a load: how much of it may be left over in a run that lasts, and nobody's promise tells."""
SAMPLE_REQUESTS = 400
"""Looked at where a mean or a share over the workload is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """See the module."""

    device: DeviceModel
    nodes: int
    gpus_per_node: int
    inside: Link
    between: Link
    workload: Workload
    promises: dict[str, Promise]
    """By SLO class."""
    target: float
    """Share of a class's requests that must keep both promises."""
    target_rate: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    mean_output: float
    """Tokens of an answer."""
    max_tensor_parallel: int | None = None
    """None: as many as a node has."""
    max_pipeline_stages: int | None = None
    """None: as many as the model's layers allow."""
    rpc_s: float = RPC_S
    own_s: float = OWN_S

    @property
    def gpus(self) -> int:
        """In all."""
        return self.nodes * self.gpus_per_node

    @property
    def _life_s(self) -> float:
        """How long a request takes that just keeps its promises."""
        promised = self.promises.values()
        return max((one.ttft_s or 0.0) + (one.tpot_s or 0.0) * self.mean_output for one in promised)

    @property
    def _patience_s(self) -> float:
        """The longest promise of a first token."""
        return max(promise.ttft_s or 0.0 for promise in self.promises.values())

    @property
    def run_s(self) -> float:
        """How long requests come in a run that compares: several times as long as one takes that just keeps its
        promises, so that batches have grown.
        """
        return max(MIN_RUN_S, RUN_LIVES * self._life_s)

    @property
    def lasting_s(self) -> float:
        """How long requests come in a run that is reported. Where a share e of the load is left over, waits grow by
        e seconds a second, and only after patience / e is a promise broken: a run that is shorter shows the start of
        an overload and calls it kept.
        """
        growing_s = self._patience_s / UNSEEN
        return self.run_s if growing_s <= MIN_RUN_S else RUN_LIVES * self._life_s + growing_s

    def run_requests(self, rate: float) -> int:
        """Requests of a run near that rate, which is compared with others as short."""
        return int(min(MAX_REQUESTS, max(MIN_REQUESTS, rate * self.run_s)))

    def lasting_requests(self, rate: float) -> int:
        """The same of one that is reported, at least as many."""
        return int(min(LASTING_REQUESTS, max(self.run_requests(rate), rate * self.lasting_s)))

    def unseen(self, rate: float) -> float:
        """What share of the load may be left over in `lasting_requests` at that rate without a promise broken."""
        lasts_s = self.lasting_requests(rate) / rate
        growing_s = max(lasts_s - RUN_LIVES * self._life_s, lasts_s / 2)
        return min(1.0, self._patience_s / growing_s)


def setting_of(problem: Problem) -> Setting:
    """Reads what the problem names. ValueError naming what cannot be read or does not fit together."""
    inside, between = problem.links()
    workload, first = problem.requests(), problem.search.seed
    drawn = workload.draw(rate=1.0, seconds=None, num_requests=SAMPLE_REQUESTS, seed=first)
    return Setting(
        device=problem.device(),
        nodes=problem.nodes,
        gpus_per_node=problem.node_gpus,
        inside=inside,
        between=between,
        workload=workload,
        promises=promises(problem.workload),
        target=problem.attainment,
        target_rate=problem.rate,
        mean_output=sum(row.output_tokens for row in drawn) / len(drawn),
        seeds=tuple(range(first, first + problem.search.seeds)),
        max_tensor_parallel=problem.search.max_tensor_parallel,
        max_pipeline_stages=problem.search.max_pipeline_stages,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Requests of the workload without their times: lengths and promises, in the order in which they come."""

    input_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    classes: tuple[str, ...]
    arrivals: tuple[float, ...]
    """At one request a second."""

    def first(self, count: int) -> Sample:
        """The first `count` of them."""
        if count >= len(self.arrivals):
            return self
        return Sample(
            input_tokens=self.input_tokens[:count],
            output_tokens=self.output_tokens[:count],
            classes=self.classes[:count],
            arrivals=self.arrivals[:count],
        )

    @property
    def mean_input(self) -> float:
        """Tokens of a prompt."""
        return sum(self.input_tokens) / len(self.input_tokens)

    @property
    def mean_output(self) -> float:
        """Tokens of an answer."""
        return sum(self.output_tokens) / len(self.output_tokens)


def draw_sample(setting: Setting, seed: int, count: int = SAMPLE_REQUESTS) -> Sample:
    """`count` requests as `seed` draws them."""
    rows = setting.workload.draw(rate=1.0, seconds=None, num_requests=count, seed=seed)
    return Sample(
        input_tokens=tuple(row.input_tokens for row in rows),
        output_tokens=tuple(row.output_tokens for row in rows),
        classes=tuple(row.slo_class for row in rows),
        arrivals=tuple(row.arrival_s for row in rows),
    )


def default_pool(
    role: Role, count: int, tensor_parallel: int, pipeline_stages: int, max_batched_tokens: int, max_running: int = 256
) -> Pool:
    """A pool as the search begins with it."""
    return Pool(
        role=role,
        count=count,
        tensor_parallel=tensor_parallel,
        pipeline_stages=pipeline_stages,
        max_batched_tokens=max_batched_tokens,
        max_running=max_running,
    )
