"""What a request is told that it would wait: from queues, step times and what stands ahead of it."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.types import Role, StepTimeCoefficients, Urgency
from tandem.router.forecast import LEARNED_STEPS, QUEUE_S, Forecast, forecast, room_tokens, tokens_per_s
from tandem.router.placement import WorkerView, keeps_tpot
from views import VIEW
from views import view as base_view

PATIENT = Urgency()
BASE = VIEW._replace(
    role=Role.PREFILL,
    max_running=64,
    step_time=StepTimeCoefficients(step_s=0.0, prefill_token_s=1e-3, decode_row_s=1e-2, context_token_s=0.0),
    steps_total=LEARNED_STEPS,
)
view = partial(base_view, base=BASE)


def told(
    *views: WorkerView,
    tokens: int = 100,
    ahead: float = 0.0,
    decode_wait_s: float = 0.0,
    urgency: Urgency = PATIENT,
) -> Forecast:
    uncached = {v.worker_id: tokens for v in views}
    result = forecast(views, uncached, urgency=urgency, ahead_tokens=ahead, decode_wait_s=decode_wait_s)
    assert result is not None
    return result


def test_an_idle_worker_needs_the_prompts_own_time() -> None:
    result = told(view())
    assert (result.wait_s, result.own_s, result.idle_s) == pytest.approx((0.0, 0.1, 0.1))


def test_a_workers_queue_and_the_routers_come_before() -> None:
    assert told(view(queued_prefill_tokens=300)).wait_s == pytest.approx(0.3)
    assert told(view(queued_prefill_tokens=300), ahead=1000).wait_s == pytest.approx(1.3)


def test_two_workers_share_what_stands_ahead_and_the_shorter_queue_takes_more_of_it() -> None:
    assert told(view("a"), view("b"), ahead=1000).wait_s == pytest.approx(0.5)
    uneven = (view("a", queued_prefill_tokens=800), view("b"))
    assert told(*uneven).wait_s == pytest.approx(0.0)
    assert told(*uneven, ahead=500).wait_s == pytest.approx(0.5), "all of it goes to b"
    assert told(*uneven, ahead=1000).wait_s == pytest.approx(0.9), "800 to b alone, 100 to each"


def test_decode_that_keeps_everybody_back_counts_where_it_is_longer() -> None:
    assert told(view(), ahead=1000, decode_wait_s=3.0).ttft_s == pytest.approx(3.488), (
        "behind it there is most of a step more"
    )
    assert told(view(), ahead=1000, decode_wait_s=0.5).ttft_s == pytest.approx(1.488)


def test_a_prefix_that_one_worker_has_shortens_its_own_part() -> None:
    views = (view("a"), view("b", queued_prefill_tokens=50))
    result = forecast(views, {"a": 1000, "b": 100}, urgency=PATIENT, ahead_tokens=0.0, decode_wait_s=0.0)
    assert result is not None
    assert (result.wait_s, result.own_s) == pytest.approx((0.05, 0.1))


def test_while_nobody_has_learned_its_step_times_nobody_knows() -> None:
    fresh = view("fresh", steps_total=LEARNED_STEPS - 1, step_time=StepTimeCoefficients(prefill_token_s=1.0))
    assert forecast((fresh,), {"fresh": 10}, urgency=PATIENT, ahead_tokens=0.0, decode_wait_s=9.0) is None
    assert forecast((), {}, urgency=PATIENT, ahead_tokens=0.0, decode_wait_s=0.0) is None
    assert told(fresh, view("old"), ahead=1000).wait_s == pytest.approx(0.5), "a new one is taken to be like the others"


def test_a_mixed_worker_computes_prompts_beside_its_rows() -> None:
    alone, busy = view(role=Role.MIXED), view(role=Role.MIXED, running=12)
    assert tokens_per_s(alone) == pytest.approx(1000.0)
    assert tokens_per_s(busy) == pytest.approx(500 / (0.12 + 0.5))
    assert told(busy).own_s == pytest.approx(0.12 + 0.1)


def test_a_workers_queue_is_kept_short_but_never_empty() -> None:
    full = 512 + QUEUE_S * 1000
    assert room_tokens([view()], PATIENT) == pytest.approx(full)
    queued = [view(queued_prefill_tokens=600), view("b", queued_prefill_tokens=5000)]
    assert room_tokens(queued, PATIENT) == pytest.approx(full - 600)


def test_work_that_is_due_at_no_time_is_not_in_the_way_of_work_that_is() -> None:
    """The worker serves in the same order: a long batch prompt under way there lets a short urgent one go first."""
    busy, due = view(queued_prefill_tokens=8000, patient_prefill_tokens=7000), Urgency(deadline_s=1.0)
    assert told(busy).wait_s == pytest.approx(8.0)
    assert told(busy, urgency=due).wait_s == pytest.approx(1.0)
    assert room_tokens([busy], PATIENT) == 0
    assert room_tokens([busy._replace(queued_prefill_tokens=7100)], due) == pytest.approx(512 + QUEUE_S * 1000 - 100)


@given(
    queues=st.lists(st.tuples(st.integers(0, 5000), st.floats(1e-5, 1e-2)), min_size=1, max_size=5),
    ahead=st.floats(0, 1e5),
)
def test_what_stands_ahead_is_all_begun_when_the_wait_is_over(queues: list[tuple[int, float]], ahead: float) -> None:
    views = [
        view(f"w{i}", queued_prefill_tokens=queued, step_time=StepTimeCoefficients(prefill_token_s=token_s))
        for i, (queued, token_s) in enumerate(queues)
    ]
    level_s = min(told(*views, ahead=ahead).wait_s, told(*views, tokens=1, ahead=ahead).wait_s)
    computed = sum(max(0.0, level_s * tokens_per_s(v) - v.queued_prefill_tokens) for v in views)
    assert computed >= ahead * 0.999 - 1.0
    assert told(*views, ahead=ahead + 100).ttft_s >= told(*views, ahead=ahead).ttft_s - 1e-9


def test_a_row_more_must_keep_its_own_promise_and_those_of_the_rows_that_run() -> None:
    decode = view(role=Role.DECODE, running=4)  # 10 ms a row: five rows make 50 ms
    assert keeps_tpot(decode, 100, 0.05)
    assert not keeps_tpot(decode, 100, 0.049)
    assert not keeps_tpot(decode._replace(tightest_tpot_s=0.049), 100, 1.0)
    assert keeps_tpot(decode._replace(running=0, tightest_tpot_s=0.001), 100, 0.001), (
        "nobody is faster than who is idle"
    )


def test_a_workers_own_token_budget_counts() -> None:
    """Steps of 2048 tokens: a prompt of 1500 is one of them, and as much more may wait at the worker."""
    steps = StepTimeCoefficients(step_s=0.1, prefill_token_s=1e-3)
    small, large = view(step_time=steps), view(step_time=steps, max_batched_tokens=2048)
    assert told(small, tokens=1500).own_s == pytest.approx(3 * 0.1 + 1.5)
    assert told(large, tokens=1500).own_s == pytest.approx(0.1 + 1.5)
    assert room_tokens([large], PATIENT) == pytest.approx(2048 + QUEUE_S * tokens_per_s(large))
    assert told(view(role=Role.MIXED, running=12, max_batched_tokens=1012)).own_s == pytest.approx(0.12 + 0.1)


def test_what_fits_into_one_step_with_it_does_not_count_twice() -> None:
    assert told(view(queued_prefill_tokens=300)).ttft_s == pytest.approx(0.4)
    assert told(view(queued_prefill_tokens=900)).ttft_s == pytest.approx(0.9 + 0.388), "the rest of its step is others'"
    assert told(view(queued_prefill_tokens=3000)).ttft_s == pytest.approx(3.0 + 0.512)
