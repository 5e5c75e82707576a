"""A whole system in virtual time: several engines, each with the real scheduler and block pool, in pools of prefill and
decode or all mixed, on step profiles instead of devices. What a run with real processes should show.

A request goes to the prefill engine with the fewest queued tokens and the decode engine with the most free KV; its KV
stays with the prefill engine until the decode engine has room for it (DistServe, OSDI '24, §4.3). The handoff itself
takes `handoff_s`; nothing is lost, refused or resumed, and neither the router nor the host's work between two steps
takes any time beside what the profile has.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..clock import VirtualClock
from ..engine.block_pool import BlockPool
from ..engine.plan import RowOutput, StepOutput, StepPlan
from ..engine.policies import policy_for
from ..engine.prefix_cache import PrefixCache
from ..engine.scheduler import Scheduler
from ..engine.scheduler_events import BlocksGranted, SchedulerEvent, SequenceFailed, TokensEmitted
from ..engine.step_shape import step_shape
from ..latency.profile import StepProfile
from ..types import Handoff, Role, SampledToken, SamplingParams, SequenceSpec
from .claims_virtual import MAX_JOBS, EngineShape, Job, Served

_TOKEN = SampledToken(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Engines of one role, all alike."""

    role: Role
    count: int
    shape: EngineShape
    profile: StepProfile


@dataclass(slots=True)
class _Live:
    """A request under way."""

    job: Job
    prefill: _Engine
    decode: _Engine
    first_s: float | None = None
    granted: bool = False
    joined: bool = False


class VirtualPools:
    """See the module. `run` once."""

    def __init__(self, pools: Sequence[Pool], *, handoff_s: float = 0.0) -> None:
        """ValueError unless the pools are mixed ones, or prefill and decode."""
        self._clock = VirtualClock()
        self._handoff_s = handoff_s
        engines = {
            role: [_Engine(p, self._clock) for p in pools if p.role is role for _ in range(p.count)] for role in Role
        }
        self._prefill = engines[Role.PREFILL] + engines[Role.MIXED]
        self._decode = engines[Role.DECODE] + engines[Role.MIXED]
        if not (self._prefill and self._decode):
            raise ValueError("pools: are not allowed; allowed: mixed ones, or prefill and decode")
        self._split = not engines[Role.MIXED]
        self._live: dict[str, _Live] = {}
        self._served: list[Served] = []
        self._events: list[tuple[float, int, _Engine | str]] = []
        """(when, order, engine whose step ends or request whose KV has arrived)."""
        self._order = 0

    def run(self, jobs: Sequence[Job]) -> list[Served]:
        """Serves the jobs, which are in order of arrival; returns them in order of their end."""
        place = 0
        while place < len(jobs) or self._events:
            if not self._events or (place < len(jobs) and jobs[place].arrival_s <= self._events[0][0]):
                self._move_to(jobs[place].arrival_s)
                touched = self._admit(str(place), jobs[place])
                place += 1
            else:
                when_s, _, what = heapq.heappop(self._events)
                self._move_to(when_s)
                touched = self._arrived(what) if isinstance(what, str) else self._ended(what)
            for engine in touched:
                self._go_on(engine)
        return self._served

    def _move_to(self, when_s: float) -> None:
        self._clock.advance(max(0.0, when_s - self._clock.now_s()))

    def _at(self, when_s: float, what: _Engine | str) -> None:
        self._order += 1
        heapq.heappush(self._events, (when_s, self._order, what))

    def _admit(self, name: str, job: Job) -> tuple[_Engine, ...]:
        prefill = min(self._prefill, key=_Engine.crowding)
        decode = min(self._decode, key=_Engine.fullness) if self._split else prefill
        self._live[name] = _Live(job, prefill, decode)
        if not self._split or job.output_tokens == 1:
            prefill.add(name, job, Handoff.NONE)
            return (prefill,)
        prefill.add(name, job, Handoff.OUT)
        decode.add(name, job, Handoff.IN)
        return (prefill, decode)

    def _arrived(self, name: str) -> tuple[_Engine, ...]:
        """The KV of a request is where it decodes."""
        live = self._live[name]
        live.decode.scheduler.kv_ready(name, _TOKEN)
        live.prefill.scheduler.release(name)
        return (live.prefill, live.decode)

    def _ended(self, engine: _Engine) -> tuple[_Engine, ...]:
        engine.finish()
        self._take(engine)
        return (engine,)

    def _go_on(self, engine: _Engine) -> None:
        """Starts the engine's next step, if it is idle and there is something to do."""
        if engine.plan is None:
            ends_s = engine.start()
            self._take(engine)
            if ends_s is not None:
                self._at(ends_s, engine)

    def _take(self, engine: _Engine) -> None:
        for event in engine.scheduler.take_events():
            self._take_event(engine, event)

    def _take_event(self, engine: _Engine, event: SchedulerEvent) -> None:
        assert not isinstance(event, SequenceFailed), event
        live = self._live.get(event.seq_id)
        if live is None or not isinstance(event, BlocksGranted | TokensEmitted):
            return
        now_s = self._clock.now_s()
        if isinstance(event, BlocksGranted):
            live.granted = live.granted or engine is live.decode
        elif live.first_s is None:
            live.first_s = now_s
        if isinstance(event, TokensEmitted) and event.finish_reason is not None:
            assert live.first_s is not None
            self._served.append(Served(job=live.job, first_token_s=live.first_s, last_token_s=now_s, batch_end_s=now_s))
            del self._live[event.seq_id]
        elif live.decode is not live.prefill and live.granted and live.first_s is not None and not live.joined:
            live.joined = True
            self._at(now_s + self._handoff_s, event.seq_id)


class _Engine:
    """One engine and the step that it computes."""

    def __init__(self, pool: Pool, clock: VirtualClock) -> None:
        shape = pool.shape
        self._clock = clock
        self._profile = pool.profile
        self.plan: StepPlan | None = None
        self._pool = BlockPool(shape.num_blocks, shape.block_size)
        self.scheduler = Scheduler(
            block_pool=self._pool,
            prefix_cache=PrefixCache(self._pool, enabled=False),
            policy=policy_for(pool.role, shape.batching),
            clock=clock,
            max_batched_tokens=max(shape.max_batched_tokens, shape.max_running),
            max_running=shape.max_running,
            max_waiting=MAX_JOBS,
            max_model_len=shape.max_model_len,
            eos_token_ids=(),
        )
        self._promised = 0

    def crowding(self) -> tuple[int, int]:
        """Tokens that wait to be prefilled, then sequences that run: who is least crowded prefills next."""
        load = self.scheduler.load()
        return load.queued_prefill_tokens, load.running

    def fullness(self) -> tuple[int, int]:
        """Sequences that wait for KV, then blocks that are taken: who is least full decodes next."""
        load = self.scheduler.load()
        return load.waiting, load.num_blocks - load.free_blocks

    def add(self, name: str, job: Job, handoff: Handoff) -> None:
        """Queues its half of a request."""
        self.scheduler.add(
            SequenceSpec(
                seq_id=name,
                prompt_token_ids=(0,) * job.prompt_tokens,
                sampling=SamplingParams(temperature=0.0, max_tokens=job.output_tokens, ignore_eos=True),
                handoff=handoff,
                arrival_s=job.arrival_s,
            )
        )

    def start(self) -> float | None:
        """Begins a step; when it ends, or None where there is nothing to compute."""
        self.plan = self.scheduler.schedule()
        if self.plan is None:
            return None
        shape = step_shape(self.plan)
        takes_s = self._profile.step_time_s(
            shape.prefill_tokens, shape.prefill_squares, shape.decode_rows, shape.context_tokens
        )
        return self._clock.now_s() + takes_s

    def finish(self) -> None:
        """Takes in the step's output."""
        assert self.plan is not None
        plan, self.plan = self.plan, None
        rows = tuple(RowOutput(row.seq_id, (_TOKEN,) if row.sample is not None else ()) for row in plan.rows)
        self.scheduler.complete(StepOutput(plan.plan_id, rows, 0.0))
