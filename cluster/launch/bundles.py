"""What a cluster books of Ray's nodes, in one placement group. Pure.

The first bundle is the router's processes', which share ports. Each pipeline stage of each worker has one more, in the
order of `ClusterConfig.workers`: a bundle never spans nodes, so the ranks of a stage stand together, and stages stand
apart where there is no room for them, or where `nodes` says so. GPUs are booked of a Ray that others use too, so that
workers land where there are some: one for each rank, and of a worker of one rank the part that its memory takes
(`gpu_memory_utilization`). Which of a node's GPUs a rank computes on is `engine.gpus`, and nothing that Ray decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..config import ClusterConfig, ConfigError, EngineConfig

_SLIVER = 0.001
"""Of the resource that Ray gives each node in its address's name: whoever asks for it lands there."""


def stages_booked(engine: EngineConfig) -> int:
    """Bundles of one worker."""
    return 1 if engine.num_processes == 1 else engine.pipeline_stages


def bundles_of(config: ClusterConfig) -> list[dict[str, float]]:
    """Resources of each bundle."""
    bundles = [_on(config.nodes.get("router", ()), 0, config.router_cpus * config.router.processes)]
    for worker in config.workers():
        stages = stages_booked(worker.engine)
        ranks = worker.engine.num_processes // stages
        nodes = config.nodes.get(worker.worker_id, ())
        gpus = _gpus(worker.engine, ranks) if config.address is not None else {}
        bundles += [_on(nodes, stage, config.worker_cpus * ranks) | gpus for stage in range(stages)]
    return bundles


def room_text(bundles: Sequence[Mapping[str, float]]) -> str:
    """What they book in all, in words."""
    cpus, gpus = (sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU"))
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _on(nodes: Sequence[str], stage: int, cpus: float) -> dict[str, float]:
    """One bundle, on the node of its stage where one is named."""
    return {"CPU": cpus} | ({f"node:{nodes[stage % len(nodes)]}": _SLIVER} if nodes else {})


def _gpus(engine: EngineConfig, ranks: int) -> dict[str, float]:
    if engine.device != "cuda":
        return {}
    return {"GPU": engine.gpu_memory_utilization if engine.num_ranks == 1 else ranks}


def check_nodes(wanted: Mapping[str, Sequence[str]], there: Collection[str]) -> None:
    """ConfigError for a node that Ray does not have. `there`: addresses of those it has."""
    for name, nodes in wanted.items():
        for node in nodes:
            if node not in there:
                raise ConfigError(f"nodes.{name}", node, f"one of Ray's nodes, {', '.join(sorted(there))}")
