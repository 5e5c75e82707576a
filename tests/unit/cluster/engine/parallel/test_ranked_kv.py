"""KV memory in parts, seen as whole blocks."""

from __future__ import annotations

import numpy as np
import pytest
from rank_steps import LLAMA, NUM_BLOCKS, ranked_kv
from tandem.cluster.engine.parallel.shard import Shard
from tandem.kvtransfer.layout import KVSplit
from tandem.kvtransfer.reshape import repack_reference


@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_blocks_go_to_their_ranks_and_come_back(tensor: int, stages: int) -> None:
    """With 4 ranks for 2 KV heads, both ranks of a head get it."""
    store = ranked_kv(LLAMA, tensor, stages)
    drawn = np.random.default_rng(0).integers(0, 256, (2, store.layout.block_bytes), dtype=np.uint8)
    for block_id, block in zip((3, 7), drawn, strict=True):
        store.write_block(block_id, block.tobytes())
    for block_id, block in zip((3, 7), drawn, strict=True):
        assert store.read_block(block_id) == block.tobytes()
    assert not any(store.read_block(4))
    expected = repack_reference(KVSplit(layout=store.layout), store.split, {0: drawn[:1]}, store.layout.block_size)
    for rank, segment in enumerate(store.segments):
        size = store.split.rank_layout(rank).block_bytes
        assert bytes(segment.blocks[3 * size : 4 * size]) == expected[rank].tobytes()


def test_a_rank_lays_its_blocks_out_as_it_computes() -> None:
    store = ranked_kv(LLAMA, 4, 2)
    for rank in range(8):
        local = Shard(config=LLAMA, tensor_parallel=4, pipeline_stages=2, rank=rank).local
        (group,) = store.split.rank_layout(rank).groups
        assert (group.num_layers, group.num_kv_heads) == (local.num_layers, local.num_kv_heads)


def test_what_is_no_block_is_refused() -> None:
    store = ranked_kv(LLAMA, 2, 1)
    with pytest.raises(ValueError, match=f"block_id: {NUM_BLOCKS} is not in 0…{NUM_BLOCKS - 1}"):
        store.read_block(NUM_BLOCKS)
    with pytest.raises(ValueError, match="payload: 3 bytes are not one block"):
        store.write_block(0, b"abc")
    store.commit()
    store.close()
    store.close()
