"""On which node each worker of a candidate stands, in the names that a cluster's workers have."""

from __future__ import annotations

from collections import Counter

from .place import replicas_of
from .result import Affinity, Candidate
from .setting import Setting


def nodes_of(setting: Setting, candidate: Candidate) -> dict[str, tuple[str, ...]]:
    """Workers by node: `prefill-0`, or `decode-1 stage 0` where the stages of a worker stand on several nodes.
    ValueError where the nodes do not hold them.
    """
    if candidate.affinity is Affinity.LOW:
        return _by_stages(setting, candidate)
    held: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for replica in replicas_of(setting, candidate):
        role = replica.role.value
        name = f"{role}-{counts[role]}"
        counts[role] += 1
        over = -(-replica.gpus // setting.gpus_per_node)
        held.setdefault(replica.node, []).append(f"{name} over {over} nodes" if over > 1 else name)
    return {node: tuple(held[node]) for node in sorted(held, key=_number)}


def _by_stages(setting: Setting, candidate: Candidate) -> dict[str, tuple[str, ...]]:
    """Algorithm 2: the same stage of all workers of a cell stands on one node, next to others' where there is room."""
    stages = candidate.pools[0].pipeline_stages
    each = [(pool, pool.count // candidate.cells) for pool in candidate.pools]
    size = sum(pool.tensor_parallel * count for pool, count in each)
    room = max(1, setting.gpus_per_node // size)
    held: dict[str, tuple[str, ...]] = {}
    for place in range(candidate.cells * stages):
        cell, stage = divmod(place, stages)
        names = [f"{pool.role.value}-{cell * count + index}" for pool, count in each for index in range(count)]
        node = f"node-{place // room}"
        held[node] = held.get(node, ()) + tuple(f"{name} stage {stage}" if stages > 1 else name for name in names)
    return held


def _number(node: str) -> int:
    return int(node.rpartition("-")[2])
