"""What the two algorithms propose, where workers stand, and what lies beside a candidate."""

from __future__ import annotations

import pytest
from plan_cases import mixed, opt, split
from tandem.cluster.planner.algorithms import algorithm_1, algorithm_2, colocated
from tandem.cluster.planner.neighbors import neighbors, one_more
from tandem.cluster.planner.place import all_splits, replicas_of, why_not
from tandem.cluster.planner.result import Affinity, Fate, PhaseResult
from tandem.cluster.planner.setting import setting_of
from tandem.cluster.types import Role


def phase(role: Role, tensor: int, stages: int, goodput: float) -> PhaseResult:
    return PhaseResult(
        role=role,
        tensor_parallel=tensor,
        pipeline_stages=stages,
        fate=Fate.ESTIMATED,
        goodput=goodput,
        max_batched_tokens=2048,
        max_running=256,
    )


def test_algorithm_1_replicates_phases_where_their_rates_meet() -> None:
    prefill = [phase(Role.PREFILL, 2, 1, 6.0), phase(Role.PREFILL, 1, 1, 1.0)]
    decode = [phase(Role.DECODE, 1, 1, 6.0), phase(Role.DECODE, 2, 1, 7.0)]
    [best, *_] = algorithm_1(setting_of(opt(gpus_per_node=8)), prefill, decode)
    shapes = [(pool.role, pool.count, pool.tensor_parallel) for pool in best.pools]
    assert shapes == [(Role.PREFILL, 2, 2), (Role.DECODE, 2, 1)]
    assert best.affinity is Affinity.HIGH


def test_algorithm_1_takes_as_few_gpus_as_a_rate_wants() -> None:
    prefill, decode = [phase(Role.PREFILL, 1, 1, 3.0)], [phase(Role.DECODE, 1, 1, 3.0)]
    [best, *_] = algorithm_1(setting_of(opt(gpus_per_node=8, rate=5.0)), prefill, decode)
    assert [pool.count for pool in best.pools] == [2, 2]


def test_algorithm_2_keeps_matching_stages_on_one_node() -> None:
    setting = setting_of(opt(nodes=4, gpus_per_node=8))
    prefill = [phase(Role.PREFILL, 4, 1, 3.0), phase(Role.PREFILL, 4, 2, 6.0), phase(Role.PREFILL, 8, 2, 9.0)]
    decode = [phase(Role.DECODE, 2, 2, 6.0)]
    proposals = algorithm_2(setting, prefill, decode)
    assert proposals
    for one in proposals:
        stages = {pool.pipeline_stages for pool in one.pools}
        assert stages == {2}, "the same stages on both sides"
        segment = sum(pool.tensor_parallel * pool.count // one.cells for pool in one.pools)
        assert segment <= 8
        assert one.gpus <= 32
        replicas = replicas_of(setting, one)
        assert {replica.node for replica in replicas} == {"cell"}
        assert {replica.handoff_shards for replica in replicas} == {2}, "each stage has the link of its own node"


def test_algorithm_2_has_nothing_to_add_on_one_node() -> None:
    assert algorithm_2(setting_of(opt()), [phase(Role.PREFILL, 1, 1, 3.0)], [phase(Role.DECODE, 1, 1, 3.0)]) == []


def test_colocated_plans_use_as_many_gpus_as_they_are_given() -> None:
    found = colocated(setting_of(opt()), [(1, 1), (2, 1), (4, 1)], 3)
    assert {(one.pools[0].tensor_parallel, one.pools[0].count) for one in found} == {(1, 3), (2, 1)}


def test_splits_share_heads_and_whole_nodes() -> None:
    splits = all_splits(setting_of(opt(nodes=2, gpus_per_node=4)))
    assert {(1, 1), (2, 2), (4, 2), (1, 8)} <= set(splits)
    assert all(40 % tensor == 0 and tensor <= 4 and tensor * stages <= 8 for tensor, stages in splits)
    assert (1, 6) not in splits, "six GPUs are neither inside a node nor whole nodes"


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    why = why_not(setting_of(opt(model="opt-66b")), split(1, 1, 1, 1))
    assert "does not fit: 80.00 GiB of a100-80g x 0.9" in why
    assert "weights" in why
    assert why_not(setting_of(opt()), split(1, 2)) == ""


def test_workers_that_no_nodes_hold_are_refused() -> None:
    setting = setting_of(opt(nodes=2, gpus_per_node=2))
    with pytest.raises(ValueError, match="workers of 2, 2, 1 GPUs do not fit onto 2 nodes of 2"):
        replicas_of(setting, split(2, 1))
    assert why_not(setting, split(2, 1), spare_nodes=1) == ""


def test_the_largest_workers_are_placed_first() -> None:
    setting = setting_of(opt(nodes=2, gpus_per_node=2))
    assert [replica.node for replica in replicas_of(setting, split(1, 2))] == ["node-0", "node-1", "node-1"]


def test_neighbors_are_one_change_away_and_can_run() -> None:
    setting = setting_of(opt())
    here = split(1, 1)
    around = neighbors(setting, here)
    counts = {tuple(pool.count for pool in one.pools) for one in around}
    assert counts == {(1, 1), (1, 2)}, "a second prefill worker of two GPUs does not fit beside"
    limits = {tuple((pool.max_batched_tokens, pool.max_running) for pool in one.pools) for one in around}
    assert ((1024, 256), (2048, 256)) in limits
    assert ((2048, 256), (2048, 128)) in limits
    assert all(one.gpus <= 4 and not why_not(setting, one) for one in around)


def test_one_more_has_one_more() -> None:
    more = one_more(split(1, 1), Role.DECODE)
    assert more is not None
    assert [pool.count for pool in more.pools] == [1, 2]
    assert one_more(mixed(), Role.DECODE) is None
