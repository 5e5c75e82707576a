"""Which placements to look at: DistServe's two algorithms (OSDI '24, §4), and mixed workers.

Algorithm 1 (§4.1) takes the best splits of each phase alone and replicates them in the proportion in which their rates
meet. Algorithm 2 (§4.2) splits both phases into the same pipeline stages and puts matching ones on one node, so that KV
stays inside it. Both only propose: what they propose is then simulated whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil, gcd

from ..types import Role
from .result import Affinity, Candidate, PhaseResult, Pool
from .setting import Setting, default_pool

Rank = Callable[[Candidate, float], float]
BEST_SPLITS = 4
"""Of each phase that Algorithm 1 pairs."""
PROPOSALS = 12
CHUNKS = (256, 512, 1024, 2048)


def algorithm_1(setting: Setting, prefill: Sequence[PhaseResult], decode: Sequence[PhaseResult]) -> list[Candidate]:
    """The best splits of both phases in pairs, as many workers of each as meet and the cluster holds; best first."""
    found: dict[Candidate, float] = {}
    for one in _best(prefill):
        for other in _best(decode):
            counts = _counts(setting.gpus, one.gpus, other.gpus, one.goodput, other.goodput)
            counts += _enough(setting, one, other)
            for n, m in counts:
                candidate = _pair(one, other, n, m, Affinity.HIGH, 1)
                found[candidate] = min(n * one.goodput, m * other.goodput)
    return _ranked(setting, found)


def algorithm_2(setting: Setting, prefill: Sequence[PhaseResult], decode: Sequence[PhaseResult]) -> list[Candidate]:
    """Pairs of the same pipeline stages whose matching stages fit into a node together, as many such cells as the
    cluster holds; best first. On one node Algorithm 1 proposes the same, so that nothing is left to propose.
    """
    if setting.nodes == 1:
        return []
    size, found = setting.gpus_per_node, dict[Candidate, float]()
    for one in prefill:
        for other in decode:
            if one.pipeline_stages != other.pipeline_stages or not (one.goodput and other.goodput):
                continue
            stages = one.pipeline_stages
            widths = one.tensor_parallel, other.tensor_parallel
            for n, m in _counts(size, *widths, one.goodput, other.goodput):
                segment = n * widths[0] + m * widths[1]
                cells = (size // segment) * setting.nodes // stages
                if setting.target_rate is not None:
                    each = min(n * one.goodput, m * other.goodput)
                    cells = min(cells, ceil(setting.target_rate / each))
                if cells:
                    candidate = _pair(one, other, n * cells, m * cells, Affinity.LOW, cells)
                    found[candidate] = cells * min(n * one.goodput, m * other.goodput)
    return _ranked(setting, found)


def colocated(setting: Setting, splits: Iterable[tuple[int, int]], gpus: int) -> list[Candidate]:
    """Mixed workers of every split and chunk, as many as `gpus` devices hold."""
    found = []
    for tensor, stages in splits:
        count = gpus // (tensor * stages)
        if count:
            for chunk in CHUNKS:
                pool = default_pool(Role.MIXED, count, tensor, stages, chunk)
                found.append(Candidate(pools=(pool,), affinity=Affinity.COLOCATED))
    return found


def few_enough(setting: Setting, candidate: Candidate, goodput: float) -> list[Candidate]:
    """As many of the same mixed workers as keep the rate that is wanted, and one more, by what all of `candidate` keep;
    none where that is not fewer, or no rate is wanted.
    """
    (pool,) = candidate.pools
    if setting.target_rate is None or goodput <= 0.0:
        return []
    count = ceil(pool.count * setting.target_rate / goodput)
    fewer = [other for other in (count, count + 1) if other < pool.count]
    return [replace(candidate, pools=(replace(pool, count=other),)) for other in fewer]


def _best(phases: Sequence[PhaseResult]) -> list[PhaseResult]:
    able = [phase for phase in phases if phase.goodput > 0.0]
    return sorted(able, key=lambda phase: -phase.goodput_per_gpu)[:BEST_SPLITS]


def _counts(gpus: int, one: int, other: int, one_rate: float, other_rate: float) -> list[tuple[int, int]]:
    """(n, m) where neither has more than it needs, as often as the devices allow: for each n the m that meets its rate
    and the one below, of equal proportions the largest.
    """
    largest: dict[tuple[int, int], tuple[int, int]] = {}
    for n in range(1, max(1, (gpus - other) // one) + 1):
        exact = n * one_rate / other_rate
        for m in {max(1, int(exact)), max(1, int(exact) + 1), min(max(1, round(exact)), (gpus - n * one) // other)}:
            if m >= 1 and n * one + m * other <= gpus:
                shared = gcd(n, m)
                ratio = n // shared, m // shared
                times = gpus // (ratio[0] * one + ratio[1] * other)
                largest[ratio] = ratio[0] * times, ratio[1] * times
    return list(largest.values())


def _enough(setting: Setting, one: PhaseResult, other: PhaseResult) -> list[tuple[int, int]]:
    """(n, m) that keep the rate that is wanted, and one more of either; none: no rate is wanted."""
    if setting.target_rate is None:
        return []
    n, m = ceil(setting.target_rate / one.goodput), ceil(setting.target_rate / other.goodput)
    around = [(n, m), (n + 1, m), (n, m + 1)]
    return [(n, m) for n, m in around if n * one.gpus + m * other.gpus <= setting.gpus]


def _pair(one: PhaseResult, other: PhaseResult, n: int, m: int, affinity: Affinity, cells: int) -> Candidate:
    pools = tuple(
        Pool(
            role=phase.role,
            count=count,
            tensor_parallel=phase.tensor_parallel,
            pipeline_stages=phase.pipeline_stages,
            max_batched_tokens=phase.max_batched_tokens,
            max_running=phase.max_running,
        )
        for phase, count in ((one, n), (other, m))
    )
    return Candidate(pools=pools, affinity=affinity, cells=cells)


def _ranked(setting: Setting, found: dict[Candidate, float]) -> list[Candidate]:
    """By the rate at which phases that were looked at apart meet."""
    wanted = setting.target_rate

    def rank(item: tuple[Candidate, float]) -> tuple[float, ...]:
        candidate, rate = item
        if wanted is not None:
            return (rate >= wanted, -candidate.gpus if rate >= wanted else rate, rate)
        return (rate / candidate.gpus, rate)

    return [candidate for candidate, _ in sorted(found.items(), key=rank, reverse=True)[:PROPOSALS]]
