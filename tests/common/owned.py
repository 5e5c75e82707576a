"""What of a worker somebody still owns."""

from __future__ import annotations

from tandem.cluster.proto import tandem_internal_v1_pb2 as pb


def owned(status: pb.WorkerStatus) -> dict[str, int]:
    """Blocks, leases, credits, pulls, sequences and places in queues that are not free; empty: nothing is left."""
    counts = {
        "held_blocks": status.num_blocks - status.free_blocks - status.cached_blocks,
        "leases": status.leases,
        "credited_blocks": status.credited_blocks,
        "pulls": status.pulls,
        "sequences": status.streams,
        "waiting": status.waiting,
        "running": status.running,
        "held": status.held,
    }
    return {name: count for name, count in counts.items() if count}
