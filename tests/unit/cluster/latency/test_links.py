"""Transfers over named links."""

from __future__ import annotations

from typing import Any

import pytest
from tandem.cluster.latency.links import INSTANT, Link, LinkTerms, link_of, shared
from tandem.cluster.sim.links import Flow, Medium
from tandem.cluster.sim.timeline import Timeline


def test_a_transfer_is_latency_and_bytes() -> None:
    link = Link(name="ib", bandwidth_gb_s=1.0, latency_us=5e5)
    assert link.transfer_time_s(2e9) == 2.5
    assert link.transfer_time_s(2e9, sharers=3) == 6.5
    assert link.transfer_time_s(0) == 0.0
    assert INSTANT.transfer_time_s(10**9) < 1e-5


def test_a_simulated_transfer_takes_what_the_link_says() -> None:
    """Virtual time and everything else cost a transfer by the same rule."""
    link, sharers = LinkTerms(bandwidth_gb_s=2.0, latency_us=300).named("ib"), 3
    timeline, done = Timeline(), []
    medium = Medium(name=link.name, bytes_per_s=link.bytes_per_s, latency_s=link.latency_s)
    for _ in range(sharers):
        Flow(timeline, [medium], 10**9, lambda: done.append(timeline.now_s()))
    timeline.run()
    assert done == pytest.approx([link.transfer_time_s(1e9, sharers)] * sharers)
    assert shared(link.bytes_per_s, 0) == shared(link.bytes_per_s, 1) == 2e9


def test_a_link_is_a_section_or_a_known_name_or_a_bandwidth_in_bits_or_bytes() -> None:
    section = {"bandwidth_gb_s": 300, "latency_us": 1}
    assert link_of(section, "intra_node") == Link(name="intra_node", bandwidth_gb_s=300, latency_us=1)
    assert link_of({"bandwidth_gb_s": 3}).latency_us == 0.0
    assert (link_of("25Gbps").bandwidth_gb_s, link_of("25 GB/s").bandwidth_gb_s) == (3.125, 25.0)
    assert link_of("InfiniBand-HDR").bandwidth_gb_s == 24


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"bandwidth_gb_s": 0}, r"a\.bandwidth_gb_s: 0 is not allowed; allowed: above 0"),
        ({"bandwidth_gb_s": 1, "latency_us": -1}, r"a\.latency_us: -1 .* at least 0, at most"),
        ({"bandwith_gb_s": 1}, "did you mean bandwidth_gb_s"),
        ({}, "bandwidth_gb_s: is missing"),
        (25, r"a: 25 is not allowed; allowed: a section of bandwidth_gb_s and latency_us"),
        ("infiniband", r"a: 'infiniband' is not allowed; allowed: did you mean infiniband-"),
    ],
)
def test_a_wrong_link_is_named(section: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        link_of(section, "a")
