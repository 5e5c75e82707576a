"""Prompts that are described: the same tokens and the same equalities of blocks as if they were written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sim_cases import assert_clean, cluster, split, worker
from tandem.cluster.hashing import block_keys
from tandem.cluster.sim.prompt import Prompt
from tandem.cluster.sim.prompts import asked
from tandem.cluster.sim.worker_spec import WorkerSpec
from tandem.cluster.types import Role
from tandem.cluster.workload.spec import Row


def row(tokens: int, *hash_ids: int, hash_tokens: int = 32) -> Row:
    return Row(0.0, tokens, 1, "", hash_ids, hash_tokens if hash_ids else 0)


def shared_blocks(first: list[bytes], second: list[bytes]) -> int:
    for count, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return count
    return min(len(first), len(second))


def test_it_is_the_sequence_that_it_describes() -> None:
    prompt = Prompt(7, (4, 5), 3, 9)
    assert list(prompt) == [4, 4, 4, 5, 5, 5, 9]
    assert (len(prompt), prompt[0], prompt[-1], prompt[2:5]) == (7, 4, 9, (4, 5, 5))
    assert list(Prompt(2, (4, 5), 3, 9)) == [4, 4]


@pytest.mark.parametrize("block_size", [1, 4, 16, 32, 12, 64])
def test_its_keys_are_equal_exactly_where_those_of_its_tokens_are(block_size: int) -> None:
    rows = [
        row(100, 1, 2, 3),
        row(100, 1, 2, 7),
        row(70, 1, 2, 3),
        row(100),
        row(100, 2, 1),
        row(100, 1, 2, 3),
        row(33, 1, 9),
    ]
    prompts = [one.prompt_token_ids for one in asked(rows)]
    for first in prompts:
        for second in prompts:
            assert isinstance(first, Prompt)
            assert isinstance(second, Prompt)
            written = [block_keys(tuple(one), block_size) for one in (first, second)]
            described = [one.block_keys(block_size) for one in (first, second)]
            assert [len(keys) for keys in described] == [len(keys) for keys in written]
            assert shared_blocks(*described) == shared_blocks(*written)


def test_prompts_share_what_the_trace_says_and_nothing_else() -> None:
    same, longer, other, own = (
        one.block_keys(16) for one in asked([row(64, 1, 2), row(96, 1, 2, 3), row(64, 5, 2), row(64)])
    )
    assert shared_blocks(same, longer) == 4
    assert shared_blocks(same, other) == 0
    assert len({*same, *own}) == 8


def test_where_no_cache_looks_all_prompts_are_one_token() -> None:
    first, second = asked([row(5, 1), row(3)], sharing=False)
    assert (first.prompt_token_ids, second.prompt_token_ids) == ((0,) * 5, (0,) * 3)


@pytest.mark.parametrize("pools", [split(prefix_cache=True), (worker("m0", Role.MIXED, prefix_cache=True),)])
def test_the_cache_hits_exactly_where_the_trace_says(pools: tuple[WorkerSpec, ...]) -> None:
    rows = [row(96, 1, 2, 3), row(128, 1, 2, 3, 4), row(90, 1, 2, 9), row(96, 7, 2, 3), row(64), row(65, 1, 2, 3)]
    coming = [replace(one, arrival_s=5.0 * place, output_tokens=20) for place, one in enumerate(rows)]
    simulated = cluster(*pools)
    outcomes = simulated.run(asked(coming))
    # The last token of a prompt is always computed: of 65 tokens that are all there, 64.
    assert [outcome.cached_tokens for outcome in outcomes] == [0, 96, 64, 0, 0, 64]
    assert_clean(simulated)
