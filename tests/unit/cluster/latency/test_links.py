"""Transfers over named links."""

from __future__ import annotations

import pytest
from tandem.cluster.latency.links import INSTANT, Link, read_links


def test_a_transfer_is_latency_and_bytes() -> None:
    link = Link(name="ib", bandwidth_bytes_s=1e9, latency_s=0.5)
    assert link.transfer_time_s(2e9) == 2.5
    assert link.transfer_time_s(2e9, sharers=3) == 6.5
    assert link.transfer_time_s(0) == 0.0
    assert INSTANT.transfer_time_s(10**9) < 1e-5


def test_links_are_read_by_name() -> None:
    links = read_links({"nvlink": {"bandwidth_bytes_s": 3e11, "latency_s": 1e-6}, "tcp": {"bandwidth_bytes_s": 3e9}})
    assert links["nvlink"] == Link(name="nvlink", bandwidth_bytes_s=3e11, latency_s=1e-6)
    assert links["tcp"].latency_s == 0.0


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"bandwidth_bytes_s": 0}, r"links\.a\.bandwidth_bytes_s: 0 is not allowed; allowed: above 0"),
        ({"bandwidth_bytes_s": 1e9, "latency_s": -1}, r"links\.a\.latency_s: -1 .* at least 0, at most 3600"),
        ({"bandwith_bytes_s": 1e9}, "did you mean bandwidth_bytes_s"),
        ({}, "bandwidth_bytes_s: is missing"),
    ],
)
def test_a_wrong_link_is_named(section: dict[str, float], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_links({"a": section})
