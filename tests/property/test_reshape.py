"""KV between workers of different TP, PP and block size: every byte of every target block arrives exactly once, from a
rank that holds it, and is the right one.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.kvtransfer.layout import KVGroup, KVLayout, KVSplit
from tandem.kvtransfer.reshape import Reshape, copy_stretches, repack_reference

MAX_TP, MAX_PP = 8, 4
BLOCK_SIZES = (16, 24, 32, 48, 64, 128)


def group(layers: int, heads: int, *, name: str = "layers", head_dim: int = 1, dtype: str = "bfloat16") -> KVGroup:
    return KVGroup(name=name, num_layers=layers, num_kv_heads=heads, head_dim=head_dim, dtype=dtype)


def split(groups: tuple[KVGroup, ...], block_size: int, tensor: int = 1, stages: int = 1) -> KVSplit:
    return KVSplit(
        layout=KVLayout(block_size=block_size, groups=groups), tensor_parallel=tensor, pipeline_stages=stages
    )


def filled(source: KVSplit, num_tokens: int, seed: int = 0) -> dict[int, np.ndarray]:
    """Blocks of every source rank, cut from one random KV of the whole model: ranks with the same heads agree."""
    alone = KVSplit(layout=source.layout)
    count = source.layout.blocks_for(num_tokens)
    drawn = np.random.default_rng(seed).integers(0, 256, (count, source.layout.block_bytes), dtype=np.uint8)
    return repack_reference(alone, source, {0: drawn}, num_tokens)


def moved(reshape: Reshape, blocks: dict[int, np.ndarray], num_tokens: int) -> tuple[dict, dict]:
    """Blocks of every target rank after all routes, and how often each of their bytes was written."""
    target = reshape.target
    count = target.layout.blocks_for(num_tokens)
    shapes = {rank: (count, target.rank_layout(rank).block_bytes) for rank in range(target.num_ranks)}
    got = {rank: np.zeros(shape, np.uint8) for rank, shape in shapes.items()}
    times = {rank: np.zeros(shape, np.int64) for rank, shape in shapes.items()}
    for route in reshape.routes:
        found = reshape.stretches(route, 0, reshape.covered_tokens(num_tokens))
        source = [memoryview(block) for block in blocks[route.source_rank]]
        copy_stretches(found, source, [memoryview(block) for block in got[route.target_rank]])
        for block, start, length in zip(found.target_block, found.target_offset, found.length_bytes, strict=True):
            times[route.target_rank][block, start : start + length] += 1
    return got, times


def reached(target: KVSplit, rank: int, num_tokens: int, covered: int) -> np.ndarray:
    """How often each byte of a target rank's blocks should be written: once up to `covered` tokens, never after."""
    blocks = np.arange(target.layout.blocks_for(num_tokens))
    parts = []
    for one in target.rank_layout(rank).groups:
        planes = one.num_layers * 2 * one.num_kv_heads
        slots = np.arange(target.layout.block_size)
        inside = blocks[:, None] * target.layout.block_size + slots < covered
        of_slot = np.repeat(inside[:, None, :, None], planes, axis=1).repeat(one.slot_bytes() // (planes), axis=3)
        parts.append(of_slot.reshape(len(blocks), -1))
    return np.concatenate(parts, axis=1).astype(np.int64)


SHAPES = st.tuples(st.sampled_from(BLOCK_SIZES), st.integers(1, MAX_TP), st.integers(1, MAX_PP))


@settings(max_examples=80, deadline=None)
@given(
    source=SHAPES,
    target=SHAPES,
    layers=st.integers(MAX_PP, 7),
    heads=st.sampled_from([1, 2, 3, 4, 5, 8]),
    draft_layers=st.integers(0, 3),
    num_tokens=st.integers(1, 300),
)
def test_every_byte_arrives_once_and_is_the_right_one(
    source: tuple[int, int, int],
    target: tuple[int, int, int],
    layers: int,
    heads: int,
    draft_layers: int,
    num_tokens: int,
) -> None:
    groups = (group(layers, heads),)
    if draft_layers:  # another model's KV in the same blocks; some stages have none of it
        groups += (group(draft_layers, 2, name="draft", head_dim=3, dtype="int8"),)
    reshape = Reshape(split(groups, *source), split(groups, *target))
    blocks = filled(reshape.source, num_tokens)
    got, times = moved(reshape, blocks, num_tokens)
    expected = repack_reference(reshape.source, reshape.target, blocks, num_tokens)
    covered = reshape.covered_tokens(num_tokens)
    assert covered >= num_tokens
    for rank in range(reshape.target.num_ranks):
        np.testing.assert_array_equal(times[rank], reached(reshape.target, rank, num_tokens, covered))
        np.testing.assert_array_equal(got[rank], expected[rank])


@settings(max_examples=40, deadline=None)
@given(source=SHAPES, target=SHAPES, first=st.integers(0, 200), length=st.integers(0, 200))
def test_stretches_are_maximal_and_inside_their_blocks(
    source: tuple[int, int, int], target: tuple[int, int, int], first: int, length: int
) -> None:
    groups = (group(5, 4, head_dim=2), group(2, 1, name="draft"))
    reshape = Reshape(split(groups, *source), split(groups, *target))
    arrived = 0
    for route in reshape.routes:
        found = reshape.stretches(route, first, first + length)
        ours = reshape.source.rank_layout(route.source_rank).block_bytes
        theirs = reshape.target.rank_layout(route.target_rank).block_bytes
        assert (found.length_bytes > 0).all()
        assert (found.source_offset + found.length_bytes <= ours).all()
        assert (found.target_offset + found.length_bytes <= theirs).all()
        begins = set(zip(found.source_block, found.source_offset, found.target_block, found.target_offset, strict=True))
        ends = {
            (a, b + n, c, d + n)
            for a, b, c, d, n in zip(
                found.source_block,
                found.source_offset,
                found.target_block,
                found.target_offset,
                found.length_bytes,
                strict=True,
            )
        }
        assert not begins & ends, "two of them could be one"
        arrived += found.total_bytes
    ranks = range(reshape.target.num_ranks)
    slot_bytes = sum(part.slot_bytes() for rank in ranks for part in reshape.target.rank_layout(rank).groups)
    assert arrived == length * slot_bytes


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_all_splits_up_to_tp_8_and_pp_4(heads: int) -> None:
    """Layers do not divide by the stages. Each layer of each head comes once to each rank that wants it, from one that
    has it; and no source rank sends more than its share of a stage, as far as heads and layers can be shared out.
    """
    groups = (group(5, heads),)
    splits = [split(groups, 16, tp, pp) for tp, pp in itertools.product(range(1, MAX_TP + 1), range(1, MAX_PP + 1))]
    for source, target in itertools.product(splits, splits):
        cells: Counter[tuple[int, int, int]] = Counter()
        for route in Reshape(source, target).routes:
            for piece in route.pieces:
                assert set(piece.layers) <= set(source.layers(groups[0], route.source_rank))
                assert set(piece.heads) <= set(source.heads(groups[0], route.source_rank))
                cells.update((route.target_rank, *cell) for cell in itertools.product(piece.layers, piece.heads))
        wanted = {
            (rank, *cell)
            for rank in range(target.num_ranks)
            for cell in itertools.product(target.layers(groups[0], rank), target.heads(groups[0], rank))
        }
        assert set(cells) == wanted
        assert set(cells.values()) == {1}
