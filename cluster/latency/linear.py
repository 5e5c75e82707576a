"""How long a step takes: a linear model of it, predictions from it, and a fit of it to the steps an engine runs.

    step time = step_s + prefill_token_s · prefill tokens
                       + decode_row_s · decode rows + context_token_s · context tokens

`context tokens` are those whose KV the step's decode rows read. Prefill's own attention has no term of its own: it is
small beside the matrix products until prompts are long, and a fit spreads it over prefill_token_s. Pure: workers report
coefficients, routers predict from them.
"""

from __future__ import annotations

import itertools
import math
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..types import Role, StepTimeCoefficients

_MIN_STEP_S = 1e-6
_REFIT_STEPS = 64
_ROUNDS = 4
_HUBER = 1.345
_PULL = 0.01
"""Weight of the prior against one step: the square of the relative noise of steps, about 10 %."""

DEFAULT_TOKEN_BUDGET = 512
DEFAULT_PRIOR = StepTimeCoefficients(step_s=0.01, prefill_token_s=5e-4, decode_row_s=1e-3, context_token_s=1e-7)
"""What a worker is taken for before it has run a step: a small model on a few CPU cores."""

_STEP = struct.Struct("5d")
"""A step in the window: written in place, in a quarter of the time that an assignment to the array takes."""
_STEP_BYTES = _STEP.size
_RIDGE = _PULL * np.eye(4)
_TERMS = ("step_s", "prefill_token_s", "decode_row_s", "context_token_s")
_LENGTHS, _ROWS, _CONTEXTS = (16, 32, 64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32, 64), (128, 512, 1024)
_PROMPTS = [(length, length**2, 0, 0) for length in _LENGTHS]
_DECODES = [(0, 0, rows, rows * context) for rows in _ROWS for context in _CONTEXTS]
PRIOR_STEPS = 64
"""What a prior that was worked out from a latency model counts for: as if so many steps had been seen."""
_ROBUST_STEPS = 2 * len(_TERMS)
"""Below so many steps none is an outlier: of three, a decode step among prompts would be taken for one."""


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Predicts step time, TTFT and TPOT, seconds, from a worker's coefficients. ValueError if one is negative."""

    coefficients: StepTimeCoefficients

    def __post_init__(self) -> None:
        for name in _TERMS:
            value = getattr(self.coefficients, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name}: {value} is not a finite number of seconds >= 0")

    def step_time_s(self, prefill_tokens: int, decode_rows: int = 0, context_tokens: int = 0) -> float:
        """Seconds that one step takes."""
        terms = self.coefficients
        return (
            terms.step_s
            + terms.prefill_token_s * prefill_tokens
            + terms.decode_row_s * decode_rows
            + terms.context_token_s * context_tokens
        )

    def predict_ttft_s(self, queued_tokens: int, prompt_tokens: int, token_budget: int = DEFAULT_TOKEN_BUDGET) -> float:
        """Seconds until a prompt that arrives now has its first token, on a prefill worker.

        `queued_tokens` are computed before it, first come first served, in steps of `token_budget` tokens;
        `prompt_tokens` are its own uncached ones (at least one is always computed).
        """
        if token_budget < 1:
            raise ValueError(f"token_budget: {token_budget} is not >= 1")
        return self.predict_prefill_s(max(queued_tokens, 0) + max(prompt_tokens, 1), token_budget)

    def predict_prefill_s(
        self, tokens: float, room_tokens: int, decode_rows: int = 0, context_tokens: int = 0
    ) -> float:
        """Seconds that so many prompt tokens take in steps with room for `room_tokens` of them beside decode rows."""
        terms, steps = self.coefficients, -(-tokens // room_tokens)
        beside_s = terms.step_s + terms.decode_row_s * decode_rows + terms.context_token_s * context_tokens
        return steps * beside_s + tokens * terms.prefill_token_s

    def predict_tpot_s(self, running: int, context_tokens: int) -> float:
        """Seconds per output token of a decode batch of `running` sequences that hold `context_tokens` of KV in all."""
        terms, rows = self.coefficients, max(running, 1)
        return terms.step_s + terms.decode_row_s * rows + terms.context_token_s * context_tokens


@lru_cache(maxsize=4096)
def step_time_model(coefficients: StepTimeCoefficients) -> StepTimeModel:
    """The model of these coefficients; whoever ranks workers asks for the same ones again and again."""
    return StepTimeModel(coefficients)


class OnlineStepTimeFit:
    """Fits the model to the steps that an engine runs, while it runs them.

    It keeps the last `window` steps with prefill and, apart from them, the last `window` without, so that a long
    stretch of one kind does not wash out what is known of the other. The fit is least squares on relative errors, with
    Huber weights (a step that the machine interrupted counts little), coefficients >= 0, and a weak pull towards the
    prior, scaled to this machine's speed, in directions that the steps so far say nothing about. Memory is bounded;
    `observe` is O(1), and `coefficients` refits only after enough new steps. Both may be called from any thread.
    """

    def __init__(self, prior: StepTimeCoefficients = DEFAULT_PRIOR, *, prior_steps: int = 0, window: int = 256) -> None:
        """`prior_steps`: the prior counts for as many steps, half of them with a prompt, which real ones displace from
        the window in time; 0: it is a guess. ValueError where they do not fit into the window.
        """
        if window < 1:
            raise ValueError(f"window: {window} is not >= 1")
        if not 0 <= prior_steps <= 2 * window:
            raise ValueError(f"prior_steps: {prior_steps} is not in 0…{2 * window}")
        model = StepTimeModel(prior)
        self._prior = np.array([getattr(prior, name) for name in _TERMS])
        self._steps = np.zeros((2, window, 5))  # [with prefill?, step, (1, prefill, rows, context, duration)]
        self._bytes = memoryview(self._steps.data).cast("B")
        self._counts = [0, 0]
        self._window = window
        self._refit_at = 1
        self._fitted = prior
        self._lock = threading.Lock()
        for kind, shapes in enumerate((_DECODES, _PROMPTS)):
            for length, _, rows, context in itertools.islice(itertools.cycle(shapes), (prior_steps + 1 - kind) // 2):
                self.observe(length, rows, context, model.step_time_s(length, rows, context))
        self._prior_steps = prior_steps

    def observe(self, prefill_tokens: int, decode_rows: int, context_tokens: int, duration_s: float) -> None:
        """One step that the device ran. Steps of no tokens are passed over; ValueError if a number is negative."""
        if prefill_tokens < 0 or decode_rows < 0 or context_tokens < 0 or not 0.0 <= duration_s < math.inf:
            numbers = (prefill_tokens, decode_rows, context_tokens, duration_s)
            raise ValueError(f"prefill_tokens, decode_rows, context_tokens, duration_s: {numbers} are not all >= 0")
        if prefill_tokens + decode_rows == 0:
            return
        kind = 1 if prefill_tokens else 0
        step_s = duration_s if duration_s > _MIN_STEP_S else _MIN_STEP_S
        with self._lock:
            place = (kind * self._window + self._counts[kind] % self._window) * _STEP_BYTES
            _STEP.pack_into(self._bytes, place, 1.0, prefill_tokens, decode_rows, context_tokens, step_s)
            self._counts[kind] += 1

    @property
    def steps(self) -> int:
        """How many steps the coefficients stand for; 0: they are a guess."""
        return self._counts[0] + self._counts[1]

    def coefficients(self) -> StepTimeCoefficients:
        """The fit to the steps so far: the prior before the first, never negative. Cheap to call after every step."""
        with self._lock:
            seen = self._counts[0] + self._counts[1] - self._prior_steps
            if seen < self._refit_at:
                return self._fitted
            self._refit_at = seen + min(seen, _REFIT_STEPS)
            kept = [steps[: min(count, len(steps))] for steps, count in zip(self._steps, self._counts, strict=True)]
            data = np.concatenate(kept)
        theta = _fit(data[:, :4], data[:, 4], self._prior)
        self._fitted = StepTimeCoefficients(**dict(zip(_TERMS, theta.tolist(), strict=True)))
        return self._fitted


def linear_terms(step_time_s: Callable[[int, int, int, int], float], *, role: Role) -> StepTimeCoefficients:
    """The linear model that comes closest to other costs, in the steps that a worker of that role runs: its prior where
    those are known before it has run one. `step_time_s`: as `StepCosts.step_time_s`.
    """
    both = [(length, length**2, rows, rows * _CONTEXTS[1]) for length in _LENGTHS[::3] for rows in _ROWS[::3]]
    everything = [*_PROMPTS, *_DECODES, *both]
    own = {Role.PREFILL: _PROMPTS, Role.DECODE: _DECODES, Role.MIXED: everything}[role]
    theta = np.array([getattr(DEFAULT_PRIOR, name) for name in _TERMS])
    for shapes in (everything, own):  # what a role does not run keeps what all steps say
        x = np.array([(1.0, length, rows, context) for length, _, rows, context in shapes])
        y = np.array([max(step_time_s(*shape), _MIN_STEP_S) for shape in shapes])
        theta = _fit(x, y, theta)
    return StepTimeCoefficients(**dict(zip(_TERMS, theta.tolist(), strict=True)))


def _fit(x: NDArray[np.float64], y: NDArray[np.float64], prior: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients [4] >= 0 for steps x [N, 4] that took y [N] seconds; see `OnlineStepTimeFit`."""
    expected = x @ prior
    if expected.min() > 0.0:
        prior = prior * _median(y / expected)
    theta, reference, weight = prior, y, np.ones_like(y)
    for _ in range(_ROUNDS):
        a = x / reference[:, None]
        target = y / reference
        share = np.sqrt(np.add.reduce(a * a, axis=0) / len(a))  # how much of a step each second of a coefficient is
        share[share == 0.0] = 1.0
        a /= share
        weighted = (a * weight[:, None]).T
        theta = _nonnegative(weighted @ a + _RIDGE, weighted @ target + _PULL * prior * share) / share
        reference = np.maximum(x @ theta, _MIN_STEP_S)
        if len(y) < _ROBUST_STEPS:
            continue
        error = np.abs(y / reference - 1.0)
        scale = max(1.4826 * _median(error), 1e-3)
        weight = np.minimum(1.0, _HUBER * scale / np.maximum(error, 1e-12))
    return theta


def _nonnegative(gram: NDArray[np.float64], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimizes ½ φᵀ·gram·φ − momentᵀ·φ over φ >= 0, exactly. `gram` [4, 4]: positive definite.

    Tries the support that is left when what comes out below 0 is dropped, until nothing does: nearly always that is it,
    and the gradient tells (Lawson and Hanson 1974, ch. 23). Else tries all supports.
    """
    whole = np.linalg.solve(gram, moment).astype(np.float64, copy=False)
    if whole.min() >= 0.0:
        return whole
    chosen = [term for term, value in enumerate(whole.tolist()) if value >= 0.0]
    while chosen:
        part = np.linalg.solve(gram[np.ix_(chosen, chosen)], moment[chosen])
        if part.min() >= 0.0:
            theta = np.zeros(4)
            theta[chosen] = part
            gradient = gram @ theta - moment
            if all(gradient[term] >= 0.0 for term in range(4) if term not in chosen):
                return theta
            break
        chosen = [term for term, value in zip(chosen, part.tolist(), strict=True) if value >= 0.0]
    return _of_all_supports(gram, moment)


def _of_all_supports(gram: NDArray[np.float64], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """As `_nonnegative`."""
    best, best_cost = np.zeros(4), 0.0
    for size in (3, 2, 1):
        for support in itertools.combinations(range(4), size):
            chosen = list(support)
            part = np.linalg.solve(gram[np.ix_(chosen, chosen)], moment[chosen])
            cost = -0.5 * float(moment[chosen] @ part)
            if part.min() >= 0.0 and cost < best_cost:
                best, best_cost = np.zeros(4), cost
                best[chosen] = part
    return best


def _median(values: NDArray[np.float64]) -> float:
    """`np.median` of values of one dimension that are numbers, in a third of the time."""
    middle = len(values) // 2
    if len(values) % 2:
        return float(np.partition(values, middle)[middle])
    below, above = np.partition(values, (middle - 1, middle))[middle - 1 : middle + 1].tolist()
    return float(0.5 * (below + above))
