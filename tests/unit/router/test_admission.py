"""The bounded queue between the door and the first token."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.config import RouterConfig, SLOClass
from tandem.cluster.types import SLO
from tandem.router.admission import (
    DECISIONS_S,
    LATENESS_SAMPLES,
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    Admission,
)
from tandem.router.errors import Overloaded, PromiseUnattainable
from tandem.router.forecast import Forecast
from tandem.router.slo_classes import BATCH, Promise, SLOClasses

CLASSES = SLOClasses(
    RouterConfig(slo=SLO(ttft_s=2.0, tpot_s=0.1), slo_classes={"gold": SLOClass(ttft_s=0.5, tpot_s=0.05, share=3.0)})
)
INTERACTIVE = CLASSES.promise()


def enter(
    admission: Admission,
    key: str,
    now_s: float = 0.0,
    *,
    promise: Promise = INTERACTIVE,
    forecast: Forecast | None = None,
    elapsed_s: float = 0.0,
) -> None:
    admission.enter(key, now_s, promise=promise, forecast=forecast, elapsed_s=elapsed_s)


def waits(wait_s: float, own_s: float = 0.1, idle_s: float = 0.1) -> Forecast:
    return Forecast(wait_s=wait_s, own_s=own_s, idle_s=idle_s)


def test_a_place_is_free_again_after_the_first_token_or_the_end() -> None:
    admission = Admission(2)
    enter(admission, "a", 0.0)
    enter(admission, "b", 0.0)
    with pytest.raises(Overloaded, match="the limit is 2") as refused:
        enter(admission, "c", 0.0)
    assert refused.value.retry_after_s == MIN_RETRY_AFTER_S
    admission.first_token("a", 1.0)
    enter(admission, "c", 1.0)
    admission.leave("b")
    admission.leave("b")
    admission.leave("a")
    assert admission.waiting == 1


def test_a_refused_request_took_no_place() -> None:
    admission = Admission(1)
    enter(admission, "a", 0.0)
    with pytest.raises(Overloaded):
        enter(admission, "b", 0.0)
    admission.leave("b")
    assert admission.waiting == 1


def test_retry_after_is_the_time_the_queue_needs() -> None:
    admission = Admission(100)
    for i in range(21):
        enter(admission, f"done{i}", 0.0)
        admission.first_token(f"done{i}", i / 2)  # two a second
    for i in range(20):
        enter(admission, f"waits{i}", 10.0)
    assert admission.retry_after_s(10.0) == pytest.approx(20 / 2.1, rel=0.01)


def test_who_comes_back_competes_with_newcomers() -> None:
    """A storm at three times the capacity: one in three is let in, so it takes three tries; long after, one."""
    admission = Admission(1000)
    for i in range(30):
        if i % 3 == 0:
            enter(admission, str(i), i / 10, forecast=waits(1.0))
            continue
        with pytest.raises(PromiseUnattainable) as refused:
            enter(admission, str(i), i / 10, forecast=waits(3.0))
    once = 3.0 * 1.1 + 0.1 - 2.0
    assert refused.value.retry_after_s == pytest.approx(3 * once)
    with pytest.raises(PromiseUnattainable) as refused:
        enter(admission, "later", 60.0, forecast=waits(3.0))
    assert refused.value.retry_after_s == pytest.approx(once)


@given(st.lists(st.floats(0, 1e6), max_size=80).map(sorted), st.integers(0, 1000))
def test_retry_after_has_bounds(times: list[float], waiting: int) -> None:
    admission = Admission(2000)
    for i, now_s in enumerate(times):
        enter(admission, str(i), now_s)
        admission.first_token(str(i), now_s)
    for i in range(waiting):
        enter(admission, f"w{i}", 0.0)
    assert MIN_RETRY_AFTER_S <= admission.retry_after_s(times[-1] if times else 0.0) <= MAX_RETRY_AFTER_S


def test_a_promise_that_would_be_broken_is_refused_with_the_time_after_which_it_would_not() -> None:
    admission = Admission(8)
    enter(admission, "fits", forecast=waits(1.7))
    with pytest.raises(PromiseUnattainable, match=r"class 'interactive' is 2 s") as refused:
        enter(admission, "late", forecast=waits(5.0))
    assert refused.value.retry_after_s == pytest.approx(2 * (5.0 * 1.1 + 0.1 - 2.0)), "one in two is let in"
    assert (refused.value.http_status, refused.value.code) == (429, "slo_unattainable")
    with pytest.raises(PromiseUnattainable):
        enter(admission, "was long at the door", forecast=waits(0.0), elapsed_s=1.95)
    assert admission.waiting == 1


def test_while_nobody_knows_step_times_nobody_is_refused_for_a_promise() -> None:
    admission = Admission(8)
    enter(admission, "a", forecast=None, elapsed_s=100.0)
    assert admission.waiting == 1


def test_a_long_prompt_on_an_idle_cluster_is_let_in_unless_the_request_itself_promised_otherwise() -> None:
    admission = Admission(8)
    enter(admission, "long", forecast=waits(0.0, own_s=30.0, idle_s=30.0))
    own = CLASSES.promise(ttft_s=2.0)
    with pytest.raises(PromiseUnattainable, match=r"own promise is 2 s; even an idle cluster would need about 30 s"):
        enter(admission, "own", promise=own, forecast=waits(0.0, own_s=30.0, idle_s=30.0))
    with pytest.raises(PromiseUnattainable, match="is 60 s"):
        enter(admission, "behind", forecast=waits(31.0, own_s=30.0, idle_s=30.0))


def test_without_a_promise_only_the_bound_refuses_and_half_the_places_are_for_others() -> None:
    admission = Admission(4)
    batch = CLASSES.promise(BATCH)
    for key in "ab":
        enter(admission, key, promise=batch, forecast=waits(1000.0))
    with pytest.raises(Overloaded, match=r"2 requests without a promise .* the limit is 2 of 4"):
        enter(admission, "c", promise=batch, forecast=waits(0.0))
    enter(admission, "d", forecast=waits(0.0))
    admission.first_token("a", 1.0)
    enter(admission, "e", promise=batch)


def test_a_flood_with_promises_leaves_places_for_those_without() -> None:
    admission = Admission(16)
    for i in range(14):
        enter(admission, str(i))
    with pytest.raises(Overloaded, match="14 requests with a promise"):
        enter(admission, "one more")
    enter(admission, "batch", promise=CLASSES.promise(BATCH))


def test_the_promise_is_the_classes_but_for_what_the_request_names() -> None:
    assert (CLASSES.names, INTERACTIVE.slo) == (("interactive", "batch", "gold"), SLO(ttft_s=2.0, tpot_s=0.1))
    gold = CLASSES.promise("gold", tpot_s=0.2)
    assert (gold.ttft_s, gold.tpot_s, gold.share, gold.own_ttft, gold.own_tpot) == (0.5, 0.2, 3.0, False, True)
    assert (gold.effective_ttft_s(0.1), gold.effective_ttft_s(1.0)) == (0.5, 2.0)
    assert (gold.effective_tpot_s(10.0), CLASSES.promise("gold").effective_tpot_s(10.0)) == (0.2, 20.0)
    batch = CLASSES.promise(BATCH)
    assert batch.effective_ttft_s(5.0) == batch.effective_tpot_s(5.0) == float("inf")


def test_what_even_an_idle_cluster_cannot_do_is_refused_without_a_time_to_come_back() -> None:
    own = replace(INTERACTIVE, ttft_s=0.05, own_ttft=True)
    admission = Admission(8)
    with pytest.raises(PromiseUnattainable, match=r"even an idle cluster would need about 0\.1 s") as refused:
        admission.enter("a", 0.0, promise=own, forecast=waits(0.0))
    assert refused.value.retry_after_s is None
    fast = replace(INTERACTIVE, tpot_s=0.001, own_tpot=True)
    with pytest.raises(PromiseUnattainable, match=r"even an idle worker would need about 0\.05 s") as refused:
        admission.enter("a", 0.0, promise=fast, forecast=None, idle_tpot_s=0.05)
    assert refused.value.retry_after_s is None
    admission.enter("a", 0.0, promise=fast, forecast=None)  # nobody knows yet
    admission.enter("b", 0.0, promise=replace(INTERACTIVE, tpot_s=0.001), forecast=None, idle_tpot_s=0.05)


def test_a_forecast_learns_by_how_much_first_tokens_come_late_and_forgets_it() -> None:
    admission = Admission(100)
    for i in range(LATENESS_SAMPLES):
        enter(admission, str(i), 0.0, forecast=waits(0.0))
        admission.first_token(str(i), 1.1)  # a second later than forecast
    enter(admission, "waits", 1.2, forecast=waits(0.0))
    enter(admission, "fits", 1.2, forecast=waits(0.8))
    with pytest.raises(PromiseUnattainable):
        enter(admission, "late", 1.2, forecast=waits(1.0))
    enter(admission, "later", 1.2 + DECISIONS_S, forecast=waits(1.0))


def test_first_tokens_that_come_early_promise_nothing() -> None:
    admission = Admission(100)
    for i in range(LATENESS_SAMPLES):
        enter(admission, str(i), 0.0, forecast=waits(1.0))
        admission.first_token(str(i), 0.1)
    with pytest.raises(PromiseUnattainable):
        enter(admission, "late", 0.2, forecast=waits(2.0))


def test_lateness_is_over_where_nobody_waits_any_more() -> None:
    """A worker that was lost made many late; once it is back and idle, somebody must be let in to show it."""
    admission = Admission(100)
    for i in range(LATENESS_SAMPLES):
        enter(admission, str(i), 0.0, forecast=waits(0.0))
    for i in range(LATENESS_SAMPLES):
        admission.first_token(str(i), 10.1)
    enter(admission, "first", 10.2, forecast=waits(0.0))
    with pytest.raises(PromiseUnattainable):
        enter(admission, "second", 10.2, forecast=waits(0.0))
    admission.first_token("first", 10.3)
    enter(admission, "second", 10.3, forecast=waits(0.0))
