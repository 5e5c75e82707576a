"""The device seam: a few methods, called from the engine thread only."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from ....kernels.picked import Picked
from ....kvtransfer.collective.ports import RankPort
from ....kvtransfer.store import KVStore
from ...latency.interface import StepCosts
from ..plan import StepOutput, StepPlan


class Device(ABC):
    """One model replica's compute and KV memory. Owned by one engine thread; nothing here is thread-safe but `kv`."""

    name: str
    """`cpu`, `cuda` or `paced`."""
    kv: KVStore
    """The KV memory by block. Readable and writable from other threads for blocks that the caller holds."""
    vocab_size: int
    fingerprint: str
    """Hex digest over weights, rope and KV dtype: equal fingerprints mean exchangeable KV."""
    costs: StepCosts | None = None
    """What its steps take, where that is known before they run."""
    late_steps_total: int = 0
    """Steps that took longer than the device's own latency model says; 0 where it has none."""
    picked: Picked = Picked("none", "it computes nothing")
    """Who computes, and why."""
    plans_ahead: int = 1
    """Plans that may be launched before the oldest is collected."""
    looks_ahead: bool = False
    """Whether a row may be computed from the token that its sequence's row of the plan before draws, while that one is
    outstanding (`plan.DRAWN`).
    """

    @abstractmethod
    def launch(self, plan: StepPlan) -> None:
        """Starts one step; once per plan, in order, `plans_ahead` of them at most before the oldest is collected. May
        return before the work is done: steps take effect in plan order. Raises on a malformed plan.
        """

    @abstractmethod
    def collect(self) -> StepOutput:
        """Blocks until the oldest launched plan is done and returns its output."""

    def done(self) -> bool:
        """Whether the oldest launched plan is known to be done: it is collected before the next one is planned. A
        device that does not tell before `collect` says False.
        """
        return False

    def wait(self, wake: threading.Event) -> bool:
        """Blocks until the oldest launched plan is done (True), or `wake` is set (False, or True if both are), while
        another plan could be launched but there is none. A device that does not wait for two things says True at once:
        its `collect` will wait.
        """
        return True

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:  # noqa: B027 - most lose nothing
        """`on_lost` is called once, from any thread, when something that the device cannot be without has ended while
        nobody computes; at once where it has. Once, before the first `launch`. A device in this process loses nothing.
        """

    def other_ranks(self) -> Sequence[RankPort]:
        """How KV between workers reaches the ranks beside this process's own, in order; none where there is one."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Frees memory and threads; idempotent."""
