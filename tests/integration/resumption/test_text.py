"""What is said across a kill is what would have been said: penalties, seeds, stops, min_tokens, n, logprobs, usage.

On the CPU device in fp32, where all of these act; the same requests without a kill are the oracle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tandem.cluster.types import Role
from tandem.router.client import Answer

PROMPT = list(range(1, 40))
CPU = {"device": "cpu", "dtype": "float32", "threads": 1, "max_model_len": 512}
SAMPLED = {"temperature": 0.8, "seed": 5, "presence_penalty": 1.0, "frequency_penalty": 0.3, "repetition_penalty": 1.3}
STOP_TOKENS = range(30, 90)
"""Output tokens that the stop string is made of; the worker dies in the midst of it."""
KILL_AT = 45
REQUESTS: dict[str, dict[str, Any]] = {
    "stopped": SAMPLED,
    "greedy": {"temperature": 0},
    "seeded and penalized": {**SAMPLED, "seed": 6},
    "min_tokens": {**SAMPLED, "ignore_eos": False, "min_tokens": 120},
    "several choices": {**SAMPLED, "n": 3, "max_tokens": 150},
    "a bias": {"temperature": 0, "logit_bias": {7: 3.0}, "frequency_penalty": 0.5},
}


class Asked:
    """A request of any number of choices, in a thread of its own."""

    def __init__(self, cluster: Any, request: dict[str, Any]) -> None:
        arguments = {"token_ids": PROMPT, "max_tokens": 300, "ignore_eos": True, "top_logprobs": 2, **request}
        self.answers: dict[int, Answer] = {}
        self.finishes: list[int] = []
        self.usage: Any = None
        self._generation = cluster.client.generate(**arguments)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for delta in self._generation:
            answer = self.answers.setdefault(delta.choice, Answer(delta.choice))
            answer.add(delta)
            self.usage = delta.usage or self.usage
            if delta.finish_reason:
                self.finishes.append(delta.choice)

    @property
    def tokens(self) -> int:
        """Of the first choice."""
        return len(self.answers[0].token_ids) if 0 in self.answers else 0

    def join(self) -> Asked:
        self._thread.join(120)
        assert not self._thread.is_alive()
        assert sorted(self.finishes) == sorted(self.answers), "each choice ends once"
        return self


def same(killed: Answer, whole: Answer) -> None:
    """Token by token, text by text, logprob by logprob (within what another batch's rounding may change)."""
    assert killed.token_ids == whole.token_ids
    assert killed.text == whole.text
    assert (killed.finish_reason, killed.stop_reason) == (whole.finish_reason, whole.stop_reason)
    assert len(killed.logprobs) == len(whole.logprobs) == len(whole.token_ids)
    for mine, theirs in zip(killed.logprobs, whole.logprobs, strict=True):
        assert (mine.token_id, mine.token) == (theirs.token_id, theirs.token)
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [entry[0] for entry in mine.top] == [entry[0] for entry in theirs.top]


def test_a_kill_changes_nothing_that_is_said(start: Callable[..., Any], wait: Callable[..., None]) -> None:
    cluster = start(max_attempts=5)
    cluster.add(Role.PREFILL, "p0", **CPU)
    decode = cluster.add(Role.DECODE, "d0", **CPU)
    cluster.wait_ready()
    whole = {name: Asked(cluster, request).join() for name, request in REQUESTS.items()}
    text = whole["stopped"].answers[0].text
    pieces = [entry.token.decode("utf-8", "replace") for entry in whole["stopped"].answers[0].logprobs]
    stop = "".join(pieces[i] for i in STOP_TOKENS)
    assert text.count(stop) == 1
    requests = REQUESTS | {"stopped": {**SAMPLED, "stop": [stop]}}
    whole["stopped"] = Asked(cluster, requests["stopped"]).join()
    assert whole["stopped"].answers[0].stop_reason == stop
    assert whole["stopped"].answers[0].text == text[: text.index(stop)]
    assert cluster.metric("request_retries_total") == 0

    asked = {name: Asked(cluster, request) for name, request in requests.items()}
    wait(lambda: asked["stopped"].tokens >= KILL_AT, "the stop string to have begun")
    decode.kill()
    assert not any(one.finishes for one in asked.values()), "all of them were under way"
    assert asked["stopped"].tokens < STOP_TOKENS.stop
    decode.start()
    choices = 0
    for name, one in asked.items():
        one.join()
        assert sorted(one.answers) == sorted(whole[name].answers)
        for choice, answer in one.answers.items():
            same(answer, whole[name].answers[choice])
            choices += 1
        assert one.usage.prompt_tokens == len(PROMPT)
        assert one.usage.completion_tokens == sum(len(answer.token_ids) for answer in one.answers.values())
    assert choices == 8
    assert cluster.metric("request_retries_total", "worker_lost") == choices
    cluster.wait_clean()
