"""A worker of two stages, each a process: plans under way in both, and the end of one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import meeting_stage
import pytest
from meeting_stage import PLANS, Meetings
from tandem.cluster.clock import MonotonicClock
from tandem.cluster.engine.block_pool import BlockPool
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.parallel.messages import RankLost
from tandem.cluster.engine.parallel.rank_process import Recruit, _Child, children
from tandem.cluster.engine.policies import policy_for
from tandem.cluster.engine.prefix_cache import PrefixCache
from tandem.cluster.engine.scheduler import Scheduler
from tandem.cluster.engine.scheduler_events import TokensEmitted
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import Role, SamplingParams, SequenceSpec
from tandem.cluster.worker.engine_thread import EngineThread

WAIT_S = 60.0
PROMPTS = [[(7 * i + 11 * j) % 500 + 3 for j in range(length)] for i, length in enumerate((5, 31, 64, 100, 40))]


def device(stages: int, recruit: Recruit = children) -> CpuDevice:
    return CpuDevice(
        resolve_model("dummy:tiny-llama"),
        dtype="float32",
        kernels="torch",
        block_size=16,
        kv_cache_bytes=4 * 2**20,
        pipeline_stages=stages,
        recruit=recruit,
    )


class Run:
    """An engine thread that answers all prompts."""

    def __init__(self, on: CpuDevice, max_tokens: int) -> None:
        self.answers: list[list[int]] = [[] for _ in PROMPTS]
        self.failures: list[BaseException] = []
        self.over = threading.Event()
        self._left = len(PROMPTS)
        pool = BlockPool(on.num_blocks, 16)
        scheduler = Scheduler(
            block_pool=pool,
            prefix_cache=PrefixCache(pool, True),
            policy=policy_for(Role.MIXED),
            clock=MonotonicClock(),
            max_batched_tokens=64,
            max_running=8,
            max_waiting=8,
            max_model_len=512,
            eos_token_ids=(),
            max_outstanding_plans=on.plans_ahead,
            decode_parts=on.plans_ahead,
        )
        self.thread = EngineThread(scheduler, on, on_events=self._hear, on_failure=self._fail)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for number, prompt in enumerate(PROMPTS):
            spec = SequenceSpec(seq_id=str(number), prompt_token_ids=tuple(prompt), sampling=sampling)
            self.thread.submit(lambda scheduler, spec=spec: scheduler.add(spec))  # type: ignore[misc]
        self.thread.start()

    def _hear(self, events: object) -> None:
        for event in events:  # type: ignore[attr-defined]
            if isinstance(event, TokensEmitted):
                self.answers[int(event.seq_id)] += [token.token_id for token in event.tokens]
                self._left -= event.finish_reason is not None
        if not self._left:
            self.over.set()

    def _fail(self, error: BaseException) -> None:
        self.failures.append(error)
        self.over.set()


@pytest.fixture
def meetings() -> Iterator[tuple[Meetings, socket.socket]]:
    """The first stage's end, and the other one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Meetings(ours, stage=0), theirs


@pytest.fixture
def pipeline(meetings: tuple[Meetings, socket.socket]) -> Iterator[CpuDevice]:
    """Of two stages, which go to meetings."""

    def recruit(num_ranks: int) -> list[_Child]:
        link, theirs = socket.socketpair()
        numbers = (theirs.fileno(), meetings[1].fileno())
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", meeting_stage.__file__, *map(str, numbers)]
        with theirs:
            return [_Child(1, subprocess.Popen(command, pass_fds=numbers, env=paths), link)]

    two = device(2, recruit)
    runner = two._forward._runner._runner  # type: ignore[union-attr]
    runner.run = meetings[0].within(runner.run)
    yield two
    two.close()


def test_stages_compute_at_once_what_one_rank_does_and_a_rank_that_dies_mid_flight_ends_the_worker(
    pipeline: CpuDevice, meetings: tuple[Meetings, socket.socket]
) -> None:
    assert pipeline.plans_ahead == 2
    one = device(1)
    alone, together = Run(one, 12), Run(pipeline, 12)
    for run in (alone, together):
        assert run.over.wait(WAIT_S)
        assert not run.failures
        run.thread.stop(WAIT_S)
    assert together.answers == alone.answers
    assert meetings[0].held == [0, *PLANS]
    one.close()
    # The other stage stops, so that plans stay under way, and is killed.
    (pid,) = pipeline._forward.pids  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    run = Run(pipeline, 400)
    for _ in range(2000):
        if len(run.thread._launched) == 2 or run.over.wait(0.005):
            break
    assert len(run.thread._launched) == 2
    os.kill(pid, signal.SIGKILL)
    assert run.over.wait(WAIT_S)
    (failure,) = run.failures
    assert isinstance(failure, RankLost)
    assert "rank 1" in str(failure)
    run.thread.stop(WAIT_S)
