"""Builds a worker's part of KV that goes from rank to rank (`transport` gloo or nccl): ports to its ranks, both ends of
sessions with other workers.
"""

from __future__ import annotations

import importlib.util

from ...kvtransfer.collective.commands import Begin
from ...kvtransfer.collective.holder import CollectiveHolder
from ...kvtransfer.collective.messages import Offer, encode_offer
from ...kvtransfer.collective.ports import WorkerRanks
from ...kvtransfer.collective.transport import CollectiveKVTransport
from ...kvtransfer.grpc_transport import GrpcKVTransport
from ...kvtransfer.layout import KVSplit
from ...kvtransfer.source import SourceDriver
from ..auth import MemberCredentials
from ..config import COLLECTIVE_TRANSPORTS, ConfigError, WorkerConfig
from ..engine.devices.base import Device
from ..engine.kv_ranks import own_port
from ..engine.parallel.kv import RankedKVStore

MESSAGE_S = 10.0
"""For ranks to meet, and for one message of a few MiB between them; less where the lease is short, so that a peer that
is gone is known of while the other side still holds the KV."""


class RankTransport:
    """A worker's ranks, and what it pulls through. Lives on its event loop."""

    def __init__(self, ranks: WorkerRanks, control: GrpcKVTransport) -> None:
        self._ranks = ranks
        self.pulls: CollectiveKVTransport = CollectiveKVTransport(control, ranks)
        split = ranks.split
        offer = Offer(
            backend=ranks.backend, tensor_parallel=split.tensor_parallel, pipeline_stages=split.pipeline_stages
        )
        self.offer: bytes = encode_offer(offer)
        """For `Hello.ranks`."""

    def sessions(self, source: SourceDriver, epoch: int) -> CollectiveHolder:
        """Serves what others pull from this worker."""
        return CollectiveHolder(source, self._ranks, epoch=epoch)

    async def close(self) -> None:
        """Leaves every session; idempotent."""
        await self._ranks.close()


async def join_ranks(
    config: WorkerConfig, host: str, device: Device, credentials: MemberCredentials
) -> RankTransport | None:
    """What the worker needs for its `transport`; None where that is another kind. `host`: its own address. Raises
    ConfigError.
    """
    if config.transport not in COLLECTIVE_TRANSPORTS:
        return None
    if importlib.util.find_spec("torch") is None:
        allowed = "auto, grpc or mapped, or with torch installed (pip install 'tandem-serve[engine]')"
        raise ConfigError("transport", config.transport, allowed)
    if credentials.tls is not None:
        allowed = "auto, grpc or mapped where members use TLS: what goes from rank to rank is not encrypted"
        raise ConfigError("transport", config.transport, allowed)
    kv = device.kv
    split = kv.split if isinstance(kv, RankedKVStore) else KVSplit(layout=kv.layout)
    begin = Begin(backend=config.transport, host=host, timeout_s=min(MESSAGE_S, config.lease_s / 2))
    ranks = WorkerRanks(split, kv.num_blocks, [own_port(kv), *device.other_ranks()], begin)
    await ranks.start()
    control = GrpcKVTransport(block_bytes=kv.layout.block_bytes, credentials=credentials)
    return RankTransport(ranks, control)
