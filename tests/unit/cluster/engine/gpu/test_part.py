"""What ranks agree on while they start."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from tandem.cluster.engine.gpu.part import SharedPart, whole
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
