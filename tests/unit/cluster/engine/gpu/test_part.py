"""What ranks agree on while they start, and how what is between them ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tandem.cluster.engine.gpu import part as part_module
from tandem.cluster.engine.gpu.part import DeviceRanks, SharedPart, whole
from tandem.cluster.engine.gpu.step_clock import at_rest
from tandem.cluster.engine.parallel import ranks as ranks_module
from tandem.cluster.engine.parallel.meeting import Meeting
from tandem.cluster.engine.parallel.messages import RankLost
from tandem.cluster.engine.parallel.shard import Shard
from tandem.cluster.models.registry import CONFIGS

CONFIG = CONFIGS["tiny-llama"]


def parts(tensor: int, stages: int) -> list[SharedPart]:
    meeting = Meeting()
    return [
        SharedPart(Shard(config=CONFIG, tensor_parallel=tensor, pipeline_stages=stages, rank=rank), meeting, None)  # type: ignore[arg-type]
        for rank in range(tensor * stages)
    ]


def test_all_ranks_hear_the_smallest_number() -> None:
    ranks = parts(2, 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: part.smallest("blocks", 100 - part.shard.rank), ranks))
    assert found == [97, 97, 97, 97]
    assert whole(CONFIG).smallest("blocks", 5) == 5


def test_a_rank_that_does_not_come_is_an_error() -> None:
    part = parts(2, 1)[0]
    part._table.fail(RankLost("rank 1 has ended"))  # type: ignore[attr-defined]
    with pytest.raises(RankLost, match="rank 1 has ended"):
        part.smallest("blocks", 1)


@pytest.mark.parametrize(("tensor", "stages", "ahead", "looks"), [(1, 1, 2, True), (4, 1, 2, True), (1, 2, 2, False)])
def test_a_stage_has_a_plan_each_or_a_worker_looks_ahead(tensor: int, stages: int, ahead: int, looks: bool) -> None:
    for part in parts(tensor, stages):
        assert (part.plans_ahead, part.looks_ahead) == (ahead, looks)
        assert part.leads == (part.shard.rank == 0)


class Group:
    """As NCCL's are given up: at once, but with a return that may wait for others."""

    def __init__(self) -> None:
        self.aborts = threading.Semaphore(0)
        self.ends = threading.Event()

    def abort(self) -> None:
        self.aborts.release()
        self.ends.wait(20)
        raise RuntimeError("ncclCommAbort: unhandled error")


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Those that are made."""
    groups: list[Group] = []

    def make(*_: Any, **__: Any) -> Group:
        groups.append(Group())
        return groups[-1]

    for module in (ranks_module, part_module):
        monkeypatch.setattr(module, "make_group", make)
    return groups


def test_every_group_is_given_up_while_one_waits_for_graphs(groups: list[Group]) -> None:
    shard = Shard(config=CONFIG, tensor_parallel=2, pipeline_stages=2)
    ranks = DeviceRanks(Meeting(), shard, torch.device("cuda"), timeout_s=1)
    assert len(groups) == 3, "of the stage, of the pipeline, of what comes back"
    for _ in range(2):
        SharedPart(shard, Meeting(), ranks).give_up()
    assert all(group.aborts.acquire(timeout=20) for group in groups)
    assert not ranks._aborts.wait(0)
    for group in groups:
        group.ends.set()
    ranks.close()
    assert ranks._aborts.wait(0)
    assert not any(group.aborts.acquire(blocking=False) for group in groups), "once each"


def test_a_group_that_does_not_end_is_waited_for_once(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever closes: the device does, through its part, and then the worker."""
    monkeypatch.setattr(part_module, "ABORT_S", 0.01)
    shard = Shard(config=CONFIG, tensor_parallel=2)
    ranks = DeviceRanks(Meeting(), shard, torch.device("cuda"), timeout_s=1)
    SharedPart(shard, Meeting(), ranks).close()
    ranks.close()
    for group in groups:
        group.ends.set()
    assert [record.message for record in caplog.records] == [
        "a group of ranks has not ended within 0.01 s after it was given up"
    ]


class Stream:
    """Done at the last of its answers, or never."""

    def __init__(self, *answers: bool | RuntimeError) -> None:
        self._answers = list(answers)

    def query(self) -> bool:
        answer = self._answers.pop(0) if self._answers else False
        if isinstance(answer, RuntimeError):
            raise answer
        return answer


def test_streams_are_waited_for_until_they_are_done_or_the_time_is_over() -> None:
    assert at_rest([], 0)
    assert at_rest([Stream(False, False, True), Stream(RuntimeError("CUDA error")), Stream(True)], 20)
    assert not at_rest([Stream(True), Stream()], 0.01)
