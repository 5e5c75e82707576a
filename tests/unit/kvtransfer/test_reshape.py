"""What a person expects of the map between splits: as few stretches as there can be, and nobody sends everything."""

from __future__ import annotations

from collections import Counter

import pytest
from tandem.cluster.latency.model_facts import model_facts
from tandem.kvtransfer.layout import KVGroup, KVLayout, KVSplit, rank_heads, stage_layers
from tandem.kvtransfer.reshape import Reshape

LAYERS, HEADS = 32, 8


def split(tensor: int = 1, stages: int = 1, *, block_size: int = 16, layers: int = LAYERS) -> KVSplit:
    group = KVGroup(name="layers", num_layers=layers, num_kv_heads=HEADS, head_dim=128, dtype="bfloat16")
    layout = KVLayout(block_size=block_size, groups=(group,))
    return KVSplit(layout=layout, tensor_parallel=tensor, pipeline_stages=stages)


def stretches_a_block(source: KVSplit, target: KVSplit) -> int:
    """Of all routes together, for one block of the larger of the two."""
    reshape = Reshape(source, target)
    tokens = max(source.layout.block_size, target.layout.block_size)
    return sum(len(reshape.stretches(route, 0, tokens)) for route in reshape.routes)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stages", [1, 3])
def test_the_same_shape_is_one_stretch_a_block_from_each_rank_to_its_like(tensor: int, stages: int) -> None:
    shape = split(tensor, stages)
    reshape = Reshape(shape, shape)
    assert [(route.source_rank, route.target_rank) for route in reshape.routes] == [
        (rank, rank) for rank in range(shape.num_ranks)
    ]
    assert stretches_a_block(shape, shape) == shape.num_ranks


def test_stages_alone_are_one_stretch_for_each_pair_that_shares_layers() -> None:
    assert stretches_a_block(split(1, 2), split(1, 1)) == 2
    assert stretches_a_block(split(1, 2, layers=32), split(1, 3, layers=32)) == 4  # 16+16 layers to 11+11+10


def test_half_the_heads_are_one_stretch_for_keys_and_values_of_each_layer() -> None:
    assert stretches_a_block(split(2), split(1)) == 2 * LAYERS * 2
    assert stretches_a_block(split(1), split(2)) == 2 * LAYERS * 2


def test_another_block_size_is_one_stretch_for_each_head() -> None:
    assert stretches_a_block(split(block_size=16), split(block_size=32)) == 2 * LAYERS * 2 * HEADS
    assert stretches_a_block(split(block_size=32), split(block_size=16)) == 2 * LAYERS * 2 * HEADS


def test_replicas_share_the_sending() -> None:
    """16 ranks of 8 heads to 8: both ranks of a head send half of its layers."""
    sent: Counter[int] = Counter()
    reshape = Reshape(split(16), split(8))
    for route in reshape.routes:
        sent[route.source_rank] += reshape.stretches(route, 0, 16).total_bytes
    assert len(sent) == 16
    assert len(set(sent.values())) == 1


def test_replicas_that_receive_are_each_served_by_their_own() -> None:
    """8 heads on 32 ranks from 8 heads on 16: each source serves two targets."""
    served = Counter(route.source_rank for route in Reshape(split(16), split(32)).routes)
    assert served == dict.fromkeys(range(16), 2)


def test_offsets_go_beyond_32_bits() -> None:
    group = KVGroup(name="layers", num_layers=1024, num_kv_heads=32, head_dim=256, dtype="float32")
    layout = KVLayout(block_size=128, groups=(group,))
    reshape = Reshape(KVSplit(layout=layout), KVSplit(layout=layout, tensor_parallel=2))
    last = reshape.stretches(reshape.routes[-1], 0, 128)
    assert last.source_offset.max() + last.length_bytes[-1] == layout.block_bytes > 2**32
    assert last.source_offset.dtype == "int64"


def test_what_is_left_of_the_last_block_is_told() -> None:
    reshape = Reshape(split(block_size=16), split(block_size=64))
    assert [reshape.covered_tokens(tokens) for tokens in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 80]
    assert Reshape(split(block_size=64), split(block_size=16)).covered_tokens(17) == 32


def test_other_kv_is_refused() -> None:
    with pytest.raises(ValueError, match="groups"):
        Reshape(split(), split(layers=31))


def test_a_split_names_what_is_not_allowed() -> None:
    with pytest.raises(ValueError, match="tensor_parallel: 0"):
        split(0)
    with pytest.raises(ValueError, match=r"pipeline_stages: 33 is not in 1…32"):
        split(1, 33)
    with pytest.raises(ValueError, match=r"rank: 4 is not in 0…3"):
        split(2, 2).rank_layout(4)


def test_stages_are_those_that_the_planner_counts() -> None:
    facts = model_facts("llama-3.1-8b")
    for stages in (1, 2, 3, 5, 32):
        mine = [len(stage_layers(LAYERS, stages, stage)) for stage in range(stages)]
        assert mine == facts.stage_layers(stages)


def test_heads_are_those_that_the_query_heads_of_a_rank_read() -> None:
    for heads, each, tensor in ((8, 4, 4), (8, 4, 16), (2, 7, 7), (3, 3, 9)):
        for place in range(tensor):
            queries = range(place * heads * each // tensor, (place + 1) * heads * each // tensor)
            read = sorted({query // each for query in queries})
            assert list(rank_heads(heads, tensor, place)) == read
