"""KV in a device's memory: what is written through staging is what is read, in any order and from any buffer."""

from __future__ import annotations

import random

import pytest
import torch
from tandem.cluster.engine.gpu.kv_store import READS_AHEAD, DeviceKVStore
from tandem.kvtransfer.layout import KVGroup, KVLayout


def layout(dtype: str = "bfloat16") -> KVLayout:
    group = KVGroup(name="layers", num_layers=2, num_kv_heads=3, head_dim=8, dtype=dtype)
    return KVLayout(block_size=4, groups=(group,))


def make(num_blocks: int = 12, *, staged: int = 3, dtype: str = "bfloat16") -> DeviceKVStore:
    shape = layout(dtype)
    return DeviceKVStore(shape, num_blocks, device="cpu", staging_bytes=staged * shape.block_bytes)


def content(store: DeviceKVStore, seed: int) -> bytes:
    return random.Random(seed).randbytes(store.layout.block_bytes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "float8_e4m3"])
def test_what_is_written_is_read(dtype: str) -> None:
    store = make(dtype=dtype)
    assert store.tensor.shape == (12, 2, 2, 3, 4, 8)
    assert not store.tensor.view(torch.uint8).any()
    ids = [7, 8, 9, 2, 11, 0, 1]  # more than a buffer holds, neighbors among them
    store.write_blocks(ids, [content(store, i) for i in ids])
    for start in range(0, len(ids), 3):
        part = ids[start : start + 3]
        assert [bytes(view) for view in store.read_blocks(part)] == [content(store, i) for i in part]
    assert bytes(store.tensor[11].contiguous().view(torch.uint8).flatten().tolist()) == content(store, 11)
    untouched = [i for i in range(12) if i not in ids]
    assert not store.tensor[untouched].view(torch.uint8).any()


def test_a_read_that_was_begun_keeps_what_it_read() -> None:
    store = make()
    store.write_blocks([4, 5], [content(store, 1), content(store, 2)])
    begun = store.begin_read([5, 4])
    assert begun is not None
    store.write_block(4, content(store, 3))
    assert bytes(store.read_block(4)) == content(store, 3)
    assert [bytes(view) for view in begun.views()] == [content(store, 2), content(store, 1)]
    begun.end()
    begun.end()


def test_reads_that_are_begun_are_bounded_and_their_room_comes_back() -> None:
    store = make()
    begun = [store.begin_read([i]) for i in range(READS_AHEAD)]
    assert None not in begun
    assert store.begin_read([0]) is None
    for read in begun:
        assert read is not None
        read.end()
        read.end()
    assert [store.begin_read([i]) is None for i in range(READS_AHEAD + 1)] == [False] * READS_AHEAD + [True]


def test_a_block_larger_than_a_buffer_has_one_of_its_own_size() -> None:
    store = DeviceKVStore(layout(), 3, device="cpu", staging_bytes=16)
    store.write_blocks([2, 0], [content(store, 2), content(store, 0)])
    assert bytes(store.read_block(2)) == content(store, 2)
    with pytest.raises(ValueError, match="2 blocks are more than the 1 that are staged"):
        store.read_blocks([0, 2])


def test_what_is_no_block_is_refused() -> None:
    store = make()
    with pytest.raises(ValueError, match="block_id: 12 is not in 0…11"):
        store.read_blocks([1, 12])
    with pytest.raises(ValueError, match="block_id: -1"):
        store.write_block(-1, content(store, 0))
    with pytest.raises(ValueError, match="not one block"):
        store.write_block(0, b"short")
    with pytest.raises(ValueError, match="num_blocks: 0"):
        make(0)
    with pytest.raises(ValueError, match="dtype: 'uint64'"):
        make(dtype="uint64")
