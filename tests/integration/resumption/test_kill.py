"""kill -9 of either half of a request at every moment of its life, on real processes: clients notice time alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.types import Role

PROMPT = list(range(1, 120))
SLOW_PREFILL = {"paced_prefill_token_s": 0.005, "max_batched_tokens": 32, "max_running": 16}
"""0.6 s for PROMPT, in four chunks."""
SLOW_DECODE = {"paced_step_s": 0.4}
Wait = Callable[..., None]
Start = Callable[..., Any]


# --- no second prefill ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["queued", "computing", "held"])
def test_a_decode_worker_that_dies_before_its_first_step_costs_no_second_prefill(
    start: Start, ask: Start, wait: Wait, moment: str
) -> None:
    """Whatever the prefill is doing meanwhile, the next decode worker takes what comes of it."""
    cluster = start()
    prefill = cluster.add(Role.PREFILL, "p0", **SLOW_PREFILL)
    first = cluster.add(Role.DECODE, "d0", **SLOW_DECODE)
    cluster.add(Role.DECODE, "d1", **SLOW_DECODE)
    cluster.wait_ready()
    before = ask(cluster, [9] * 64, 1) if moment == "queued" else None
    asked = ask(cluster, PROMPT, 4)
    if moment == "held":
        wait(lambda: asked.tokens == 1, "the first token")
    else:
        wait(lambda: first.status().streams == 1, "the decode half to be here")
        if moment == "computing":
            wait(lambda: 0 < prefill.status().computed_tokens_total < len(PROMPT), "prefill to compute")
    first.kill()
    asked.check()
    assert asked.answer.timings is not None
    assert (asked.answer.timings.prefill_worker, asked.answer.timings.decode_worker) == ("p0", "d1")
    if before is not None:
        before.check()
    computed = prefill.status().computed_tokens_total
    assert computed == len(PROMPT) + (64 if before is not None else 0), "the prompt was computed once"
    assert cluster.metric("request_retries_total", "worker_lost") == 1
    assert cluster.metric("prefills_kept_total") == 1
    del cluster.workers["d0"]
    cluster.wait_clean()


def test_the_only_decode_worker_that_dies_before_its_first_step_takes_the_held_kv_in_its_next_life(
    start: Start, ask: Start, wait: Wait
) -> None:
    cluster = start()
    prefill = cluster.add(Role.PREFILL, "p0", **SLOW_PREFILL)
    decode = cluster.add(Role.DECODE, "d0", **SLOW_DECODE)
    cluster.wait_ready()
    asked = ask(cluster, PROMPT, 4)
    wait(lambda: decode.status().streams == 1, "the decode half to be here")
    decode.kill()
    wait(lambda: asked.tokens == 1, "the first token, though no decode worker is there")
    decode.start()
    asked.check()
    assert prefill.status().computed_tokens_total == len(PROMPT)
    assert cluster.metric("prefills_kept_total") == 1
    cluster.wait_clean()


def test_kv_whose_lease_ran_out_is_computed_again(start: Start, ask: Start, wait: Wait) -> None:
    cluster = start(lease_s=0.5)
    prefill = cluster.add(Role.PREFILL, "p0")
    decode = cluster.add(Role.DECODE, "d0", **SLOW_DECODE)
    cluster.wait_ready()
    asked = ask(cluster, PROMPT, 4)
    wait(lambda: asked.tokens == 1, "the first token")
    decode.kill()
    wait(lambda: not prefill.leftovers(), "the lease to run out")
    decode.start()
    asked.check()
    assert cluster.metric("request_retries_total", "expired") == 1
    cluster.wait_clean()


def test_a_prefill_worker_that_dies_before_its_kv_has_moved_is_replaced_behind_the_first_token(
    start: Start, ask: Start, wait: Wait
) -> None:
    """The decode worker is full, so that the KV waits in the prefill worker: it goes with it."""
    cluster = start()
    first = cluster.add(Role.PREFILL, "p0")
    cluster.add(Role.DECODE, "d0", kv_cache_bytes=2**17, paced_step_s=0.02, max_running=1)
    cluster.wait_ready()
    room = cluster.workers["d0"].status().max_model_len
    filler = ask(cluster, [7] * (room - 60), 50)
    wait(lambda: filler.tokens >= 2, "the decode worker to be full")
    asked = ask(cluster, PROMPT, 4)
    wait(lambda: asked.tokens == 1, "the first token")
    assert first.status().held == 1
    assert not filler.finishes
    first.kill()
    cluster.add(Role.PREFILL, "p1")
    asked.check()
    filler.check()
    assert cluster.metric("request_retries_total") >= 1
    assert cluster.metric("prefills_kept_total") == 0
    del cluster.workers["p0"]
    cluster.wait_clean()


def test_a_prefill_worker_that_dies_after_its_kv_has_moved_is_not_missed(start: Start, ask: Start, wait: Wait) -> None:
    cluster = start()
    prefill = cluster.add(Role.PREFILL, "p0")
    cluster.add(Role.DECODE, "d0", paced_step_s=0.05)
    cluster.wait_ready()
    asked = ask(cluster, PROMPT, 20)
    wait(lambda: asked.tokens >= 3, "the decode worker to stream")
    prefill.kill()
    asked.check()
    assert cluster.metric("request_retries_total") == 0
    del cluster.workers["p0"]
    cluster.wait_clean()


# --- any moment -------------------------------------------------------------------------------------------------------

TOKENS = 24
MOMENTS: dict[str, Callable[[Any, list[Any]], bool]] = {
    "before dispatch": lambda c, asked: True,
    "credited or queued": lambda c, asked: any(
        m.status().credited_blocks or m.status().waiting for m in c.workers.values()
    ),
    "computing": lambda c, asked: any(m.role is Role.PREFILL and m.status().running for m in c.workers.values()),
    "transfer": lambda c, asked: any(m.status().pulls for m in c.workers.values()),
    "first token": lambda c, asked: any(a.tokens >= 1 for a in asked),
    "first step": lambda c, asked: any(a.tokens >= 2 for a in asked),
    "mid stream": lambda c, asked: any(a.tokens >= TOKENS // 2 for a in asked),
    "one token short": lambda c, asked: any(a.tokens >= TOKENS - 1 for a in asked),
    "one is done": lambda c, asked: any(a.tokens == TOKENS for a in asked),
}


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_kill_at_any_moment_changes_no_answer(start: Start, ask: Start, wait: Wait, role: Role) -> None:
    """Two workers of each role. Requests come one after the other, so that each kill hits several moments at once."""
    cluster = start(max_attempts=5)
    for name in ("p0", "p1"):
        cluster.add(Role.PREFILL, name, paced_prefill_token_s=0.001, max_batched_tokens=32, max_running=16)
    for name in ("d0", "d1"):
        cluster.add(Role.DECODE, name, paced_step_s=0.01)
    cluster.wait_ready()
    pool = [member for member in cluster.workers.values() if member.role is role]
    for number, (moment, reached) in enumerate(MOMENTS.items()):
        asked: list[Any] = []
        if moment != "before dispatch":
            asked = [ask(cluster, [200 + number, i, *PROMPT], TOKENS) for i in range(4)]
            wait(lambda reached=reached, asked=asked: reached(cluster, asked), moment)
        victim = max(pool, key=lambda member: member.status().streams)
        victim.kill()
        asked += [ask(cluster, [300 + number, i, *PROMPT], TOKENS) for i in range(2)]
        for one in asked:
            one.check()
        victim.start()
        cluster.wait_ready()
    cluster.wait_clean()
    assert cluster.metric("request_retries_total") >= 1
    assert cluster.metric("request_failures_total") == 0
