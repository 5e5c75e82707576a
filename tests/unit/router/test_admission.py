"""The bounded queue between the door and the first token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.router.admission import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, Admission
from tandem.router.errors import Overloaded


def test_a_place_is_free_again_after_the_first_token_or_the_end() -> None:
    admission = Admission(2)
    admission.enter("a", 0.0)
    admission.enter("b", 0.0)
    with pytest.raises(Overloaded, match="the limit is 2") as refused:
        admission.enter("c", 0.0)
    assert refused.value.retry_after_s == MIN_RETRY_AFTER_S
    admission.first_token("a", 1.0)
    admission.enter("c", 1.0)
    admission.leave("b")
    admission.leave("b")
    admission.leave("a")
    assert admission.waiting == 1


def test_a_refused_request_took_no_place() -> None:
    admission = Admission(1)
    admission.enter("a", 0.0)
    with pytest.raises(Overloaded):
        admission.enter("b", 0.0)
    admission.leave("b")
    assert admission.waiting == 1


def test_retry_after_is_the_time_the_queue_needs() -> None:
    admission = Admission(100)
    for i in range(21):
        admission.enter(f"done{i}", 0.0)
        admission.first_token(f"done{i}", i / 2)  # two a second
    for i in range(20):
        admission.enter(f"waits{i}", 10.0)
    assert admission.retry_after_s(10.0) == pytest.approx(20 / 2.1, rel=0.01)


@given(st.lists(st.floats(0, 1e6), max_size=80).map(sorted), st.integers(0, 1000))
def test_retry_after_has_bounds(times: list[float], waiting: int) -> None:
    admission = Admission(2000)
    for i, now_s in enumerate(times):
        admission.enter(str(i), now_s)
        admission.first_token(str(i), now_s)
    for i in range(waiting):
        admission.enter(f"w{i}", 0.0)
    assert MIN_RETRY_AFTER_S <= admission.retry_after_s(times[-1] if times else 0.0) <= MAX_RETRY_AFTER_S
