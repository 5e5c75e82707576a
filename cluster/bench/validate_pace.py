"""How fast an engine alone computes on this machine now, beside what its profile says: a host that serves others too
may be a tenth slower an hour later, and that is no error of a simulator. A few of the profile's own points are measured
before and after a run, on an engine of this process that is idle meanwhile, and the run is predicted at that pace.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Self

from ..config import EngineConfig
from ..latency.measured import MeasuredProfile, MeasuredStep, Measurement
from ..latency.profile import DecodeTerms, StepProfile
from ..models.config import ModelConfig

if TYPE_CHECKING:
    from ..engine.devices.base import Device
    from ..profiler.live import LiveSteps
    from ..profiler.points import Point

MAX_CHANGE = 0.15
"""Between the looks before and after a run, beyond which nothing can be said of what lay between them."""
ROUNDS = {"prefill": 4, "decode": 20}
"""How often a look visits each point …"""
POINTS = {"prefill": 2, "decode": 4}
"""… of these: the cheapest that the profile has, of LEAST_TOKENS and more."""
LEAST_TOKENS = 64
"""Of a prompt: shorter ones are mostly a step's fixed cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Times of now over those of the profile, by kind of step: above 1 where the machine is slower now."""

    prefill: float = 1.0
    decode: float = 1.0

    def on(self, profile: StepProfile) -> StepProfile:
        """The profile as it would have been measured now; a mixed step's halves go at their own pace."""
        return replace(
            profile,
            prefill_step_s=profile.prefill_step_s * self.prefill,
            prefill_token_s=profile.prefill_token_s * self.prefill,
            prefill_square_s=profile.prefill_square_s * self.prefill,
            decode=_slower(profile.decode, self.decode),
            large_decode=_slower(profile.large_decode, self.decode),
        )

    def change_to(self, later: Pace) -> float:
        """The larger change of the two kinds, as a share."""
        return max(abs(later.prefill / self.prefill - 1.0), abs(later.decode / self.decode - 1.0))

    @classmethod
    def between(cls, *looks: Pace) -> Pace:
        """What lay between two looks, as far as they say: their mean."""
        return cls(
            prefill=statistics.fmean(look.prefill for look in looks),
            decode=statistics.fmean(look.decode for look in looks),
        )

    def as_json(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


AS_MEASURED = Pace()


def _slower(terms: DecodeTerms, factor: float) -> DecodeTerms:
    return DecodeTerms(
        step_s=terms.step_s * factor, row_s=terms.row_s * factor, context_token_s=terms.context_token_s * factor
    )


def check_same(measured: Measurement, engine: EngineConfig, model: ModelConfig) -> None:
    """ValueError naming what a profile was measured of, where that is not this engine: its pace would hide it."""
    pairs = {
        "model": (measured.model_config, model),
        "dtype": (measured.dtype, engine.dtype),
        "quantization": (measured.quantization, engine.quantization),
        "kv_cache_dtype": ("auto", engine.kv_cache_dtype),
        "threads": (measured.threads, engine.threads),
    }
    for name, (was, asked) in pairs.items():
        if was != asked:
            shown = (measured.model, engine.model) if name == "model" else (was, asked)
            raise ValueError(f"profile: it is of {name} {shown[0]}; allowed: one of {name} {shown[1]}")


def watched_steps(steps: Mapping[str, MeasuredStep]) -> tuple[MeasuredStep, ...]:
    """The points that a look visits: cheap ones of both kinds. ValueError where the profile has none of a kind."""
    found: list[MeasuredStep] = []
    for kind in ("prefill", "decode"):
        own = [step for step in steps.values() if step.kind == kind]
        long = [step for step in own if step.decode_rows or step.prefill_tokens >= LEAST_TOKENS] or own
        if not long:
            raise ValueError(f"profile: it has no {kind} steps; allowed: a file of `tandem profile`")
        found += sorted(long, key=lambda step: (step.median_s, step.sizes))[: POINTS[kind]]
    return tuple(found)


def pace_of(steps: Sequence[MeasuredStep], times_s: Sequence[Sequence[float]]) -> Pace:
    """Of the times that these steps took now, several each: their sum over that of the profile's. A mean and no median,
    because a request's TPOT is one, too: what interrupts one step in twenty is part of the pace.
    """
    taken, foretold = {"prefill": 0.0, "decode": 0.0}, {"prefill": 0.0, "decode": 0.0}
    for step, own_s in zip(steps, times_s, strict=True):
        taken[step.kind] += sum(own_s)
        foretold[step.kind] += len(own_s) * step.median_s
    return Pace(**{kind: taken[kind] / foretold[kind] for kind in taken})


class IdleEngine:
    """An engine of this process that computes only when it is looked at; a context manager. It lives in a thread of its
    own, because computing threads may be pinned.
    """

    def __init__(self, config: EngineConfig, profile: MeasuredProfile, build: Callable[[EngineConfig], Device]) -> None:
        """`config`: of the workers; `build`: makes a device of it. ValueError where the profile has too few steps."""
        self._config = config
        self._model = profile.measured.model_config
        self._build = build
        self._steps = watched_steps(profile.measured.steps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pace")
        self._device: Device | None = None
        self._run: LiveSteps | None = None
        self._points: tuple[Point, ...] = ()

    def __enter__(self) -> Self:
        try:
            self._thread.submit(self._load).result()
        except BaseException:
            self._thread.shutdown()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._device is not None:
            self._thread.submit(self._device.close).result()
        self._thread.shutdown()

    async def look(self) -> Pace:
        """The pace of now; takes some seconds."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._look)

    def _load(self) -> None:
        from ..engine.devices.kv_memory import kv_layout
        from ..profiler.live import LiveSteps
        from ..profiler.points import Places, point_of

        self._points = tuple(point_of(step.sizes) for step in self._steps)
        block_size = self._config.block_size
        blocks = Places(self._points, block_size).blocks
        layout = kv_layout(self._model, self._config.kv_dtype, block_size)
        self._device = self._build(replace(self._config, kv_cache_bytes=blocks * layout.block_bytes))
        places = Places(self._points, block_size, vocab_size=self._device.vocab_size)
        self._run = LiveSteps(self._device, places)
        self._look()  # pages and caches that no other look meets

    def _look(self) -> Pace:
        assert self._run is not None, "entered first"
        times_s: list[list[float]] = [[] for _ in self._points]
        most = max(ROUNDS.values())
        for turn in range(most):
            for step, taken_s, point in zip(self._steps, times_s, self._points, strict=True):
                if turn % (most // ROUNDS[step.kind]) == 0:
                    taken_s.append(self._run(point))
        return pace_of(self._steps, times_s)
