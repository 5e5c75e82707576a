"""Block pool and prefix cache against a model that keeps, for each block, who holds it and what it says."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tandem.cluster.engine.block_pool import BlockPool, OutOfBlocks
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.hashing import block_keys
from tandem.cluster.types import BlockRef

SIZE = 2
CONTENT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


class BlockPoolMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(1, 10), enabled=st.booleans())
    def start(self, blocks: int, enabled: bool) -> None:
        self.pool = BlockPool(blocks, SIZE)
        self.cache = PrefixCache(self.pool, enabled)
        self.tables: dict[str, list[BlockRef]] = {}
        self.generations = [0] * blocks
        self.named: dict[bytes, int] = {}  # the model of the prefix cache
        self.lru: list[int] = []  # the model of the cached blocks, next to be evicted first
        self.count = 0

    def held(self) -> set[int]:
        return {ref.block_id for table in self.tables.values() for ref in table}

    @rule(count=st.integers(0, 6), fork=st.integers(0, 5))
    def admit(self, count: int, fork: int) -> None:
        """As the scheduler does: look up, share the hits, allocate the rest, write, register."""
        holder, self.count = f"h{self.count}", self.count + 1
        tokens = [*CONTENT[: 2 * min(fork, count)], *(100 + 7 * fork + i for i in range(2 * max(0, count - fork)))]
        keys = block_keys(tokens, SIZE)
        hits = self.cache.lookup(keys)
        expected = []
        for key in keys:
            if key not in self.named:
                break
            expected.append(self.named[key])
        assert [ref.block_id for ref in hits] == expected
        new = len(keys) - len(hits)
        available = self.pool.num_blocks - len(self.held() | set(expected))
        self.pool.share(hits, holder)
        self.lru = [block_id for block_id in self.lru if block_id not in expected]
        assert self.pool.can_allocate(new) == (new <= available)
        if hits:
            self.tables[holder] = list(hits)
        if new > available:
            self.refused(new, holder)
            self.let_go(holder)
            return
        free = self.pool.num_free
        fresh = self.pool.allocate(new, holder)
        for ref in fresh[free:]:  # the rest were evicted, in order
            assert ref.block_id == self.lru.pop(0)
            self.named = {key: block_id for key, block_id in self.named.items() if block_id != ref.block_id}
        for ref in fresh:
            self.generations[ref.block_id] += 1
        if hits or fresh:
            self.tables[holder] = [*hits, *fresh]
        self.cache.register(keys, [ref.block_id for ref in (*hits, *fresh)])
        if self.cache.enabled:
            for key, ref in zip(keys, (*hits, *fresh), strict=True):
                self.named.setdefault(key, ref.block_id)

    def refused(self, count: int, holder: str) -> None:
        try:
            self.pool.allocate(count, holder)
        except OutOfBlocks:
            return
        raise AssertionError("more blocks than there are")

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.tables)), "holder")
        assert self.let_go(holder) > 0
        assert self.pool.release(holder) == 0

    def let_go(self, holder: str) -> int:
        table = self.tables.pop(holder, [])
        held, named = self.held(), set(self.named.values())
        self.lru += [ref.block_id for ref in reversed(table) if ref.block_id not in held and ref.block_id in named]
        return self.pool.release(holder)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(self.tables)
        self.cache.check_integrity()
        assert self.pool.holders() == frozenset(self.tables)
        for holder, table in self.tables.items():
            assert [self.pool.ref(block_id) for block_id in self.pool.table(holder)] == table
        assert [self.pool.generation(i) for i in range(self.pool.num_blocks)] == self.generations
        assert self.pool.num_held == len(self.held())
        assert self.pool.num_cached == len(self.lru)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_held == self.pool.num_blocks
        assert len(self.cache) == len(self.named)


BlockPoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase
