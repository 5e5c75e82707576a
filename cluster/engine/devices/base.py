"""The device seam: four methods, called from the engine thread only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

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

    @abstractmethod
    def launch(self, plan: StepPlan) -> None:
        """Starts one step; once per plan, in order. May return before the work is done. Raises on a malformed plan."""

    @abstractmethod
    def collect(self) -> StepOutput:
        """Blocks until the oldest launched plan is done and returns its output."""

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:  # noqa: B027 - most lose nothing
        """`on_lost` is called once, from any thread, when something that the device cannot be without has ended while
        nobody computes; at once where it has. Once, before the first `launch`. A device in this process loses nothing.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees memory and threads; idempotent."""
