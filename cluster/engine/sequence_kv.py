"""The scheduler's dealings with KV memory, in a sequence's words: grant the context, grow, mark as written, let go."""

from __future__ import annotations

from collections.abc import Iterable

from ..types import BlockRef
from .block_pool import BlockPool, IntegrityError
from .prefix_cache import PrefixCache
from .sequence import Sequence, longest_context

WRITER = "writer:"
"""Holder prefix of a transport that writes into an IN sequence's blocks; sequence ids do not begin with it."""


class SequenceKV:
    """Joins one block pool and its prefix cache. A sequence holds its table under its own id, the transport that
    fills it holds the same blocks under `writer:` + id, so that either may let go first.
    """

    def __init__(self, pool: BlockPool, cache: PrefixCache) -> None:
        self.pool = pool
        self.cache = cache
        self.queries_tokens = 0
        self.hits_tokens = 0

    def grant(self, seq: Sequence, headroom_blocks: int) -> tuple[BlockRef, ...] | None:
        """Blocks for the whole context of `seq`, prefix hits first; None, and nothing changed, if that would leave
        fewer than `headroom_blocks` available. `computed`, `scheduled` and `registered` of `seq` then stand after the
        hit.
        """
        size, context = self.pool.block_size, len(seq.tokens)
        hits = self._hits(seq)
        new = -(-context // size) - len(hits)
        if not self._has_room(hits, new + headroom_blocks):
            return None
        if hits:
            self.pool.share(hits, seq.seq_id)
        fresh = self.pool.allocate(new, seq.seq_id, also=WRITER + seq.seq_id if seq.needs_pull else None)
        hit_tokens = len(hits) * size
        seq.registered = len(hits)
        if seq.swapped:
            seq.swapped = False
            return hits + fresh
        seq.computed = seq.scheduled = hit_tokens
        if seq.admitted_s is None:  # not a preempted one, which would find itself
            seq.cached_tokens = hit_tokens
            self.queries_tokens += context
            self.hits_tokens += hit_tokens
        return hits + fresh

    def has_room(self, seq: Sequence, headroom_blocks: int) -> bool:
        """Whether `grant` would succeed. Changes nothing."""
        hits = self._hits(seq)
        return self._has_room(hits, self.pool.blocks_for(len(seq.tokens)) - len(hits) + headroom_blocks)

    def _hits(self, seq: Sequence) -> tuple[BlockRef, ...]:
        if not self.cache.enabled:
            return ()
        # The last token must be computed to draw the next one, unless that one comes with the KV.
        size, context = self.pool.block_size, len(seq.tokens)
        limit = (context if seq.needs_pull else context - 1) // size
        return self.cache.lookup(seq.block_keys(size, 0, limit))

    def _has_room(self, hits: tuple[BlockRef, ...], new: int) -> bool:
        """Whether there are `new` blocks beside those of the hits that nobody holds now."""
        revived = sum([not self.pool.is_held(ref.block_id) for ref in hits]) if hits else 0
        return self.pool.can_allocate(revived + new)

    def grow(self, seq: Sequence) -> bool:
        """Makes sure that the position `seq.scheduled` has a slot; False if that takes a block and none is
        available.
        """
        table = self.pool.tables[seq.seq_id]
        if seq.scheduled < len(table) * self.pool.block_size:
            return True
        if not self.pool.can_allocate(1):
            return False
        self.pool.grow((table,))
        return True

    def growth_blocks(self, seq: Sequence, max_model_len: int) -> int:
        """Blocks that `seq` may yet need beside those of its context, to its end here."""
        longest = longest_context(seq.spec, max_model_len)
        return max(0, self.pool.blocks_for(longest) - self.pool.blocks_for(len(seq.tokens)))

    def written(self, seq: Sequence) -> None:
        """KV of positions < `seq.computed` is written: its full blocks may be found by others from now on."""
        if not self.cache.enabled:
            return
        full = seq.computed // self.pool.block_size
        if full > seq.registered:
            keys = seq.block_keys(self.pool.block_size, seq.registered, full)
            self.cache.register(keys, self.pool.table(seq.seq_id)[seq.registered : full])
            seq.registered = full

    def distrust(self, seq: Sequence) -> None:
        """The KV of `seq` is in doubt: none of it, hits included, is found in the prefix cache any more, or every retry
        would fail on the very same blocks.
        """
        self.cache.forget(self.pool.table(seq.seq_id))

    def release(self, seq: Sequence) -> None:
        """`seq` lets go of its blocks; a writer's hold stays. Idempotent."""
        self.pool.release(seq.seq_id)

    def writer_done(self, seq_id: str) -> None:
        """The writer lets go. Idempotent."""
        self.pool.release(WRITER + seq_id)

    def has_writer(self, seq_id: str) -> bool:
        """Whether a transport may still write into blocks granted to `seq_id`."""
        return WRITER + seq_id in self.pool.tables

    def check_integrity(self, residents: Iterable[Sequence]) -> None:
        """Proves that only residents and writers hold blocks, and residents enough of them. Raises IntegrityError."""
        names = set()
        for seq in residents:
            slots = len(self.pool.table(seq.seq_id)) * self.pool.block_size
            known = len(seq.tokens) + max(0, seq.drawing - 1)
            if not 0 <= seq.computed <= seq.scheduled <= min(slots, known):
                counts = f"{seq.computed} computed, {seq.scheduled} scheduled, {known} known or drawn, {slots} slots"
                raise IntegrityError(f"{seq.seq_id}: tokens do not fit its blocks: {counts}")
            names.add(seq.seq_id)
        writers = {name for name in self.pool.holders() if name.startswith(WRITER)}
        self.pool.check_integrity(names | writers)
        self.cache.check_integrity()
