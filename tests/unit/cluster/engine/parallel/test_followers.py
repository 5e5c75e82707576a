"""Ranks as real processes: logits of one rank; and a rank that ends, or stands still, takes its worker down at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rank_steps import BLOCK_SIZE, LLAMA, NUM_BLOCKS, assert_close, dummy, of_one_rank, ranked_kv, steps
from tandem.cluster.engine.parallel import followers
from tandem.cluster.engine.parallel.followers import Followers
from tandem.cluster.engine.parallel.leader import ParallelForward
from tandem.cluster.engine.parallel.messages import RankLost, Setup
from tandem.cluster.engine.parallel.rank_process import children

WAIT_S = 20.0


def start(tensor: int, stages: int) -> ParallelForward:
    kv = ranked_kv(LLAMA, tensor, stages)
    return ParallelForward(dummy(LLAMA), "float32", "torch", kv, children(tensor * stages))


def wait_gone(pids: tuple[int, ...]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline_s, f"of {pids} some are left"
        time.sleep(0.01)


class Told:
    """What the owner of a worker hears."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.told = threading.Event()

    def __call__(self, error: BaseException) -> None:
        self.errors.append(error)
        self.told.set()


def test_four_ranks_compute_what_one_does_and_end_with_any_of_them() -> None:
    forward, told = start(2, 2), Told()
    try:
        forward.watch(told)
        pids = forward.pids
        assert len({*pids, os.getpid()}) == 4
        assert_close([forward.run(plan) for plan in steps()], of_one_rank(LLAMA))
        os.kill(pids[1], signal.SIGKILL)
        assert told.told.wait(WAIT_S)
        with pytest.raises(RankLost, match=rf"rank 2 \(pid {pids[1]}, ended with -9\)"):
            forward.run(steps()[0])
    finally:
        forward.close()
    wait_gone(pids)
    assert len(told.errors) == 1
    late = Told()
    forward.watch(late)
    assert late.errors == told.errors


def test_two_stages_compute_what_one_does_and_end_with_their_leader() -> None:
    forward, told = start(1, 2), Told()
    forward.watch(told)
    try:
        assert_close([forward.run(plan) for plan in steps()], of_one_rank(LLAMA))
    finally:
        forward.close()
        forward.close()
    wait_gone(forward.pids)
    assert told.errors == []


def test_two_ranks_compute_what_one_does_and_one_that_stands_still_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, told = start(2, 1), Told()
    try:
        forward.watch(told)
        assert_close([forward.run(plan) for plan in steps()], of_one_rank(LLAMA))
        monkeypatch.setattr(followers, "PING_S", 0.1)
        monkeypatch.setattr(followers, "PONG_S", 1.0)
        os.kill(forward.pids[0], signal.SIGSTOP)
        assert told.told.wait(WAIT_S)
        assert "no answer" in str(told.errors[0])
        with pytest.raises(RankLost):
            forward.run(steps()[0])
    finally:
        forward.close()
    wait_gone(forward.pids)


def test_what_a_follower_cannot_do_is_told() -> None:
    kv = ranked_kv(LLAMA, 2, 1)
    setup = Setup(
        files=dummy(LLAMA),
        tensor_parallel=2,
        pipeline_stages=1,
        rank=1,
        dtype="float32",
        kernels="torch",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        nonce=b"another segment's",
        threads=1,
        cpus=(),
        stage_host="127.0.0.1",
        pipeline_host="127.0.0.1",
        fingerprint="",
        timeout_s=WAIT_S,
    )
    started = Followers(children(2), [setup], [kv.segments[1].lend()])
    try:
        started.gather()
        started.connect()
        with pytest.raises(RankLost, match=r"rank 1 .*SegmentError: another segment .*nonce differs"):
            started.ready()
    finally:
        started.close()
    wait_gone(started.pids)


@pytest.mark.parametrize("lost", [False, True])
def test_who_waits_for_kv_hears_once_that_none_comes(lost: bool) -> None:
    none, told = Followers([], [], []), list[str]()
    none.on_kv_lost.append(told.append)
    if lost:
        none._lose(RankLost("rank 1 has ended"))
    none.close()
    none.close()
    assert told == ["rank 1 has ended" if lost else "the worker is closing"]


def test_followers_end_with_a_leader_that_is_killed() -> None:
    program = """
import os, sys, time
from tandem.cluster.engine.parallel.followers import Followers
from tandem.cluster.engine.parallel.messages import Setup
from tandem.cluster.engine.parallel.rank_process import children
from tandem.cluster.models.reference import resolve_model
setup = Setup(
    files=resolve_model("dummy:tiny-llama"), tensor_parallel=2, pipeline_stages=1, rank=1, dtype="float32",
    kernels="torch", block_size=16, num_blocks=24, nonce=b"", threads=1, cpus=(), stage_host="127.0.0.1",
    pipeline_host="127.0.0.1", fingerprint="", timeout_s=60,
)
followers = Followers(children(2), [setup], [os.memfd_create("kv")])
print(*followers.pids, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        try:
            assert leader.stdout is not None
            pid = int(leader.stdout.readline())
            assert Path(f"/proc/{pid}").exists()
        finally:
            leader.kill()
    wait_gone((pid,))
