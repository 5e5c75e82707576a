"""Another worker's blocks copied here by Triton's interpreter and by torch: whole blocks, and those of another size."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tandem.cluster.engine.gpu import kv_store
from tandem.cluster.engine.gpu.kv_peers import GpuPeer, block_shape
from tandem.cluster.engine.gpu.kv_store import DeviceKVStore
from tandem.kernels import dispatch
from tandem.kvtransfer.layout import KVGroup, KVLayout

GROUP = KVGroup(name="layers", num_layers=2, num_kv_heads=3, head_dim=8, dtype="bfloat16")
LAYOUT = KVLayout(block_size=4, groups=(GROUP,))


@pytest.fixture(autouse=True, params=["triton", "torch"])
def moves(request: pytest.FixtureRequest, where: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who moves blocks."""
    if where != "cpu":
        pytest.skip("kernels on CPU tensors want Triton's interpreter; a GPU has tests/gpu/test_kv_on_gpu.py")
    if request.param == "torch":
        lacking = replace(dispatch.interpreter(), triton="")
        monkeypatch.setattr(dispatch, "interpreter", lambda: lacking)
    monkeypatch.setattr(kv_store, "kv_moves", dispatch.kv_moves.__wrapped__)
    return str(request.param)


def filled(layout: KVLayout, num_blocks: int) -> DeviceKVStore:
    store = DeviceKVStore(layout, num_blocks, device="cpu", staging_bytes=2 * layout.block_bytes)
    for block_id in range(num_blocks):
        store.write_block(block_id, random.Random(block_id).randbytes(layout.block_bytes))
    return store


def token(store: DeviceKVStore, block_ids: list[int], index: int) -> torch.Tensor:
    """[L, 2, K, D] of one token, as integers."""
    size = store.layout.block_size
    return store.tensor.view(torch.int16)[block_ids[index // size], :, :, :, index % size]


def test_small_blocks_go_through_kernels_and_keep_their_bytes() -> None:
    plain = filled(LAYOUT, 8)
    by_kernel = DeviceKVStore(
        LAYOUT, 8, device="cpu", staging_bytes=3 * LAYOUT.block_bytes, copy_alone_bytes=LAYOUT.block_bytes + 1
    )
    ids = [5, 0, 7, 6, 2]
    by_kernel.write_blocks(ids, [bytes(plain.read_block(block_id)) for block_id in ids])
    for block_id in range(8):
        wanted = bytes(plain.read_block(block_id)) if block_id in ids else bytes(LAYOUT.block_bytes)
        assert bytes(by_kernel.read_block(block_id)) == wanted
    begun = by_kernel.begin_read([7, 5, 1])
    assert begun is not None
    assert [bytes(view) for view in begun.views()] == [
        *map(bytes, (plain.read_block(7), plain.read_block(5))),
        bytes(LAYOUT.block_bytes),
    ]


def test_whole_blocks_are_copied_whole() -> None:
    theirs, mine = filled(LAYOUT, 6), DeviceKVStore(LAYOUT, 9, device="cpu")
    peer = GpuPeer(mine, theirs.tensor, None)
    copy = peer.begin_copy([0, 0, 3, 1], [0, 0, 8, 2], first_token=8, num_tokens=8)
    copy.wait()
    assert copy.done()
    assert bytes(mine.read_block(8)) == bytes(theirs.read_block(3))
    assert bytes(mine.read_block(2)) == bytes(theirs.read_block(1))
    assert not mine.tensor[[0, 1, 3, 4, 5, 6, 7]].view(torch.int16).any()
    peer.close()


@pytest.mark.parametrize("block_size", [2, 8, 6])
def test_tokens_find_their_places_in_blocks_of_another_size(block_size: int) -> None:
    theirs = filled(LAYOUT, 8)
    layout = replace(LAYOUT, block_size=block_size)
    mine = DeviceKVStore(layout, 16, device="cpu")
    source, target = [6, 2, 7, 0, 1], [9, 3, 4, 11, 1, 0, 2, 5, 6, 7][: layout.blocks_for(20)]
    peer = GpuPeer(mine, theirs.tensor.view(8, *block_shape(LAYOUT)), None)
    assert peer.begin_copy(source, target, first_token=3, num_tokens=14).done()
    for index in range(20):
        wanted = token(theirs, source, index) if 3 <= index < 17 else torch.zeros((2, 2, 3, 8), dtype=torch.int16)
        assert torch.equal(token(mine, target, index), wanted), index


@pytest.mark.parametrize("alone_bytes", [0, 2**30], ids=["copy engine", "kernels"])
def test_kernels_are_warmed_up_without_a_block_being_changed(
    alone_bytes: int, moves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DeviceKVStore(LAYOUT, 3, device="cpu", staging_bytes=2 * LAYOUT.block_bytes, copy_alone_bytes=alone_bytes)
    for block_id in range(3):
        store.tensor.view(torch.int16)[block_id] = block_id + 1
    launched, recorded = [], {}
    for name in ("copy_blocks", "repack", "gather_blocks", "scatter_blocks"):
        kernel = getattr(store.moves, name)
        recorded[name] = lambda *given, name=name, kernel=kernel: (launched.append(name), kernel(*given))
    found = replace(store.moves, **recorded)
    monkeypatch.setattr(kv_store, "kv_moves", lambda device: found)
    store.warm_up()
    compiled = (4 if alone_bytes else 2) if moves == "triton" else 0
    assert launched == ["copy_blocks", "repack", "gather_blocks", "scatter_blocks"][:compiled]
    assert [store.tensor.view(torch.int16)[i].unique().tolist() for i in range(3)] == [[1], [2], [3]]
