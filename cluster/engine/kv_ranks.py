"""The rank of this process as KV between workers reaches it, whatever memory it has. Loads torch when asked."""

from __future__ import annotations

from ...kvtransfer.collective.ports import RankPort
from ...kvtransfer.store import KVStore
from .parallel.kv import RankedKVStore


def own_port(kv: KVStore) -> RankPort:
    """A port to the part of a worker's KV that lies in this process."""
    from ...kvtransfer.collective.memory import DeviceRankMemory, HostRankMemory
    from ...kvtransfer.collective.rank import LocalPort
    from .gpu.kv_store import DeviceKVStore

    own = kv.own if isinstance(kv, RankedKVStore) else kv
    if isinstance(own, DeviceKVStore):
        return LocalPort(DeviceRankMemory(own.tensor))
    segment = kv.segments[0] if isinstance(kv, RankedKVStore) else kv.segment
    assert segment is not None, "KV of a device in this process lies in its memory"
    return LocalPort(HostRankMemory(segment.blocks))
