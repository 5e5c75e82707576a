"""Finds KV that is already there: full blocks by the chained key of their tokens (`cluster.hashing`).

A block enters once its KV is written, and leaves when the pool hands it out anew. Two sequences may compute the same
content at the same time: the first to register wins, the other's block stays unnamed and goes back to the free list.
The idea is vLLM's automatic prefix caching; keeping blocks in least-recently-released order is the pool's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..types import BlockRef
from .block_pool import BlockPool, IntegrityError


class PrefixCache:
    """Maps block keys to blocks of one pool. Disabled, it finds and keeps nothing."""

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self.enabled = enabled
        self._pool = pool
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._block_of)

    def lookup(self, keys: Iterable[bytes]) -> tuple[BlockRef, ...]:
        """The blocks of the longest run of known keys from the start. Changes nothing: share them before the next
        `allocate`, or they may be evicted.
        """
        found: list[BlockRef] = []
        for key in keys:
            block_id = self._block_of.get(key)
            if block_id is None:
                break
            found.append(self._pool.ref(block_id))
        return tuple(found)

    def register(self, keys: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Names held blocks whose KV is written; keys[i] is the content of block_ids[i]. Known keys stay as they
        are.
        """
        if not self.enabled:
            return
        for key, block_id in zip(keys, block_ids, strict=True):
            if key in self._block_of:
                continue
            if block_id in self._key_of:
                raise IntegrityError(f"prefix cache: block {block_id} has a name already; it was written twice")
            self._block_of[key] = block_id
            self._key_of[block_id] = key
            self._pool.retain(block_id)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Takes the names off held blocks whose content is in doubt; whoever holds them may go on."""
        for block_id in block_ids:
            if block_id in self._key_of:
                self._forget(block_id)
                self._pool.unretain(block_id)

    def check_integrity(self) -> None:
        """Proves that both maps are each other's inverse. O(entries); raises IntegrityError."""
        if len(self._block_of) != len(self._key_of):
            raise IntegrityError(f"prefix cache: {len(self._block_of)} keys for {len(self._key_of)} blocks")
        for key, block_id in self._block_of.items():
            if self._key_of.get(block_id) != key:
                raise IntegrityError(f"prefix cache: block {block_id} does not know the key that names it")
            if not self._pool.is_retained(block_id):
                raise IntegrityError(f"prefix cache: the pool would free block {block_id}, which has a name")

    def _forget(self, block_id: int) -> None:
        del self._block_of[self._key_of.pop(block_id)]
