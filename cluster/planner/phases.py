"""Both phases apart (DistServe, OSDI '24, §4.1): every split of each, refused, hopeless, or with its goodput.

That is an estimate, from the same step times and arrivals as a simulation (`estimate`): it chooses which splits to
pair, and what is paired is then simulated whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..types import Role
from .crew import Means
from .outlook import Hopeless, Outlook
from .place import all_splits, replica_of
from .result import Fate, PhaseResult, Pool
from .setting import default_pool

SINGLE, PIPED = (2048,), (512, 1024, 2048)
"""Tokens of a step, to begin with: prefill is saturated (DistServe, §3.1), a decode worker can compute a prompt again.
In a pipeline the parts of one prompt are computed at once in several stages: smaller ones are tried too."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A `crew.Task`: the estimate of one worker of a phase alone."""

    pool: Pool
    seed: int

    def do(self, means: Means) -> float:
        """Goodput, requests a second."""
        return means.outlook.estimate(self.pool, self.seed).goodput


class Phases:
    """Of one outlook. `look`, then `take` what was asked for."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._seed = outlook.setting.seeds[0]
        self.results: dict[Pool, PhaseResult] = {}
        """By the worker that was looked at."""
        self.hopeless: list[Hopeless] = []
        self.refused: list[str] = []

    def look(self) -> list[Ask]:
        """Refuses and bounds every split of both phases; what is left is to be estimated."""
        gpus = self._outlook.setting.gpus
        for role in (Role.PREFILL, Role.DECODE):
            for tensor, stages in all_splits(self._outlook.setting):
                if tensor * stages < gpus:
                    piped = role is Role.PREFILL and stages > 1
                    pools = [default_pool(role, 1, tensor, stages, budget) for budget in (PIPED if piped else SINGLE)]
                    self.results |= {pool: self._look_at(pool) for pool in pools}
        return [Ask(pool, self._seed) for pool, one in self.results.items() if one.fate is Fate.ESTIMATED]

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
        return replace(result, bound=self._outlook.capacity(pool))

    def take(self, asks: Sequence[Ask], goodputs: Sequence[float | None]) -> None:
        """What was estimated; None: there was no time for it."""
        for ask, goodput in zip(asks, goodputs, strict=True):
            self.results[ask.pool] = replace(self.results[ask.pool], goodput=goodput or 0.0)

    def of(self, role: Role) -> list[PhaseResult]:
        """Those of one phase, the best for each GPU first; of each split the best."""
        found: dict[tuple[int, int], PhaseResult] = {}
        for one in sorted(self.results.values(), key=lambda one: -one.goodput_per_gpu):
            if one.role is role:
                found.setdefault((one.tensor_parallel, one.pipeline_stages), one)
        return list(found.values())
