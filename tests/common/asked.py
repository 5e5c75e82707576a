"""A request to a cluster of paced devices, and what a correct one answers."""

from __future__ import annotations

import threading
from typing import Any

from tandem.cluster.engine.devices.paced_language import expected_tokens
from tandem.cluster.models.reference import resolve_model
from tandem.cluster.types import SamplingParams
from tandem.router.client import Answer, TandemClient, TandemError

MODEL = "dummy:tiny-llama"
END_S = 70.0
"""Somewhat more than a request's own deadline here."""


def expected(prompt: list[int], n: int, **sampling: Any) -> list[int]:
    """The answer of up to `n` tokens, greedy unless told otherwise."""
    config = resolve_model(MODEL).config
    params = SamplingParams(max_tokens=n, **({"temperature": 0.0} | sampling))
    return list(expected_tokens(prompt, n, params, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids))


class Asked:
    """A request in a thread of its own; then `check()`, or `join()` and a look at `error`."""

    def __init__(self, client: TandemClient, prompt: list[int], max_tokens: int, **arguments: Any) -> None:
        self.answer = Answer(0)
        self.finishes = 0
        self.error: TandemError | None = None
        values: dict[str, Any] = {"temperature": 0, "timeout_s": 60.0, **arguments}
        self._with_logprobs = "top_logprobs" in values
        self._generation = client.generate(token_ids=prompt, max_tokens=max_tokens, **values)
        self._prompt, self._max_tokens = prompt, max_tokens
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def tokens(self) -> int:
        return len(self.answer.token_ids)

    def _read(self) -> None:
        try:
            for delta in self._generation:
                self.answer.add(delta)
                self.answer.usage = delta.usage or self.answer.usage
                self.finishes += bool(delta.finish_reason)
        except TandemError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(END_S)
        assert not self._thread.is_alive(), f"no end after {self.tokens} tokens"

    def check(self) -> None:
        """The whole answer is right, and is told once."""
        self.join()
        assert self.error is None, self.error
        want = expected(self._prompt, self._max_tokens)
        assert self.answer.token_ids == want
        assert self.finishes == 1
        if self._with_logprobs:
            assert [entry.token_id for entry in self.answer.logprobs] == want
        assert self.answer.usage is not None
        assert (self.answer.usage.prompt_tokens, self.answer.usage.completion_tokens) == (len(self._prompt), len(want))
