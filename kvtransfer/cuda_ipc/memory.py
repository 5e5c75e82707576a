"""The seam between a pull and the device that copies for it: three small interfaces, called from the worker's loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..layout import KVLayout


class DeviceLost(RuntimeError):
    """The device could not copy: the peer's memory is gone, or the device has failed."""


class DeviceCopy(ABC):
    """A copy that is under way."""

    @abstractmethod
    def done(self) -> bool:
        """Whether all its bytes are where they belong, or it failed (`DeviceLost`). Never blocks."""

    @abstractmethod
    def wait(self) -> None:
        """Blocks until it is done, from any thread; again: returns at once. `DeviceLost` if it failed."""


class PeerMemory(ABC):
    """The blocks of another process in device memory, mapped for reading."""

    @abstractmethod
    def begin_copy(
        self, source_ids: Sequence[int], target_ids: Sequence[int], *, first_token: int, num_tokens: int
    ) -> DeviceCopy:
        """Begins to copy the KV of tokens `first_token`, `first_token` + 1, … into this worker's own blocks: token t
        lies in the peer's block `source_ids[t // its block size]` and goes into `target_ids[t // own block size]`.
        Where both sizes are equal, and the tokens whole blocks, whole blocks are copied. Ids that no token lies in are
        not looked at. `DeviceLost` where it cannot be begun.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the mapping; no copy is under way. Idempotent."""


class DeviceMemory(ABC):
    """A worker's own KV in device memory, as others can have it."""

    fd: int
    """A descriptor of the memory, the first block first; stays the owner's."""

    @abstractmethod
    def open(self, fd: int, layout: KVLayout, num_blocks: int) -> PeerMemory:
        """Maps the memory of another process, whose blocks may be of another size than this one's but are otherwise
        alike; `fd` stays the caller's. `SegmentError`: why it cannot be had.
        """
