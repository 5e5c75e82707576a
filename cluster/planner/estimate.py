"""A quick estimate of how workers of one kind keep their promises: the same step costs and arrivals as the simulation,
without its router, handoffs, blocks and policies. It says what to simulate first and at which rate; no result rests on
it alone.

A worker takes steps: rows that decode get a token each, prompts in order of arrival fill the rest of the token budget.
As every row grows by one token a step, a row is no more than the step at which it ends; nothing is done per row and
step, and steps between two events that change nothing are taken together.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...router.placement import ANSWER_TOKENS
from ..latency.interface import StepCosts
from ..types import Role

_HEADROOM_TOKENS = 16
"""A block for each row, as the scheduler keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Workers, all alike."""

    role: Role
    costs: StepCosts
    budget_tokens: int
    max_running: int
    kv_tokens: int
    """Of context that one worker holds."""
    growths_s: dict[int, float] = field(default_factory=dict, compare=False)
    """By rows: how much longer than the one before a step of the same rows is, as far as it is known."""


class QuickWorker:
    """One worker. `advance` it to a request's arrival before it is added."""

    def __init__(self, kind: Kind, first_s: list[float], last_s: list[float]) -> None:
        """Writes by request, when its first and its last token came, into the two lists."""
        self._kind = kind
        self._decodes = kind.role is Role.DECODE
        self._costs = kind.costs
        self._stages = kind.costs.pipeline_stages
        self._first_s, self._last_s = first_s, last_s
        self._queue: deque[list[int]] = deque()  # [request, prompt, done, answer]
        self._rows: list[tuple[float, int, int]] = []  # (step at which it ends, request, context then)
        self._steps = 0.0
        self._context = 0.0
        self._now_s = self._rows_back_s = self._done_s = 0.0
        self._ends: deque[float] = deque(maxlen=self._stages)  # of the steps in the pipeline
        budget = kind.budget_tokens
        self._token_s = self._costs.step_time_s(budget, budget**2, 0, 0) / budget
        self.queued_tokens = 0
        self._doing_tokens = 0

    def load_s(self, now_s: float, prompt: int) -> float:
        """Less is better for who comes next, as the router ranks workers: by what is queued, whatever of it is under
        way, and by how long tokens take then.
        """
        queued = self.queued_tokens + (self._doing_tokens if self._done_s > now_s else 0)
        if self._kind.role is Role.PREFILL:
            return queued * self._token_s
        rows = len(self._rows) + len(self._queue) + 1
        token_s = self._costs.step_time_s(0, 0, rows, int(self._context) + prompt)
        return token_s if self._kind.role is Role.DECODE else queued * self._token_s + ANSWER_TOKENS * token_s

    def add(self, now_s: float, request: int, prompt: int, answer: int) -> None:
        """A request comes. On a decode worker its prompt is there already."""
        if not self._queue and not self._rows:
            self._now_s = max(self._now_s, now_s)
        self._queue.append([request, prompt, 0, answer])
        self.queued_tokens += prompt

    def advance(self, until_s: float) -> None:
        """Takes the steps that begin before `until_s`."""
        queue, rows = self._queue, self._rows
        while self._now_s < until_s and (queue or rows):
            chunks = None
            if queue:
                if self._decodes:
                    self._join()
                else:
                    chunks = self._prompts()
            if chunks:
                self._mixed_step(chunks)
            elif self._now_s < self._rows_back_s:  # nothing but rows that are still in the pipeline
                self._now_s = min(self._rows_back_s, until_s)
            elif self._rows:
                self._decode(until_s)
            else:
                return

    def _room(self, prompt: int) -> bool:
        """A place in the batch, and KV for the prompt beside what the rows hold and will hold soon."""
        rows = len(self._rows)
        held = self._context + rows * _HEADROOM_TOKENS
        return rows < self._kind.max_running and (not rows or held + prompt <= self._kind.kv_tokens)

    def _join(self) -> None:
        """Prompts whose KV has come become rows."""
        while self._queue and self._room(self._queue[0][1]):
            request, prompt, _, answer = self._queue.popleft()
            self.queued_tokens -= prompt
            self._row(request, prompt, answer)

    def _row(self, request: int, prompt: int, answer: int) -> None:
        """It has its first token and wants `answer - 1` more."""
        heapq.heappush(self._rows, (self._steps + answer - 1, request, prompt + answer))
        self._context += prompt + 1

    def _prompts(self) -> list[tuple[int, int, int]]:
        """(request's place in the queue, from, to) of what the next step computes of prompts."""
        left = self._kind.budget_tokens - self._ready_rows()
        chunks = []
        for place, (_, prompt, done, _) in enumerate(self._queue):
            if left <= 0 or (not done and not self._room(prompt)):
                break
            size = min(left, prompt - done)
            chunks.append((place, done, done + size))
            left -= size
            if self._kind.role is Role.MIXED and len(self._rows) + len(chunks) >= self._kind.max_running:
                break
        return chunks

    def _ready_rows(self) -> int:
        """Rows that the next step may compute: while one has them, those behind it in a pipeline have none."""
        return len(self._rows) if self._now_s >= self._rows_back_s else 0

    def _mixed_step(self, chunks: Sequence[tuple[int, int, int]]) -> None:
        """As `SimEngine` times it: as many steps as stages are under way, and none overtakes another."""
        rows, tokens, squares = self._ready_rows(), 0, 0
        for _, start, end in chunks:
            tokens += end - start
            squares += end * end - start * start
        sizes = (tokens, squares, rows, int(self._context) if rows else 0)
        whole_s = self._costs.step_time_s(*sizes)
        stage_s = whole_s if self._stages == 1 else self._costs.stage_time_s(*sizes)
        done_s = self._done_s = max(self._done_s + whole_s / self._stages, self._now_s + whole_s)
        if rows:
            self._rows_back_s = done_s
            self._grow(1.0, done_s)
        self._ends.append(done_s)
        self._now_s += stage_s
        if len(self._ends) == self._stages:
            self._now_s = max(self._now_s, self._ends[0])
        self._doing_tokens = tokens
        for _, start, end in chunks:
            self._queue[0][2] = end
            self.queued_tokens -= end - start
            request, prompt, done, answer = self._queue[0]
            if done < prompt:
                break
            self._queue.popleft()
            self._first_s[request] = self._last_s[request] = done_s
            if self._kind.role is Role.MIXED and answer > 1:
                self._row(request, prompt, answer)

    def _decode(self, until_s: float) -> None:
        """Steps of the same rows, up to the next that ends or the first that begins after `until_s`."""
        stages, rows = self._stages, len(self._rows)
        each, context = -(-rows // stages), int(self._context / stages)
        first_s = self._costs.step_time_s(0, 0, each, context + each)
        steps = max(1, math.ceil(self._rows[0][0] - self._steps))
        wanted_s = until_s - self._now_s
        if steps > 1 and steps * first_s > wanted_s:
            steps = max(1, min(steps, math.ceil(wanted_s / first_s)))
        if steps > 1:
            growth_s = self._kind.growths_s.get(each)
            if growth_s is None:
                growth_s = self._costs.step_time_s(0, 0, each, context + 2 * each) - first_s
                self._kind.growths_s[each] = growth_s
            self._now_s += 0.5 * growth_s * (steps - 1) * steps
        self._now_s += steps * first_s
        self._done_s = self._now_s
        self._grow(float(steps), self._now_s)

    def _grow(self, steps: float, now_s: float) -> None:
        self._steps += steps
        self._context += steps * len(self._rows)
        while self._rows and self._rows[0][0] <= self._steps + 1e-9:
            _, request, context = heapq.heappop(self._rows)
            self._last_s[request] = now_s
            self._context = max(0.0, self._context - context)


def serve(
    kind: Kind, count: int, arrivals_s: Sequence[float], prompts: Sequence[int], answers: Sequence[int]
) -> tuple[list[float], list[float]]:
    """(first token, last token) of each request, seconds, by `count` such workers; arrivals in order. Of a decode
    worker the first token is where the request came.
    """
    first_s, last_s = list(arrivals_s), list(arrivals_s)
    workers = [QuickWorker(kind, first_s, last_s) for _ in range(count)]
    for request, (at_s, prompt, answer) in enumerate(zip(arrivals_s, prompts, answers, strict=True)):
        for worker in workers:
            worker.advance(at_s)
        chosen = workers[0] if count == 1 else min(workers, key=lambda one: one.load_s(at_s, prompt))
        if kind.role is not Role.DECODE or answer > 1:
            chosen.add(at_s, request, prompt, answer)
    for worker in workers:
        worker.advance(math.inf)
    return first_s, last_s
