"""On which node, and on which of its GPUs, each worker of a candidate stands, in the names of a cluster's workers."""

from __future__ import annotations

from collections import Counter

from ..types import Role
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


def gpus_of(setting: Setting, candidate: Candidate) -> dict[Role, tuple[int, ...]]:
    """Which of their node's GPUs each pool takes, worker by worker and rank by rank (`EngineConfig.gpus`), where the
    workers stand as `nodes_of` says.
    """
    found: dict[Role, tuple[int, ...]] = {pool.role: () for pool in candidate.pools}
    if candidate.affinity is not Affinity.LOW:
        taken: Counter[str] = Counter()
        for replica in replicas_of(setting, candidate):
            first = taken[replica.node]
            taken[replica.node] += replica.gpus
            found[replica.role] += tuple((first + rank) % setting.gpus_per_node for rank in range(replica.gpus))
        return found
    cells = _Cells(setting, candidate)
    for cell in range(candidate.cells):
        first = 0
        for pool, count in cells.each:
            for _ in range(count):
                for stage in range(cells.stages):
                    base = cells.place(cell, stage) % cells.room * cells.size + first
                    found[pool.role] += tuple(range(base, base + pool.tensor_parallel))
                first += pool.tensor_parallel
    return found


class _Cells:
    """Algorithm 2's cells on nodes: the same stage of all workers of a cell stands on one node, next to other stages
    and cells where there is room.
    """

    def __init__(self, setting: Setting, candidate: Candidate) -> None:
        self.stages = candidate.pools[0].pipeline_stages
        self.each = [(pool, pool.count // candidate.cells) for pool in candidate.pools]
        self.size = sum(pool.tensor_parallel * count for pool, count in self.each)
        """GPUs of one stage of a cell."""
        self.room = max(1, setting.gpus_per_node // self.size)
        """Stages of cells on one node."""

    def place(self, cell: int, stage: int) -> int:
        """In the order in which nodes are filled."""
        return cell * self.stages + stage


def _by_stages(setting: Setting, candidate: Candidate) -> dict[str, tuple[str, ...]]:
    cells = _Cells(setting, candidate)
    held: dict[str, tuple[str, ...]] = {}
    for cell in range(candidate.cells):
        for stage in range(cells.stages):
            end = f" stage {stage}" if cells.stages > 1 else ""
            node = f"node-{cells.place(cell, stage) // cells.room}"
            for pool, count in cells.each:
                names = (f"{pool.role.value}-{cell * count + index}{end}" for index in range(count))
                held[node] = (*held.get(node, ()), *names)
    return held


def _number(node: str) -> int:
    return int(node.rpartition("-")[2])
