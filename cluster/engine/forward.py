"""The seam between the CPU device and what computes: a loaded model over one KV memory, from a checked plan to logits.

`engine.compiled` and `engine.runner` are the two that there are; `kernels.dispatch` picks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .plan import StepPlan

Progress = Callable[[float], None]
"""Called with the share of the model that is loaded, 0 to 1."""
Stage = Callable[[str, float | None], None]
"""Called with what a start is busy with and the share of it that is done; None: not known."""


class Forward(ABC):
    """Owned by one device and used by its engine thread."""

    resident_bytes: int
    """Memory of the weights."""

    @abstractmethod
    def run(self, plan: StepPlan) -> NDArray[np.float32]:
        """Computes a checked plan, once per step: writes its KV and returns logits [R, V] of the rows that sample, in
        plan order. What it returns is not touched again.
        """

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:  # noqa: B027 - most lose nothing
        """As `Device.watch`."""

    @abstractmethod
    def close(self) -> None:
        """Ends threads and lets go of memory; idempotent."""
