from __future__ import annotations

import pytest
from tandem.cluster.engine.block_pool import BlockPool, IntegrityError, OutOfBlocks
from tandem.cluster.types import BlockRef


def test_a_block_is_free_held_or_cached() -> None:
    pool = BlockPool(4, 16)
    refs = pool.allocate(3, "a")
    assert refs == (BlockRef(0, 1), BlockRef(1, 1), BlockRef(2, 1))
    assert (pool.num_free, pool.num_held, pool.num_cached, pool.num_available) == (1, 3, 0, 1)
    pool.retain(1)
    assert pool.release("a") == 3
    assert (pool.num_free, pool.num_held, pool.num_cached, pool.num_available) == (3, 0, 1, 4)
    pool.check_integrity(())


def test_release_is_idempotent_and_per_holder() -> None:
    pool = BlockPool(2, 16)
    refs = pool.allocate(2, "a")
    pool.share(refs[1:], "writer:a")
    assert pool.release("a") == 2
    assert pool.release("a") == 0
    assert (pool.num_free, pool.num_held) == (1, 1)
    assert pool.release("writer:a") == 1
    assert pool.num_free == 2


def test_allocate_refuses_without_changing_anything() -> None:
    pool = BlockPool(2, 16)
    pool.allocate(1, "a")
    assert not pool.can_allocate(2)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted for 'b', 1 of 2 available"):
        pool.allocate(2, "b")
    assert pool.holders() == {"a"}
    pool.check_integrity(["a"])


def test_generation_rises_when_handed_out_anew_but_not_on_a_hit() -> None:
    pool = BlockPool(1, 16)
    (first,) = pool.allocate(1, "a")
    pool.retain(0)
    pool.release("a")
    pool.share([first], "b")
    assert pool.ref(0) == first
    pool.release("b")
    evicted: list[int] = []
    pool.on_evict = evicted.append
    (second,) = pool.allocate(1, "c")
    assert evicted == [0]
    assert second == BlockRef(0, 2)
    with pytest.raises(IntegrityError, match="its generation is 2 now"):
        pool.share([first], "d")


def test_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = BlockPool(3, 16)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    for ref in pool.allocate(3, "a"):
        pool.retain(ref.block_id)
    pool.release("a")
    pool.allocate(3, "b")
    assert evicted == [2, 1, 0]


def test_least_recently_released_is_evicted_first() -> None:
    pool = BlockPool(3, 16)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    for name in "abc":
        pool.retain(pool.allocate(1, name)[0].block_id)
    for name in "bac":
        pool.release(name)
    pool.share([pool.ref(1)], "d")  # a hit makes it the youngest
    pool.release("d")
    pool.allocate(3, "e")
    assert evicted == [0, 2, 1]


def test_share_refuses_free_foreign_and_repeated_blocks() -> None:
    pool = BlockPool(2, 16)
    (ref,) = pool.allocate(1, "a")
    with pytest.raises(IntegrityError, match="twice"):
        pool.share([ref], "a")
    with pytest.raises(IntegrityError, match="free"):
        pool.share([ref, BlockRef(1, 0)], "b")
    with pytest.raises(ValueError, match=r"block_id: 7 is not in 0…1"):
        pool.share([BlockRef(7, 1)], "b")
    assert pool.holders() == {"a"}
    with pytest.raises(IntegrityError, match="nobody holds it"):
        pool.retain(1)


@pytest.mark.parametrize("first", ["a", "writer:a"])
def test_blocks_given_to_two_stay_until_both_have_let_go(first: str) -> None:
    pool = BlockPool(6, 16)
    (hit,) = pool.allocate(1, "b")
    pool.share([hit], "a")
    refs = pool.allocate(2, "a", also="writer:a")
    pool.allocate(1, "a")
    assert (list(pool.table("a")), list(pool.table("writer:a"))) == ([0, 1, 2, 3], [1, 2])
    pool.check_integrity(["a", "b", "writer:a"])
    with pytest.raises(IntegrityError, match="paired"):
        pool.share([hit], "writer:a")
    second = "writer:a" if first == "a" else "a"
    assert pool.release(first) == len([0, 1, 2, 3] if first == "a" else refs)
    pool.check_integrity(["b", second])
    assert [pool.is_held(ref.block_id) for ref in refs] == [True, True]
    assert pool.num_available == (3 if first == "a" else 2)
    pool.release(second)
    pool.release("b")
    pool.check_integrity([])
    assert pool.num_available == 6


def test_check_integrity_sees_unknown_holders_and_broken_counters() -> None:
    pool = BlockPool(2, 16)
    pool.allocate(1, "a")
    pool.check_integrity(["a"])
    with pytest.raises(IntegrityError, match=r"held by \['a'\], whom nobody knows"):
        pool.check_integrity([])
    pool._holders[0] = 2
    with pytest.raises(IntegrityError, match="block 0: 2 counted, 1 hold it"):
        pool.check_integrity()
    pool._holders[0] = 1
    pool._free.append(0)
    with pytest.raises(IntegrityError, match="two states"):
        pool.check_integrity()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_sizes_are_checked(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="is not at least 1"):
        BlockPool(num_blocks, block_size)
