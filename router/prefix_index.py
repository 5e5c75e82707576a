"""The router's guess of which prompt prefixes each worker has cached. A hint: the worker knows, and decides.

The router inserts what it sends; each worker's part is a least-recently-used set as large as the worker's own pool,
so it forgets about when the worker does. Keys are `cluster.hashing.block_keys`, the same as the workers' prefix
caches use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """Chained block keys per worker. Pure."""

    def __init__(self) -> None:
        self._keys: dict[str, OrderedDict[bytes, None]] = {}

    def insert(self, worker_id: str, keys: Sequence[bytes], capacity_blocks: int) -> None:
        """The worker is about to hold these blocks; at most `capacity_blocks` are remembered."""
        held = self._keys.setdefault(worker_id, OrderedDict())
        # Tail first, so that a chain's head is the last of it to be forgotten.
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        while len(held) > capacity_blocks:
            held.popitem(last=False)

    def match_blocks(self, worker_id: str, keys: Sequence[bytes]) -> int:
        """How many leading blocks the worker probably has."""
        held = self._keys.get(worker_id)
        if not held:
            return 0
        for count, key in enumerate(keys):
            if key not in held:
                return count
        return len(keys)

    def forget(self, worker_id: str) -> None:
        """The worker is gone or has a new epoch: its memory is empty."""
        self._keys.pop(worker_id, None)
