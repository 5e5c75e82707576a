"""A device's memory is gathered and scattered as the host's is: by Triton (interpreted without a GPU) and by torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ends import split
from tandem.kernels import dispatch
from tandem.kvtransfer.collective import memory as memory_module
from tandem.kvtransfer.collective.memory import DeviceRankMemory, HostRankMemory, MessageBuffers
from tandem.kvtransfer.collective.plan import PairMap
from tandem.kvtransfer.reshape import Reshape

TENSOR = (6, 2, 2, 2, 4, 64)


@pytest.mark.parametrize("lacks", [{}, {"triton": ""}], ids=["triton", "torch"])
def test_the_rows_of_a_tensor_are_those_of_its_bytes(
    where: str, lacks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = replace(dispatch.interpreter(), **lacks)
    monkeypatch.setattr(dispatch, "interpreter", lambda: facts)
    monkeypatch.setattr(dispatch, "gpu_facts", lambda device: facts)
    monkeypatch.setattr(memory_module, "kv_moves", dispatch.kv_moves.__wrapped__)
    source, target = split(4, tensor_parallel=2, pipeline_stages=2), split(8)
    pairs = PairMap(Reshape(source, target), 1)
    rows = pairs.source_rows(4, 12, [3, 1])
    kv = torch.randn(TENSOR)
    host = HostRankMemory(memoryview(kv.clone().numpy()).cast("B"))
    device = DeviceRankMemory(kv.to(where))
    messages = [memory.empty(rows.total_bytes) for memory in (host, device)]
    for memory, message in zip((host, device), messages, strict=True):
        memory.gather(rows, message)
    np.testing.assert_array_equal(messages[0].numpy(), messages[1].cpu().numpy())
    assert rows.total_bytes == pairs.total_bytes(4, 12)

    whole = torch.randn(5, 4, 2, 4, 8, 64)
    host = HostRankMemory(memoryview(whole.numpy()).cast("B"))
    tensor = whole.clone().to(where)
    device = DeviceRankMemory(tensor)
    into, empty = pairs.target_rows(4, 12, [4, 2]), pairs.cleared_rows(2, 4)
    for memory, message in zip((host, device), messages, strict=True):
        memory.scatter(message, into)
        memory.clear(empty)
    np.testing.assert_array_equal(whole.numpy(), tensor.cpu().numpy())
    assert not whole[2, :, :, :, 4:].any()
    assert whole[4, :2, :, 2:, 4:].eq(kv[3]).all()
    assert whole[2, :2, :, 2:, :4].eq(kv[1]).all()


def test_messages_travel_in_what_earlier_ones_have_left() -> None:
    buffers = MessageBuffers(HostRankMemory(memoryview(bytearray(1))), limit_bytes=100)
    large, small, longer = buffers.take(60), buffers.take(30), buffers.take(31)
    for buffer in (large, small):
        buffers.give(buffer)
    assert buffers.free_bytes == 90
    again = buffers.take(20)
    assert (len(again), again.data_ptr()) == (20, small.data_ptr())
    assert buffers.take(31).data_ptr() == large.data_ptr()
    assert buffers.free_bytes == 0
    for buffer in (large, again, longer):  # the oldest goes
        buffers.give(buffer)
    assert buffers.free_bytes == 30 + 31
    buffers.give(buffers.take(101))  # more than is kept at all
    assert buffers.free_bytes == 30 + 31
