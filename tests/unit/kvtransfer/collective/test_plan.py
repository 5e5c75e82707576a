"""What the batches of a pull carry, over shapes: each byte of the reader's ranks comes once, and is the holder's."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.kvtransfer.collective.plan import PairMap, PullPlan, moved_block_bytes
from tandem.kvtransfer.layout import KVGroup, KVLayout, KVSplit
from tandem.kvtransfer.reshape import Reshape, repack_reference


@st.composite
def splits(draw: st.DrawFn) -> tuple[KVSplit, KVSplit]:
    heads = draw(st.sampled_from([1, 2, 4]))
    group = KVGroup(name="all", num_layers=draw(st.integers(2, 5)), num_kv_heads=heads, head_dim=2, dtype="bfloat16")

    def split() -> KVSplit:
        layout = KVLayout(block_size=draw(st.sampled_from([1, 2, 3, 4, 8])), groups=(group,))
        parallel = draw(st.sampled_from([1, 2, 4, 8]))
        return KVSplit(layout=layout, tensor_parallel=parallel, pipeline_stages=draw(st.integers(1, 2)))

    return split(), split()


@settings(max_examples=80, deadline=None)
@given(splits(), st.data())
def test_batches_bring_every_slot_once(pair: tuple[KVSplit, KVSplit], data: st.DataObject) -> None:
    source, target = pair
    num_tokens = data.draw(st.integers(1, 40))
    blocks, wanted = source.layout.blocks_for(num_tokens), target.layout.blocks_for(num_tokens)
    first_block = data.draw(st.integers(0, wanted))
    batch_bytes = data.draw(st.integers(1, 4)) * source.layout.block_bytes
    rng = np.random.default_rng(num_tokens)
    ids = [list(rng.permutation(blocks + 3)[:blocks]), list(rng.permutation(wanted + 3)[:wanted])]
    held, whole = {}, _whole(source, rng, blocks)
    for rank in range(source.num_ranks):
        held[rank] = rng.integers(1, 255, (blocks + 3, source.rank_layout(rank).block_bytes), dtype=np.uint8)
        held[rank][ids[0]] = whole[rank]
    written = {
        rank: rng.integers(1, 255, (wanted + 3, target.rank_layout(rank).block_bytes), dtype=np.uint8)
        for rank in range(target.num_ranks)
    }
    before = {rank: memory.copy() for rank, memory in written.items()}
    touched = {rank: np.zeros(memory.size, np.int64) for rank, memory in written.items()}
    reshape = Reshape(source, target)
    maps = [PairMap(reshape, index) for index in range(len(reshape.routes))]
    plan = PullPlan(reshape, first_block=first_block, num_tokens=num_tokens, batch_bytes=batch_bytes)
    assert plan.first_source_block <= blocks
    complete = first_block
    for readable in [*sorted(data.draw(st.lists(st.integers(0, blocks), max_size=4))), blocks]:
        for batch in plan.batches(readable):
            assert batch.source_blocks.stop <= readable
            assert batch.source_blocks.start >= plan.first_source_block
            assert complete <= batch.complete <= wanted
            complete = batch.complete
            here = [ids[0][i] for i in batch.source_blocks]
            there = [ids[1][i] for i in batch.target_blocks]
            moved = sum(pair_map.total_bytes(batch.first_token, batch.end_token) for pair_map in maps)
            assert moved <= len(batch.source_blocks) * moved_block_bytes(reshape)
            assert moved <= batch_bytes or len(batch.source_blocks) == 1
            for pair_map, route in zip(maps, reshape.routes, strict=True):
                out = pair_map.source_rows(batch.first_token, batch.end_token, here)
                into = pair_map.target_rows(batch.first_token, batch.end_token, there)
                assert out.total_bytes == into.total_bytes == pair_map.total_bytes(batch.first_token, batch.end_token)
                message = held[route.source_rank].reshape(-1, out.row_bytes)[out.rows].reshape(-1)
                target_rows = written[route.target_rank].reshape(-1, into.row_bytes)
                target_rows[into.rows] = message.reshape(-1, into.row_bytes)
                touched[route.target_rank].reshape(-1, into.row_bytes)[into.rows] += 1
                if batch.cleared_from is not None:
                    empty = pair_map.cleared_rows(there[-1], batch.cleared_from)
                    written[route.target_rank].reshape(-1, empty.row_bytes)[empty.rows] = 0
    assert complete == wanted
    expected = repack_reference(source, target, whole, num_tokens)
    for rank in range(target.num_ranks):
        assert touched[rank].max(initial=0) <= 1
        mine = ids[1][first_block:]
        np.testing.assert_array_equal(written[rank][mine], expected[rank][first_block:])
        others = [block for block in range(wanted + 3) if block not in mine]
        np.testing.assert_array_equal(written[rank][others], before[rank][others])


def _whole(source: KVSplit, rng: np.random.Generator, blocks: int) -> dict[int, np.ndarray]:
    """Random KV, the same on ranks that hold the same heads."""
    alone = KVSplit(layout=source.layout)
    kv = rng.integers(1, 255, (blocks, source.layout.block_bytes), dtype=np.uint8)
    return repack_reference(alone, source, {0: kv}, blocks * source.layout.block_size)
