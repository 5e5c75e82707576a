"""The router's guess of what each worker has cached: leading blocks only, bounded, forgotten tail first."""

from __future__ import annotations

from tandem.cluster.hashing import block_keys
from tandem.router.prefix_index import PrefixIndex

TOKENS = tuple(range(64))
KEYS = block_keys(TOKENS, 16)


def test_a_match_counts_leading_blocks_only() -> None:
    index = PrefixIndex()
    index.insert("w", KEYS[:2], 100)
    assert index.match_blocks("w", KEYS) == 2
    assert index.match_blocks("w", block_keys((9, *TOKENS[1:]), 16)) == 0
    index.insert("w", KEYS[3:], 100)
    assert index.match_blocks("w", KEYS) == 2  # the third is missing


def test_workers_are_apart_and_forgotten_whole() -> None:
    index = PrefixIndex()
    index.insert("a", KEYS, 100)
    assert index.match_blocks("b", KEYS) == 0
    index.forget("a")
    index.forget("never seen")
    assert index.match_blocks("a", KEYS) == 0


def test_a_full_index_forgets_the_oldest_and_of_it_the_tail_first() -> None:
    index = PrefixIndex()
    other = block_keys(tuple(range(100, 148)), 16)
    index.insert("w", KEYS, 5)
    index.insert("w", other, 5)
    assert index.match_blocks("w", other) == 3
    assert index.match_blocks("w", KEYS) == 2


def test_what_is_sent_again_is_remembered_longer() -> None:
    index = PrefixIndex()
    other = block_keys(tuple(range(100, 132)), 16)
    index.insert("w", KEYS[:2], 4)
    index.insert("w", other, 4)
    index.insert("w", KEYS[:2], 4)
    index.insert("w", block_keys(tuple(range(200, 232)), 16), 4)
    assert index.match_blocks("w", KEYS) == 2
    assert index.match_blocks("w", other) == 0


def test_a_prompt_larger_than_the_worker_keeps_its_head() -> None:
    index = PrefixIndex()
    index.insert("w", KEYS, 2)
    assert index.match_blocks("w", KEYS) == 2
