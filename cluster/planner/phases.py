"""Both phases apart (DistServe, OSDI '24, §4.1): every split of each, refused, hopeless, or with its goodput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..types import Role
from .crew import Found, Search
from .goodput import Precision
from .outlook import Hopeless, Outlook
from .place import all_splits, replica_of
from .result import Fate, PhaseResult, Pool
from .setting import default_pool

BATCHED_TOKENS = 2048
"""Of a step, to begin with: prefill is saturated (DistServe, §3.1), a decode worker can compute a prompt again."""
SIMULATED = 1
"""Splits of each phase that are simulated."""
PROMISING = 0.85
"""Of the best estimate for each GPU: what is below is not simulated."""


class Phases:
    """Of one outlook. `look`, then simulate `searches`, then `take` what they found."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._seed = outlook.setting.seeds[0]
        self.results: dict[Pool, PhaseResult] = {}
        """By the worker that was looked at."""
        self.hopeless: list[Hopeless] = []
        self.refused: list[str] = []

    def look(self) -> None:
        """Refuses, bounds and estimates every split of both phases."""
        gpus = self._outlook.setting.gpus
        for role in (Role.PREFILL, Role.DECODE):
            for tensor, stages in all_splits(self._outlook.setting):
                if tensor * stages < gpus:
                    pool = default_pool(role, 1, tensor, stages, BATCHED_TOKENS)
                    self.results[pool] = self._look_at(pool)

    def _look_at(self, pool: Pool) -> PhaseResult:
        result = PhaseResult(
            role=pool.role,
            tensor_parallel=pool.tensor_parallel,
            pipeline_stages=pool.pipeline_stages,
            fate=Fate.ESTIMATED,
            max_batched_tokens=pool.max_batched_tokens,
            max_running=pool.max_running,
        )
        try:
            self._outlook.setting.device.memory(replica_of(pool))
            hopeless = self._outlook.hopeless(pool)
        except ValueError as error:
            self.refused.append(str(error))
            return replace(result, fate=Fate.REFUSED, why=str(error))
        if hopeless is not None:
            self.hopeless.append(hopeless)
            return replace(result, fate=Fate.HOPELESS, why=hopeless.text)
        bound = self._outlook.capacity(pool)
        return replace(result, bound=bound, goodput=self._outlook.goodput(pool, self._seed))

    def searches(self, precision: Precision) -> list[Search]:
        """The splits of both phases that promise most for each GPU."""
        found = []
        for role in (Role.PREFILL, Role.DECODE):
            able = [(pool, one) for pool, one in self.results.items() if pool.role is role and one.goodput > 0.0]
            able.sort(key=lambda item: -item[1].goodput_per_gpu)
            best = able[0][1].goodput_per_gpu if able else 0.0
            for pool, one in able[:SIMULATED]:
                if one.goodput_per_gpu >= PROMISING * best:
                    slope = self._outlook.slope(pool, self._seed)
                    found.append(
                        Search(what=pool, seed=self._seed, start=one.goodput, slope=slope, precision=precision)
                    )
        return found

    def take(self, founds: Sequence[Found]) -> None:
        """Simulated goodput in the place of estimates."""
        for found in founds:
            assert isinstance(found.search.what, Pool)
            before = self.results[found.search.what]
            self.results[found.search.what] = replace(
                before, fate=Fate.SCREENED, goodput=min(found.goodput, before.bound)
            )

    def of(self, role: Role) -> list[PhaseResult]:
        """Those of one phase, the best for each GPU first."""
        return sorted((one for one in self.results.values() if one.role is role), key=lambda one: -one.goodput_per_gpu)
