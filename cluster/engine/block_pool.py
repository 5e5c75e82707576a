"""The ledger of KV blocks. Every block is at every moment exactly one of three things:

    free     nobody holds it and its content is worth nothing
    held     by one or more named holders: a sequence ("req/0/1"), a transport that writes ("writer:req/0/1")
    cached   nobody holds it, but the prefix cache can find its content; evicted, oldest first, when free ones run out

          allocate                     share (prefix hit)
    free ─────────▶ held ─────────────────────────────────▶ held by one more
      ▲              │ release by the last holder
      │              ├──────────────▶ cached   if retained by the prefix cache
      └──────────────┴─ otherwise       │ allocate (evicts) or share (prefix hit)
                                        ▼
                                       held

A block's generation is raised each time it is handed out anew by `allocate`, never by a hit, so that (id, generation)
names one content for ever: whoever reads a block from outside compares generations before trusting what it read.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, MutableSequence, Sequence
from functools import partial
from itertools import repeat

from ..types import BlockRef

_REF: Callable[[tuple[int, int]], BlockRef] = partial(tuple.__new__, BlockRef)
"""A reference of its two numbers, made without a call of Python's own: there is one for each block of each prompt."""


class IntegrityError(RuntimeError):
    """A ledger contradicts itself: a bug, never a user's mistake. Nothing may be served from this engine any more."""


class OutOfBlocks(RuntimeError):
    """`allocate` asked for more than `can_allocate` would have granted."""


class BlockPool:
    """Owns the ids 0 … num_blocks-1. Not thread-safe: one engine thread calls it. Every method is O(blocks it
    names).
    """

    def __init__(
        self, num_blocks: int, block_size: int, generations: MutableSequence[int] | memoryview | None = None
    ) -> None:
        """`generations`: where to keep them, all 0, so that others can read them as well; None: a list of the
        pool's own.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks} is not at least 1")
        if block_size < 1:
            raise ValueError(f"block_size: {block_size} is not at least 1 token")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_evict: Callable[[int], None] = lambda block_id: None
        """Called with a retained block's id just before it is handed out anew; set by the prefix cache."""
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._tables: dict[str, list[int]] = {}
        self._partners: dict[str, str] = {}
        """Holders that `allocate` gave the same blocks, by each other's name: what both hold counts once."""
        self._holders: list[int] = [0] * num_blocks  # how many tables name the block
        self._shares = 0
        """Sum of `_holders` beyond the first of each block."""
        self._generations = [0] * num_blocks if generations is None else generations
        if len(self._generations) != num_blocks or any(self._generations):
            raise ValueError(f"generations: not {num_blocks} zeros")
        self._retained: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and nothing is known of."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but a prefix hit could revive."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks with at least one holder."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` slots."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count, …)` would succeed."""
        return count <= len(self._free) + len(self._cached)

    def allocate(self, count: int, holder: str, *, also: str | None = None) -> tuple[BlockRef, ...]:
        """Hands out `count` blocks, appended to the holder's table; free ones first, then the least recently used
        cached ones. `also`: another, new one who holds them from the first; they stay until both have let go. Raises
        OutOfBlocks, and changes nothing, if there are not enough.

        One table with block size 4, context of 10 tokens of which 4 were found in the prefix cache:

            table("a/0/1")   [ 7 | 2 | 5 ]          shared 7, then allocated 2 and 5
            positions         0-3 4-7 8-9 ··         position p lives in table[p // 4], slot p % 4
                              hit  to compute        two slots are left for output tokens
        """
        if count > len(self._free) + len(self._cached):
            raise OutOfBlocks(
                f"{count} blocks wanted for {holder!r}, {self.num_available} of {self.num_blocks} available"
            )
        if not count:
            return ()
        ids = self._take(count)
        self._tables.setdefault(holder, []).extend(ids)
        if also is not None:
            _require(also not in self._tables and holder not in self._partners, f"{also!r} or {holder!r} is paired")
            self._tables[also] = list(ids)
            self._partners[also], self._partners[holder] = holder, also
        return tuple(map(_REF, zip(ids, map(self._generations.__getitem__, ids), strict=True)))

    def grow(self, tables: Collection[list[int]]) -> None:
        """As `allocate` of one block for every one of these holders, who have their `tables` and ask for no references;
        who stands there twice gets two.
        """
        count = len(tables)
        if count > len(self._free) + len(self._cached):
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_available} of {self.num_blocks} available")
        for table, block_id in zip(tables, self._take(count), strict=True):
            table.append(block_id)

    @property
    def tables(self) -> Mapping[str, list[int]]:
        """Every holder's table, live; read-only for callers but for `grow`."""
        return self._tables

    def share(self, refs: Sequence[BlockRef], holder: str) -> None:
        """Adds a holder to held or cached blocks, at the end of the holder's table. Generations stay.

        Raises IntegrityError, and changes nothing, if one of them has been handed out anew since, is free, or is the
        holder's already.
        """
        if not refs:
            return
        _require(holder not in self._partners, f"{holder!r} is paired and takes others' blocks")
        mine = set(self.table(holder))
        holders, cached, generations = self._holders, self._cached, self._generations
        for block_id, generation in refs:
            if not 0 <= block_id < self.num_blocks or generations[block_id] != generation:
                wanted, now = BlockRef(block_id, generation), self.generation(block_id)
                raise IntegrityError(f"{holder!r} wants {wanted}, but its generation is {now} now")
            if holders[block_id] == 0 and block_id not in cached:
                raise IntegrityError(f"{holder!r} wants {BlockRef(block_id, generation)}, but that block is free")
            if block_id in mine:
                raise IntegrityError(f"{holder!r} wants {BlockRef(block_id, generation)} twice")
            mine.add(block_id)
        for block_id, _ in refs:
            if holders[block_id] == 0:
                del cached[block_id]
            else:
                self._shares += 1
            holders[block_id] += 1
        self._tables.setdefault(holder, []).extend([ref.block_id for ref in refs])

    def release(self, holder: str) -> int:
        """The holder lets go of all its blocks; returns how many it had. Idempotent: an unknown holder has none.

        The table is walked from its end, so that the tail of a chain is evicted before the head that leads to it.
        """
        table = self._tables.pop(holder, None)
        if table is None:
            return 0
        count, holders, retained = len(table), self._holders, self._retained
        partner = self._partners.pop(holder, None)
        if partner is not None:
            del self._partners[partner]
            theirs = set(self._tables[partner])
            table = [block_id for block_id in table if block_id not in theirs]
        table.reverse()
        if not retained and not self._shares:
            for block_id in table:
                holders[block_id] = 0
            self._free.extend(table)
            return count
        free = self._free.append
        for block_id in table:
            left = holders[block_id] = holders[block_id] - 1
            if left:
                self._shares -= 1
            elif block_id in retained:
                self._cached[block_id] = None
            else:
                free(block_id)
        return count

    def retain(self, block_id: int) -> None:
        """The prefix cache knows this held block's content now: keep it, when released, until it is evicted."""
        if self._holders[block_id] == 0:
            raise IntegrityError(f"block {block_id} is retained while nobody holds it")
        self._retained.add(block_id)

    def unretain(self, block_id: int) -> None:
        """The prefix cache has forgotten this held block: when released, it is free."""
        if self._holders[block_id] == 0:
            raise IntegrityError(f"block {block_id} is forgotten while nobody holds it")
        self._retained.discard(block_id)

    def table(self, holder: str) -> Sequence[int]:
        """The holder's block ids in order: the live table, which grows; read-only for callers. Empty if unknown."""
        return self._tables.get(holder, ())

    def ref(self, block_id: int) -> BlockRef:
        """The block as it is handed out now."""
        return BlockRef(block_id, self.generation(block_id))

    def generation(self, block_id: int) -> int:
        """How often the block has been handed out. ValueError for an id that is not of this pool."""
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block_id: {block_id} is not in 0…{self.num_blocks - 1}")
        return self._generations[block_id]

    def is_held(self, block_id: int) -> bool:
        """Whether anybody holds it (False: free or cached)."""
        return self._holders[block_id] > 0

    def is_retained(self, block_id: int) -> bool:
        """Whether the prefix cache knows its content."""
        return block_id in self._retained

    def holders(self) -> frozenset[str]:
        """Names of everyone who holds a block now."""
        return frozenset(self._tables)

    def check_integrity(self, known_holders: Collection[str] | None = None) -> None:
        """Proves free + held + cached == total, no block in two states or twice in a table, counters equal to the
        tables, and (if given) no holder beside the known ones. O(num_blocks); raises IntegrityError.
        """
        counted: Counter[int] = Counter()
        for holder, table in self._tables.items():
            _require(len(set(table)) == len(table), f"a block stands twice in the table of {holder!r}: {table}")
            _require(len(table) > 0, f"{holder!r} has a table without blocks")
            counted.update(table)
        for holder, partner in self._partners.items():
            _require(self._partners.get(partner) == holder, f"{holder!r} is paired with {partner!r}, who is not")
            if holder < partner:
                counted -= Counter(set(self._tables[holder]) & set(self._tables[partner]))
        _require(self._shares == sum(held - 1 for held in counted.values()), "shared blocks are miscounted")
        for block_id in range(self.num_blocks):
            held = counted[block_id]
            _require(
                self._holders[block_id] == held, f"block {block_id}: {self._holders[block_id]} counted, {held} hold it"
            )
        free, cached, held_ids = set(self._free), set(self._cached), set(counted)
        _require(len(free) == len(self._free), "a block is twice in the free list")
        _require(not (free & cached or free & held_ids or cached & held_ids), "a block is in two states")
        total = len(free) + len(cached) + len(held_ids)
        _require(total == self.num_blocks, f"free + cached + held is {total}, not {self.num_blocks}")
        _require(cached <= self._retained, "a cached block's content is unknown to the prefix cache")
        _require(not free & self._retained, "a free block counts as retained")
        if known_holders is not None:
            unknown = sorted(set(self._tables) - set(known_holders))
            _require(not unknown, f"blocks are held by {unknown}, whom nobody knows")

    def _take(self, count: int) -> list[int]:
        """Ids of `count` blocks, which are there, with one holder each from now on."""
        free, generations, holders = self._free, self._generations, self._holders
        ids = list(map(deque.popleft, repeat(free, count if count < len(free) else len(free))))
        while len(ids) < count:
            block_id, _ = self._cached.popitem(last=False)
            self._retained.discard(block_id)
            self.on_evict(block_id)
            ids.append(block_id)
        for block_id in ids:
            holders[block_id] = 1
            # Before the block is handed out, hence before anybody writes into it (`kvtransfer.mapped.segment`).
            generations[block_id] += 1
        return ids


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(f"block pool: {message}")
