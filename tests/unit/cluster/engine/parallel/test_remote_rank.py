"""A rank that shares no memory with its leader, as one on another node: a process that comes by TCP."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rank_steps import BLOCK_SIZE, LLAMA, NUM_BLOCKS, assert_close, dummy, of_one_rank, steps
from tandem.cluster.auth import OPEN
from tandem.cluster.engine.devices.kv_memory import HostKVStore, kv_layout
from tandem.cluster.engine.parallel import follower
from tandem.cluster.engine.parallel.door import Joined, RankDoor
from tandem.cluster.engine.parallel.follower import _Link
from tandem.cluster.engine.parallel.followers import GIFT
from tandem.cluster.engine.parallel.kv import RankedKVStore
from tandem.cluster.engine.parallel.leader import ParallelForward
from tandem.cluster.engine.parallel.messages import RankLost
from tandem.cluster.engine.parallel.rank_process import RankProcess
from tandem.cluster.engine.parallel.remote_kv import RemoteBlocks
from tandem.cluster.engine.runner import TorchForward
from tandem.kvtransfer.layout import KVSplit

LOOPBACK = "127.0.0.1"
WAIT_S = 60.0
PROGRAM = """
import sys
from tandem.cluster.auth import OPEN
from tandem.cluster.engine.parallel.door import Offer, join
from tandem.cluster.engine.parallel.follower import serve
offer = Offer(rank=1, key=bytes.fromhex(sys.argv[1]), name="", host="127.0.0.1", port=int(sys.argv[2]))
serve(*join(offer, OPEN, 60.0), sys.argv[3])
"""


class Far(RankProcess):
    """A process of this machine that is treated as if it were of another."""

    def __init__(self, joined: Joined, process: subprocess.Popen[bytes]) -> None:
        self.rank, self.pid = joined.rank, joined.pid
        self.link, self.kv_link = joined.link, joined.kv_link
        self.host, self.leader_host = joined.host, joined.leader_host
        self.process = process

    def ended(self) -> str:
        return ""

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout_s: float) -> bool:
        self.process.wait(timeout_s)
        return True


def come(model: str) -> Far:
    door = RankDoor({1: True}, LOOPBACK, OPEN)
    try:
        offer = door.offer(1)
        command = [sys.executable, "-c", PROGRAM, offer.key.hex(), str(offer.port), model]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        with ThreadPoolExecutor(1) as pool:
            (joined,) = pool.submit(door.wait, WAIT_S, lambda: None).result()
    finally:
        door.close()
    assert joined.pid == process.pid
    return Far(joined, process)


def memory(far: Far) -> RankedKVStore:
    split = KVSplit(layout=kv_layout(LLAMA, "float32", BLOCK_SIZE), pipeline_stages=2)
    assert far.kv_link is not None
    return RankedKVStore(split, NUM_BLOCKS, {1: RemoteBlocks(far.kv_link, 1, split.rank_layout(1).block_bytes)})


def test_it_computes_and_its_kv_is_read_and_written_where_it_is() -> None:
    far = come("dummy:tiny-llama")
    kv = memory(far)
    forward = ParallelForward(dummy(LLAMA), "float32", "torch", kv, [far])
    alone = HostKVStore(kv_layout(LLAMA, "float32", BLOCK_SIZE), NUM_BLOCKS)
    reference = TorchForward(dummy(LLAMA), "float32", "torch", alone.array)
    try:
        first, second, *rest = steps()
        found = [forward.run(plan) for plan in (first, second)]
        for plan in (first, second):
            reference.run(plan)
        blocks = (0, 5, 11, 20, 15)
        for ours, block in zip(kv.read_blocks(blocks), blocks, strict=True):
            theirs = np.frombuffer(alone.read_block(block), np.float32)
            np.testing.assert_allclose(np.frombuffer(ours, np.float32), theirs, atol=1e-4)
        kept = [bytes(block) for block in kv.read_blocks(range(NUM_BLOCKS))]
        kv.write_blocks(range(NUM_BLOCKS), [bytes(kv.layout.block_bytes)] * NUM_BLOCKS)
        assert not any(any(block) for block in kv.read_blocks(range(NUM_BLOCKS)))
        kv.write_blocks(range(NUM_BLOCKS), kept)  # what decodes next reads it
        assert_close([*found, *(forward.run(plan) for plan in rest)], of_one_rank(LLAMA))
    finally:
        forward.close()
    assert far.process.returncode == 0, "it ends with its leader"


def test_a_node_that_has_other_files_is_refused() -> None:
    far = come("dummy:tiny-opt")
    with pytest.raises(RankLost, match=rf"rank 1 \(pid {far.pid} on 127\.0\.0\.1\): ModelError: .* has other files"):
        ParallelForward(dummy(LLAMA), "float32", "torch", memory(far), [far])
    assert far.process.returncode


class Ended(BaseException):
    """Instead of the process's end."""


def test_it_ends_when_its_leader_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(follower.os, "_exit", end)
    monkeypatch.setattr(follower, "START_S", 0.0)
    monkeypatch.setattr(follower, "SILENCE_S", 0.1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(GIFT)
        with pytest.raises(Ended):
            _Link(ours, remote=True).hear()
