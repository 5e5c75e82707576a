from __future__ import annotations

import pytest
from tandem.cluster.engine.block_pool import BlockPool, IntegrityError
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.hashing import block_keys

TOKENS = list(range(1, 13))
KEYS = block_keys(TOKENS, 4)


def test_the_longest_run_of_known_keys_is_found() -> None:
    pool = BlockPool(8, 4)
    cache = PrefixCache(pool, True)
    refs = pool.allocate(3, "a")
    cache.register(KEYS[:2], [ref.block_id for ref in refs[:2]])
    assert cache.lookup(KEYS) == refs[:2]
    assert cache.lookup(block_keys([9, *TOKENS[1:]], 4)) == ()
    assert cache.lookup(block_keys(TOKENS, 4, b"another model")) == ()
    cache.check_integrity()


def test_a_cached_block_is_found_until_it_is_handed_out_anew() -> None:
    pool = BlockPool(3, 4)
    cache = PrefixCache(pool, True)
    refs = pool.allocate(3, "a")
    cache.register(KEYS, [ref.block_id for ref in refs])
    pool.release("a")
    assert cache.lookup(KEYS) == refs
    pool.allocate(1, "b")  # evicts the tail
    assert cache.lookup(KEYS) == refs[:2]
    assert len(cache) == 2
    cache.check_integrity()
    pool.check_integrity(["b"])


def test_the_first_to_register_wins_and_the_other_block_goes_back() -> None:
    pool = BlockPool(4, 4)
    cache = PrefixCache(pool, True)
    (first,) = pool.allocate(1, "a")
    (second,) = pool.allocate(1, "b")
    cache.register(KEYS[:1], [first.block_id])
    cache.register(KEYS[:1], [second.block_id])
    assert cache.lookup(KEYS) == (first,)
    pool.release("a")
    pool.release("b")
    assert (pool.num_free, pool.num_cached) == (3, 1)
    cache.check_integrity()


def test_a_block_has_one_name() -> None:
    pool = BlockPool(4, 4)
    cache = PrefixCache(pool, True)
    (ref,) = pool.allocate(1, "a")
    cache.register(KEYS[:1], [ref.block_id])
    with pytest.raises(IntegrityError, match="has a name already"):
        cache.register(KEYS[1:2], [ref.block_id])


def test_disabled_it_keeps_nothing() -> None:
    pool = BlockPool(4, 4)
    cache = PrefixCache(pool, False)
    (ref,) = pool.allocate(1, "a")
    cache.register(KEYS[:1], [ref.block_id])
    assert cache.lookup(KEYS) == ()
    pool.release("a")
    assert pool.num_free == 4


def test_doubtful_content_is_forgotten() -> None:
    pool = BlockPool(4, 4)
    cache = PrefixCache(pool, True)
    refs = pool.allocate(3, "a")
    cache.register(KEYS, [ref.block_id for ref in refs])
    pool.share(refs[:1], "b")
    cache.forget(pool.table("b"))
    cache.forget(pool.table("b"))
    assert cache.lookup(KEYS) == ()
    assert cache.lookup(KEYS[1:]) == refs[1:]
    pool.release("a")
    pool.release("b")
    assert (pool.num_free, pool.num_cached) == (2, 2)
    pool.check_integrity(())
    cache.check_integrity()
    with pytest.raises(IntegrityError, match="nobody holds it"):
        cache.forget([refs[1].block_id])
