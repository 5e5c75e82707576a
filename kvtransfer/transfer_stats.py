"""What a transfer of KV took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStats:
    """What one transfer took, on the decode worker's clock."""

    transfer_s: float
    """From the first KV byte to the last, retries included."""
    exposed_transfer_s: float
    """Last KV byte minus end of prefill, at least 0: what the client waits for. The end of prefill is known by its age
    when the end frame left, so one network latency is not counted."""
    bytes: int
    blocks: int
    retries: int
    transport: str
    """How the last pull came: `EndFrame.transport`."""
