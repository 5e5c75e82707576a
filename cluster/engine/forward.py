"""The seam between the CPU device and what computes: a loaded model over one KV memory, from a checked plan to logits.

`engine.compiled` and `engine.runner` are the two that there are; `kernels.dispatch` picks.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...kvtransfer.collective.ports import RankPort
from .plan import StepPlan

Progress = Callable[[float], None]
"""Called with the share of the model that is loaded, 0 to 1."""
Stage = Callable[[str, float | None], None]
"""Called with what a start is busy with and the share of it that is done; None: not known."""
Pending = Callable[[], NDArray[np.float32]]
"""Gives the logits of a plan that was launched, once; waits for them."""


class Forward(ABC):
    """Owned by one device and used by its engine thread."""

    resident_bytes: int
    """Memory of the weights."""
    plans_ahead: int = 1
    """As `Device.plans_ahead`."""

    @abstractmethod
    def run(self, plan: StepPlan) -> NDArray[np.float32]:
        """Computes a checked plan, once per step: writes its KV and returns logits [R, V] of the rows that sample, in
        plan order. What it returns is not touched again.
        """

    def launch(self, plan: StepPlan) -> Pending:
        """Begins a checked plan, once per step, instead of `run`; what it returns is called in plan order. Whoever has
        nothing to overlap computes at once.
        """
        logits = self.run(plan)
        return lambda: logits

    def done(self) -> bool:
        """As `Device.done`."""
        return False

    def wait(self, wake: threading.Event) -> bool:
        """As `Device.wait`."""
        return True

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:  # noqa: B027 - most lose nothing
        """As `Device.watch`."""

    def other_ranks(self) -> Sequence[RankPort]:
        """As `Device.other_ranks`."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Ends threads and lets go of memory; idempotent."""
