"""What moves KV and activations between devices: named links, each with a bandwidth and a latency. Pure.

    transfer time = latency + bytes · sharers / bandwidth        (the α-β model: Hockney 1994)

DistServe's own simulator lets a transfer cost nothing; its paper says why that may be close (§3.3: 512 tokens of
OPT-66B are 1.13 GB, 10 requests/s of them want 90 Gb/s), which a slow link between nodes is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ..config_schema import ConfigError, Text, Within, check, nearest, parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One way between two devices. ConfigError (a ValueError) names a field out of range."""

    name: Annotated[str, Text()]
    bandwidth_gb_s: Annotated[float, Within(0.0, 1e6, above=True)]
    """1e9 bytes a second, one direction, achieved rather than nominal."""
    latency_us: Annotated[float, Within(0.0, 3.6e9)] = 0.0
    """Of one transfer, whatever its size: protocol, first byte."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def latency_s(self) -> float:
        """Of one transfer, whatever its size."""
        return self.latency_us * 1e-6

    @property
    def bytes_per_s(self) -> float:
        """One direction."""
        return self.bandwidth_gb_s * 1e9

    def transfer_time_s(self, size_bytes: float, sharers: int = 1) -> float:
        """Seconds for `size_bytes` while `sharers` transfers, this one included, share the link evenly.

        Nothing to move takes no time.
        """
        return self.latency_s + size_bytes / shared(self.bytes_per_s, sharers) if size_bytes > 0 else 0.0


def shared(bytes_per_s: float, sharers: int) -> float:
    """What each of `sharers` transfers gets of a link, bytes a second: an even share."""
    return bytes_per_s / max(sharers, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTerms:
    """A link without its name. ConfigError (a ValueError) names a field out of range."""

    bandwidth_gb_s: Annotated[float, Within(0.0, 1e6, above=True)]
    latency_us: Annotated[float, Within(0.0, 3.6e9)] = 0.0

    def __post_init__(self) -> None:
        check(self)

    def named(self, name: str) -> Link:
        """The link."""
        return Link(name=name, bandwidth_gb_s=self.bandwidth_gb_s, latency_us=self.latency_us)


INSTANT = Link(name="instant", bandwidth_gb_s=1e6)
"""As good as infinitely fast: what DistServe's simulator assumes."""


_ETHERNET_SHARE = 0.94
"""TCP over IPv4 with 1500-byte frames carries 1448 of 1538 bytes on the wire."""
KNOWN_LINKS = {
    link.name: link
    for link in (
        INSTANT,
        # A share of 0.8 of x16 at 8, 16 and 32 GT/s (128b/130b): what copies of some MB reach.
        Link(name="pcie3", bandwidth_gb_s=12.6, latency_us=10),
        Link(name="pcie4", bandwidth_gb_s=25.2, latency_us=10),
        Link(name="pcie5", bandwidth_gb_s=50.4, latency_us=10),
        # A half of what NVIDIA's data sheets add up over both directions, times 0.8.
        Link(name="nvlink3", bandwidth_gb_s=240, latency_us=10),
        Link(name="nvlink4", bandwidth_gb_s=360, latency_us=10),
        *(
            Link(name=f"ethernet-{gbps}g", bandwidth_gb_s=gbps / 8 * _ETHERNET_SHARE, latency_us=30)
            for gbps in (1, 10, 25, 40, 100, 200, 400)
        ),
        Link(name="infiniband-hdr", bandwidth_gb_s=24, latency_us=5),
        Link(name="infiniband-ndr", bandwidth_gb_s=48, latency_us=5),
    )
}
"""By name, achieved bandwidths of one direction; shares and latencies are assumptions that a measurement replaces."""
_BITS = re.compile(r"(\d+(?:\.\d+)?)\s*(gb/s|gbps|gbit/s)", re.IGNORECASE)
_FORMS = "a section of bandwidth_gb_s and latency_us, gigabits like 25Gbps, gigabytes like 300GB/s, or one of "


def link_of(value: Any, path: str = "link") -> Link:
    """A link as a person gives it: a known name, `25Gbps` (as written, no share taken off), `300GB/s`, or a section.
    ConfigError naming `path` and what is allowed.
    """
    if isinstance(value, Mapping):
        return parse(Link, {"name": path, **value}, path)
    allowed = _FORMS + ", ".join(KNOWN_LINKS)
    if not isinstance(value, str):
        raise ConfigError(path, value, allowed)
    found = _BITS.fullmatch(value.strip())
    if found is not None:
        gigabytes = "GB" in found[2]
        return parse(Link, {"name": value.strip(), "bandwidth_gb_s": float(found[1]) / (1 if gigabytes else 8)}, path)
    if value.lower() not in KNOWN_LINKS:
        near = nearest(value, KNOWN_LINKS)
        raise ConfigError(path, value, (f"did you mean {near}? " if near else "") + allowed)
    return KNOWN_LINKS[value.lower()]
