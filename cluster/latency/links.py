"""What moves KV and activations between devices: named links, each with a bandwidth and a latency. Pure.

    transfer time = latency + bytes · sharers / bandwidth        (the α-β model: Hockney 1994)

DistServe's own simulator lets a transfer cost nothing; its paper says why that may be close (§3.3: 512 tokens of
OPT-66B are 1.13 GB, 10 requests/s of them want 90 Gb/s), which a slow link between nodes is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ..config_schema import ConfigError, Text, Within, check, parse


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


def read_links(sections: Mapping[str, Any], path: str = "links") -> dict[str, Link]:
    """Links by name out of a section of a YAML or JSON file. ConfigError names what is wrong with it."""
    links = {}
    for name, section in sections.items():
        if not isinstance(section, Mapping) or "name" in section:
            raise ConfigError(f"{path}.{name}", section, "a section of bandwidth_gb_s and latency_us")
        links[name] = parse(Link, {"name": name, **section}, f"{path}.{name}")
    return links
