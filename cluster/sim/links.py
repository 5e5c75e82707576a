"""KV on its way: transfers over named links that share their bandwidth.

A transfer that crosses several links (out of one node, into another) goes at the pace of its slowest share and waits
for the longest latency; every link is shared evenly by those that cross it. It asks for its bytes in pieces, as blocks
become readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..latency.links import shared
from .timeline import Event, Timeline


@dataclass(slots=True, kw_only=True)
class Medium:
    """One direction of a link, and what crosses it now."""

    name: str
    bytes_per_s: float
    latency_s: float = 0.0
    flows: dict[Flow, None] = field(default_factory=dict, repr=False)
    bytes_total: int = 0
    """Bytes that have crossed it."""

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0.0:
            raise ValueError(f"medium {self.name}: bytes_per_s: {self.bytes_per_s!r} is not allowed; allowed: above 0")
        if not 0.0 <= self.latency_s < math.inf:
            raise ValueError(f"medium {self.name}: latency_s: {self.latency_s!r} is not allowed; allowed: seconds >= 0")


class Flow:
    """A piece of KV on its way; `on_done` is called when its last byte has arrived."""

    __slots__ = ("_done", "_left_bytes", "_links", "_on_done", "_rate", "_since_s", "_timeline", "size_bytes")

    def __init__(
        self, timeline: Timeline, links: Iterable[Medium], size_bytes: int, on_done: Callable[[], None]
    ) -> None:
        """Begins at once. No links: it is there at once."""
        self._timeline = timeline
        self._links = tuple(links)
        self._on_done = on_done
        self.size_bytes = size_bytes
        self._left_bytes = float(size_bytes)
        self._rate = math.inf
        self._since_s = timeline.time_s
        self._done: Event | None = None
        alone = True
        for link in self._links:
            alone = alone and not link.flows
            link.flows[self] = None
        if alone:
            self._plan(min([link.bytes_per_s for link in self._links], default=math.inf))
        else:
            self._share_out()

    def cancel(self) -> None:
        """It goes no further; idempotent."""
        if self._done is not None:
            self._done.cancel()
            self._done = None
            self._leave()

    def _share_out(self) -> None:
        """The links' flows changed: everybody on them gets a new share."""
        links = self._links
        if len(links) == 1:
            [link] = links
            flows = list(link.flows)
        else:
            flows = list({flow: None for link in links for flow in link.flows})
        for flow in flows:
            flow._plan(min([shared(link.bytes_per_s, len(link.flows)) for link in flow._links]))

    def _plan(self, rate: float) -> None:
        if rate == self._rate and self._done is not None:
            return
        now_s = self._timeline.time_s
        if self._done is not None:
            self._left_bytes = max(0.0, self._left_bytes - self._rate * (now_s - self._since_s))
            self._done.cancel()
        self._rate, self._since_s = rate, now_s
        self._done = self._timeline.at(now_s + self._left_bytes / rate, self._arrive)

    def _arrive(self) -> None:
        self._done = None
        for link in self._links:
            link.bytes_total += self.size_bytes
        self._leave()
        latency_s = max([link.latency_s for link in self._links], default=0.0)
        if latency_s:
            self._timeline.do_after(latency_s, self._on_done)
        else:
            self._on_done()

    def _leave(self) -> None:
        left = 0
        for link in self._links:
            link.flows.pop(self, None)
            left += len(link.flows)
        if left:
            self._share_out()
