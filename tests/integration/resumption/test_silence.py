"""SIGSTOP: a worker that says nothing while its kernel answers for it. Its requests go on elsewhere, or when it goes
on.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.types import Role

PROMPT = list(range(1, 120))
LOST_AFTER_S = 1.5
Start = Callable[..., Any]
Wait = Callable[..., None]


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_stopped_worker_is_given_up_and_nothing_of_it_comes_late(
    start: Start, ask: Start, wait: Wait, role: Role
) -> None:
    """With another of its role: clients notice time. When it goes on, it drops what it ran, and serves again."""
    cluster = start(worker_lost_after_s=LOST_AFTER_S)
    for name in ("p0", "p1"):
        cluster.add(Role.PREFILL, name, paced_prefill_token_s=0.005)
    for name in ("d0", "d1"):
        cluster.add(Role.DECODE, name, paced_step_s=0.03)
    cluster.wait_ready()
    asked = [ask(cluster, [i, *PROMPT], 40) for i in range(4)]
    pool = [member for member in cluster.workers.values() if member.role is role]
    if role is Role.DECODE:
        wait(lambda: any(one.tokens >= 5 for one in asked), "some to stream")
    else:
        wait(lambda: any(member.status().streams for member in pool), "a prompt to be computed")
    victim = max(pool, key=lambda member: member.status().streams)
    assert victim.status().streams
    victim.process.send_signal(signal.SIGSTOP)
    wait(lambda: victim.name not in cluster.ready(), "its heartbeats to be late")
    asked.append(ask(cluster, [5, *PROMPT], 10))  # goes elsewhere
    for one in asked:
        one.check()
    assert cluster.metric("request_retries_total", "worker_lost") >= 1
    victim.process.send_signal(signal.SIGCONT)
    cluster.wait_ready()
    cluster.wait_clean()
    others = [member for member in pool if member is not victim]
    for member in others:
        member.kill()
        del cluster.workers[member.name]
    last = ask(cluster, [6, *PROMPT], 10)
    last.check()
    cluster.wait_clean()


def test_the_only_decode_worker_stops_before_its_first_step_and_goes_on(start: Start, ask: Start, wait: Wait) -> None:
    """The request waits for it; the KV that the prefill worker holds is taken then, not computed again."""
    cluster = start(worker_lost_after_s=LOST_AFTER_S)
    prefill = cluster.add(Role.PREFILL, "p0", paced_prefill_token_s=0.005, max_batched_tokens=32, max_running=16)
    decode = cluster.add(Role.DECODE, "d0", paced_step_s=0.02)
    cluster.wait_ready()
    asked = ask(cluster, PROMPT, 20)
    wait(lambda: decode.status().streams == 1, "the decode half to be here")
    epoch = decode.status().epoch
    decode.process.send_signal(signal.SIGSTOP)
    wait(lambda: asked.tokens == 1, "the first token")
    wait(lambda: "d0" not in cluster.ready(), "its heartbeats to be late")
    wait(lambda: prefill.status().held == 1, "the KV to be held")
    wait(lambda: cluster.metric("request_retries_total", "worker_lost") == 1, "its stream to be given up")
    decode.process.send_signal(signal.SIGCONT)
    asked.check()
    assert decode.status().epoch == epoch, "the same life"
    assert prefill.status().computed_tokens_total == len(PROMPT)
    cluster.wait_clean()


def test_a_prefill_worker_that_stops_with_kv_that_has_not_moved_is_not_waited_for(
    start: Start, ask: Start, wait: Wait
) -> None:
    """The decode worker would wait for it until the deadline: the router begins anew behind the first token."""
    cluster = start(worker_lost_after_s=LOST_AFTER_S)
    first = cluster.add(Role.PREFILL, "p0")
    decode = cluster.add(Role.DECODE, "d0", kv_cache_bytes=2**17, paced_step_s=0.05, max_running=1)
    cluster.wait_ready()
    filler = ask(cluster, [7] * (decode.status().max_model_len - 60), 50)
    wait(lambda: filler.tokens >= 2, "the decode worker to be full")
    asked = ask(cluster, PROMPT, 4)
    wait(lambda: asked.tokens == 1, "the first token")
    assert first.status().held == 1
    first.process.send_signal(signal.SIGSTOP)
    cluster.add(Role.PREFILL, "p1")
    asked.check()
    filler.check()
    assert cluster.metric("request_retries_total", "worker_lost") == 1
    first.process.send_signal(signal.SIGCONT)
    cluster.wait_ready()
    cluster.wait_clean()
