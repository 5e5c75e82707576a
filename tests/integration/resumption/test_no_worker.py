"""No worker of a role is left: what was under way waits for one up to its deadline, what comes waits at the door; both
then hear 503, and why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest
from tandem.cluster.types import Role

PROMPT = list(range(1, 120))
Start = Callable[..., Any]
Wait = Callable[..., None]


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_request_under_way_waits_until_its_deadline_and_says_who_did_not_come(
    start: Start, ask: Start, wait: Wait, role: Role
) -> None:
    cluster = start(unready_wait_s=0.2)
    cluster.add(Role.PREFILL, "prefill", paced_prefill_token_s=0.005 if role is Role.PREFILL else 0.00001)
    cluster.add(Role.DECODE, "decode", paced_step_s=0.05)
    cluster.wait_ready()
    asked = ask(cluster, PROMPT, 100, timeout_s=4.0)
    if role is Role.PREFILL:
        wait(lambda: cluster.workers["prefill"].status().streams > 0, "the prompt to be computed")
    else:
        wait(lambda: asked.tokens >= 3, "the decode worker to stream")
    cluster.workers.pop(role.value).kill()
    asked.join()
    assert asked.error is not None
    assert asked.error.code is grpc.StatusCode.UNAVAILABLE
    assert f"no {role.value} worker came back within the request's " in asked.error.message
    assert asked.error.retry_after_s is not None
    assert cluster.metric("request_failures_total", "unavailable") == 1
    cluster.wait_clean()


def test_over_http_that_is_503_with_retry_after(start: Start, wait: Wait) -> None:
    cluster = start(unready_wait_s=0.2)
    prefill = cluster.add(Role.PREFILL, "p0", paced_prefill_token_s=0.005)
    cluster.add(Role.DECODE, "d0")
    cluster.wait_ready()
    answers: list[httpx.Response] = []
    url = f"http://{cluster.router['http']}/v1/completions"
    body = {"model": "dummy:tiny-llama", "prompt": PROMPT, "max_tokens": 4}

    def post() -> None:
        headers = {"x-request-timeout-s": "3"}
        answers.append(httpx.post(url, json=body, headers=headers, timeout=30, trust_env=False))

    thread = threading.Thread(target=post)
    thread.start()
    wait(lambda: prefill.status().streams > 0, "the prompt to be computed")
    prefill.kill()
    thread.join(30)
    post()  # nobody is there: it waits at the door, for less long
    for answer, message in zip(answers, ("came back within the request's 3 s", "is ready"), strict=True):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert f"no prefill worker {message}" in answer.json()["error"]["message"]


def test_a_worker_that_comes_back_in_time_ends_the_wait(start: Start, ask: Start, wait: Wait) -> None:
    """Longer than a new request would wait at the door."""
    cluster = start(unready_wait_s=0.1)
    cluster.add(Role.PREFILL, "p0")
    decode = cluster.add(Role.DECODE, "d0", paced_step_s=0.02)
    cluster.wait_ready()
    asked = ask(cluster, PROMPT, 30)
    wait(lambda: asked.tokens >= 3, "the decode worker to stream")
    decode.kill()
    wait(lambda: "d0" not in cluster.ready(), "the router to know")
    turned_away = ask(cluster, [1, *PROMPT], 2)
    turned_away.join()
    assert turned_away.error is not None
    assert turned_away.error.code is grpc.StatusCode.UNAVAILABLE
    decode.start()
    asked.check()
    cluster.wait_clean()
