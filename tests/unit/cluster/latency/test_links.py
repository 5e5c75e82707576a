"""Transfers over named links."""

from __future__ import annotations

from typing import Any

import pytest
from tandem.cluster.latency.links import INSTANT, Link, read_links


def test_a_transfer_is_latency_and_bytes() -> None:
    link = Link(name="ib", bandwidth_gb_s=1.0, latency_us=5e5)
    assert link.transfer_time_s(2e9) == 2.5
    assert link.transfer_time_s(2e9, sharers=3) == 6.5
    assert link.transfer_time_s(0) == 0.0
    assert INSTANT.transfer_time_s(10**9) < 1e-5


def test_links_are_read_by_name() -> None:
    links = read_links({"nvlink": {"bandwidth_gb_s": 300, "latency_us": 1}, "tcp": {"bandwidth_gb_s": 3}})
    assert links["nvlink"] == Link(name="nvlink", bandwidth_gb_s=300, latency_us=1)
    assert links["tcp"].latency_us == 0.0


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"bandwidth_gb_s": 0}, r"links\.a\.bandwidth_gb_s: 0 is not allowed; allowed: above 0"),
        ({"bandwidth_gb_s": 1, "latency_us": -1}, r"links\.a\.latency_us: -1 .* at least 0, at most"),
        ({"bandwith_gb_s": 1}, "did you mean bandwidth_gb_s"),
        ({}, "bandwidth_gb_s: is missing"),
        (25, r"links\.a: 25 is not allowed; allowed: a section of bandwidth_gb_s and latency_us"),
        ({"name": "b", "bandwidth_gb_s": 1}, r"links\.a: .*a section of bandwidth_gb_s and latency_us"),
    ],
)
def test_a_wrong_link_is_named(section: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_links({"a": section})
