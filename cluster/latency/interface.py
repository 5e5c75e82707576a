"""What a simulator, a planner and the paced device ask of a latency model, whatever it was made from.

A model replica has one pipeline stage or several. **Whole** is the time from a step's start in the first stage to its
tokens out of the last one: what a token waits for. **Stage** is how long the slowest stage is taken by the step: the
next step of *other* sequences may enter that much later. With one stage they are the same. A step through p even stages
takes p stage times and, where several steps follow each other closely, one comes out every stage time (DistServe,
OSDI '24, §4.1 and appendix A, which models a stage as the whole divided by p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

MAX_RUN_STEPS = 1_000_000


class StepCosts(Protocol):
    """Seconds of steps. Sizes are those of `cluster.engine.step_shape.StepShape`: prompt tokens and Σ (end² - start²)
    of their chunks, decode rows and Σ of their context, each with the token it computes; either half may be zero.

    Called once for each step of a simulated cluster: implementations hold plain numbers, keep no state, never block.
    """

    @property
    def pipeline_stages(self) -> int:
        """Stages that a step passes through, at least 1."""

    def step_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """The whole step, through all stages."""

    def stage_time_s(self, prefill_tokens: int, prefill_squares: int, decode_rows: int, context_tokens: int) -> float:
        """How long the slowest stage is taken by the step; at most `step_time_s`."""

    def decode_steps(self, rows: int, context_tokens: int, steps: int) -> StepRun:
        """When each of `steps` decode steps of the same rows ends, [steps], counted from the first one's start.

        The first reads `context_tokens`; each further one `rows` more. Every step waits for the one before it, so these
        are whole steps. ValueError if `steps` is not in 1…MAX_RUN_STEPS.
        """


class StepRun(Sequence[float]):
    """Ends of steps that follow each other, [steps], from the start of the first, each computed when it is asked for:
    the first step takes `first_s`, each further one `growth_s` more.
    """

    __slots__ = ("_first_s", "_half_growth_s", "_steps")

    def __init__(self, first_s: float, growth_s: float, steps: int) -> None:
        """ValueError if `steps` is not in 1…MAX_RUN_STEPS."""
        if not 1 <= steps <= MAX_RUN_STEPS:
            raise ValueError(f"steps: {steps} is not allowed; allowed: 1 to {MAX_RUN_STEPS}")
        self._first_s = first_s
        self._half_growth_s = 0.5 * growth_s
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, place: int) -> float: ...

    @overload
    def __getitem__(self, place: slice) -> list[float]: ...

    def __getitem__(self, place: int | slice) -> float | list[float]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(self._steps))]
        if not 0 <= place < self._steps:
            if not -self._steps <= place < 0:
                raise IndexError(f"step {place} of {self._steps}")
            place += self._steps
        return (place + 1.0) * (self._first_s + self._half_growth_s * place)
