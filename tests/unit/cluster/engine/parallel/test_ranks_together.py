"""Ranks as threads of this process: for every architecture and split, the logits of one rank."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from rank_steps import BLOCK_SIZE, LLAMA, MODELS, assert_close, dummy, of_one_rank, ranked_kv, steps
from tandem.cluster.engine.devices.kv_memory import HostKVStore, kv_layout
from tandem.cluster.engine.forward import Pending
from tandem.cluster.engine.parallel.meeting import Meeting
from tandem.cluster.engine.parallel.messages import RankLost
from tandem.cluster.engine.parallel.ranks import TorchRanks
from tandem.cluster.engine.parallel.shard import Shard
from tandem.cluster.engine.parallel.stage import StageRunner, load_part, rank_kv
from tandem.cluster.engine.parallel.under_way import UnderWay
from tandem.cluster.engine.runner import TorchForward
from tandem.cluster.models.config import ModelConfig

WAIT_S = 30.0


def logits_of(config: ModelConfig, tensor: int, stages: int, ahead: int = 1) -> list[np.ndarray]:
    """The leader's logits of `steps`, of which `ahead` are under way at once."""
    kv = ranked_kv(config, tensor, stages)
    files = dummy(config)

    done, meeting = threading.Barrier(tensor * stages), Meeting()

    def rank(number: int) -> list[np.ndarray]:
        torch.set_num_threads(1)
        shard = Shard(config=config, tensor_parallel=tensor, pipeline_stages=stages, rank=number)
        ranks = TorchRanks(meeting, rank=number, tensor_parallel=tensor, pipeline_stages=stages, timeout_s=WAIT_S)
        model = load_part(files, shard, ranks, "float32", kernels="torch")
        memory = rank_kv(kv.segments[number].blocks, shard, "float32", BLOCK_SIZE)
        runner = StageRunner(model, memory, shard, ranks)
        found = [runner.run(plan).numpy() for plan in steps()] if number or ahead == 1 else run_ahead(runner, ahead)
        done.wait(WAIT_S)  # who leaves first breaks the others' connections
        ranks.close()
        return found

    with ThreadPoolExecutor(tensor * stages) as pool:
        return next(iter(pool.map(rank, range(tensor * stages))))


def run_ahead(runner: StageRunner, ahead: int) -> list[np.ndarray]:
    """The leader's part of it."""
    under_way, found = UnderWay(), []
    pending: deque[Pending] = deque()
    for plan in steps():
        begun = runner.begin(plan)
        pending.append(under_way.add(lambda begun=begun: runner.finish(begun).numpy()))  # type: ignore[misc]
        if len(pending) == ahead:
            found.append(pending.popleft()())
    found += [wait() for wait in pending]
    under_way.close()
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_logits_are_those_of_one_rank(model: str, tensor: int, stages: int) -> None:
    config = MODELS[model]
    assert_close(logits_of(config, tensor, stages), of_one_rank(config))


@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2), (2, 2)])
def test_a_step_is_over_when_its_kv_is_there_on_every_rank(tensor: int, stages: int) -> None:
    """Also one that samples nothing, where nobody waits for logits; followers are slow here."""
    kv = ranked_kv(LLAMA, tensor, stages)
    num_ranks = tensor * stages
    done, meeting = threading.Barrier(num_ranks), Meeting()
    after: list[bytes] = []

    def slowly(write: Callable[..., None]) -> Callable[..., None]:
        def late(*args: torch.Tensor) -> None:
            time.sleep(0.05)
            write(*args)

        return late

    def rank(number: int) -> None:
        shard = Shard(config=LLAMA, tensor_parallel=tensor, pipeline_stages=stages, rank=number)
        ranks = TorchRanks(meeting, rank=number, tensor_parallel=tensor, pipeline_stages=stages, timeout_s=WAIT_S)
        model = load_part(dummy(LLAMA), shard, ranks, "float32", kernels="torch")
        if number:
            model.ops = replace(model.ops, kv_write=slowly(model.ops.kv_write))
        runner = StageRunner(model, rank_kv(kv.segments[number].blocks, shard, "float32", BLOCK_SIZE), shard, ranks)
        runner.run(steps()[0])
        if number == 0:
            after.append(b"".join(bytes(segment.blocks) for segment in kv.segments.values()))
        done.wait(WAIT_S)

    with ThreadPoolExecutor(num_ranks) as pool:
        list(pool.map(rank, range(num_ranks)))
    assert after == [b"".join(bytes(segment.blocks) for segment in kv.segments.values())]


@pytest.mark.parametrize(("tensor", "stages"), [(1, 2), (2, 2), (1, 3)])
def test_a_pipelines_leader_begins_plans_before_earlier_ones_are_done(tensor: int, stages: int) -> None:
    """As many as there are stages."""
    config = MODELS["llama-untied"]
    assert_close(logits_of(config, tensor, stages, ahead=stages), of_one_rank(config))


def test_stages_that_do_not_divide_the_layers() -> None:
    config = MODELS["llama-untied"]
    assert_close(logits_of(config, 1, 3), of_one_rank(config))


def test_a_sum_over_ranks_has_one_order() -> None:
    """More than two ranks: an element's sum does not hang on what else is in the batch, nor on the rank that asks."""
    done, meeting = threading.Barrier(4), Meeting()
    rows = torch.randn(4, 33, 64, generator=torch.Generator().manual_seed(3))

    def rank(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        ranks = TorchRanks(meeting, rank=number, tensor_parallel=4, pipeline_stages=1, timeout_s=WAIT_S)
        together = ranks.all_reduce(rows[number].clone())
        alone = torch.cat([ranks.all_reduce(rows[number, i : i + 1].clone()) for i in range(33)])
        done.wait(WAIT_S)
        return together, alone

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(rank, range(4)))
    for together, alone in found:
        assert torch.equal(together, alone)
        assert torch.equal(together, found[0][0])


def test_a_rank_that_nobody_meets_gives_up() -> None:
    with pytest.raises(RankLost, match="rank 0 did not meet the others"):
        TorchRanks(Meeting(), rank=0, tensor_parallel=2, pipeline_stages=1, timeout_s=0.2)


def test_the_kv_of_all_ranks_is_that_of_one() -> None:
    """Read through the map between splits, block by block."""
    alone = HostKVStore(kv_layout(LLAMA, "float32", BLOCK_SIZE), 24)
    forward = TorchForward(dummy(LLAMA), "float32", "torch", alone.array)
    kv = ranked_kv(LLAMA, 1, 2)

    def rank(number: int) -> None:
        shard = Shard(config=LLAMA, pipeline_stages=2, rank=number)
        ranks = TorchRanks(meeting, rank=number, tensor_parallel=1, pipeline_stages=2, timeout_s=WAIT_S)
        model = load_part(dummy(LLAMA), shard, ranks, "float32", kernels="torch")
        runner = StageRunner(model, rank_kv(kv.segments[number].blocks, shard, "float32", BLOCK_SIZE), shard, ranks)
        for plan in steps():
            runner.run(plan)
        done.wait(WAIT_S)

    done, meeting = threading.Barrier(2), Meeting()
    for plan in steps():
        forward.run(plan)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    for block in (0, 5, 11, 20, 15):
        ours = np.frombuffer(kv.read_block(block), np.float32)
        np.testing.assert_allclose(ours, np.frombuffer(alone.read_block(block), np.float32), atol=1e-4)
