"""Where the workers of a candidate stand, and whether it can run at all."""

from __future__ import annotations

from dataclasses import replace

from ..sim.deploy import Replica, costs_of
from .result import Affinity, Candidate, Pool
from .setting import Setting


def replicas_of(setting: Setting, candidate: Candidate) -> list[Replica]:
    """Its workers on their nodes; of several cells those of one. ValueError where the nodes do not hold them."""
    sizes = [(pool, pool.count // candidate.cells) for pool in candidate.pools]
    if candidate.affinity is Affinity.LOW:
        # Stages of both phases that match stand on one node each: KV stays inside, and every stage has a link.
        shards = candidate.pools[0].pipeline_stages
        return [replica_of(pool, "cell", shards) for pool, count in sizes for _ in range(count)]
    nodes = _pack(setting, [pool.worker_gpus for pool, count in sizes for _ in range(count)])
    pools = [pool for pool, count in sizes for _ in range(count)]
    return [replica_of(pool, node, 1) for pool, node in zip(pools, nodes, strict=True)]


def replica_of(pool: Pool, node: str = "", shards: int = 1) -> Replica:
    """One worker of a pool."""
    return Replica(
        role=pool.role,
        tensor_parallel=pool.tensor_parallel,
        pipeline_stages=pool.pipeline_stages,
        node=node,
        max_batched_tokens=pool.max_batched_tokens,
        max_running=pool.max_running,
        batching=pool.batching,
        handoff_shards=shards,
    )


def _pack(setting: Setting, sizes: list[int]) -> list[str]:
    """The node of each worker: the largest first, each where it fits; one larger than a node takes whole ones."""
    free = [setting.gpus_per_node] * setting.nodes
    found = [""] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        wanted = sizes[place]
        whole = -(-wanted // setting.gpus_per_node)
        if whole > 1:
            empty = [node for node, left in enumerate(free) if left == setting.gpus_per_node][:whole]
        else:
            empty = [node for node, left in enumerate(free) if left >= wanted][:1]
        if len(empty) < whole:
            raise ValueError(
                f"workers of {', '.join(str(size) for size in sizes)} GPUs do not fit onto {setting.nodes} nodes of "
                f"{setting.gpus_per_node}"
            )
        for node in empty:
            free[node] -= setting.gpus_per_node if whole > 1 else wanted
        found[place] = f"node-{empty[0]}"
    return found


def why_not(setting: Setting, candidate: Candidate, *, spare_nodes: int = 0) -> str:
    """Why it cannot run: memory, with the arithmetic, a split that the model does not allow, nodes; empty: it can.

    `spare_nodes`: beside those that there are.
    """
    setting = replace(setting, nodes=setting.nodes + spare_nodes)
    try:
        for replica in replicas_of(setting, candidate):
            setting.device.memory(replica)
            costs_of(setting.device.source, replica.tensor_parallel, replica.pipeline_stages)
    except ValueError as error:
        return str(error)
    return ""


def all_splits(setting: Setting) -> list[tuple[int, int]]:
    """Every (tensor_parallel, pipeline_stages) worth a look: tensor parallelism divides the heads and stays inside a
    node, stages are even or share the layers, and all of it leaves at most the whole cluster and stays within the
    setting's limits.
    """
    config = setting.device.facts.config
    widest = min(setting.gpus_per_node, setting.max_tensor_parallel or setting.gpus_per_node)
    deepest = min(config.num_layers, setting.max_pipeline_stages or config.num_layers)
    tensors = [size for size in range(1, widest + 1) if config.num_heads % size == 0]
    stages = [count for count in (1, 2, 3, 4, 6, 8, 12, 16) if count <= deepest]
    found = []
    for tensor in tensors:
        for count in stages:
            size = tensor * count
            whole_nodes = size <= setting.gpus_per_node or size % setting.gpus_per_node == 0
            if size <= setting.gpus and whole_nodes:
                found.append((tensor, count))
    return found
