"""What can be said of a placement before it is simulated: whether it can ever keep the promises, how much it could
serve at most, and about how much it will (`estimate`). Cheap: everything here is milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from ..latency.interface import StepCosts
from ..latency.links import Link
from ..sim.deploy import Replica, costs_of
from ..types import Role
from .estimate import Kind, serve
from .goodput import Precision, find_goodput, straight
from .place import replica_of, replicas_of
from .result import Affinity, Candidate, Pool
from .setting import MAX_REQUESTS, Sample, Setting, draw_sample
from .shape import Shape

_PRECISION = Precision(width=1.15, nearness=0.02, most=12)
_PRECISION_NEAR = Precision(width=1.15, nearness=0.02, most=12, step=1.1)
_AROUND = (0.88, 0.94, 1.06, 1.12)
"""Of a rough goodput: where a shape wants scores beside those of the way there, if none is as near as `_BESIDE`."""
_BESIDE = 0.02
_ANY_SLOPE, _LEAST_SHARE, _NOISE = 0.5, 0.2, 0.01
_START_SHARE = 0.6
"""Of the capacity bound: where an estimate's search begins."""


@dataclass(frozen=True, slots=True)
class Guess:
    """An estimate at one rate."""

    rate: float
    score: float
    one_sided: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a candidate or a phase under one seed."""

    goodput: float
    """Requests a second."""
    shape: Shape | None = None
    """Of the score over rate, near the goodput; None: it was not worth working out."""


@dataclass(frozen=True, slots=True)
class Hopeless:
    """Why workers cannot keep a promise."""

    role: Role
    excess: float
    """By which factor they miss it, above 1."""
    text: str


class Outlook:
    """Of one setting; keeps what it has worked out."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.sample = draw_sample(setting, setting.seeds[0], MAX_REQUESTS)
        self._sample_of = cache(lambda seed: draw_sample(setting, seed, MAX_REQUESTS))
        self._kind = cache(self._new_kind)
        count = len(self.sample.input_tokens)
        self._squares = sum(tokens * tokens for tokens in self.sample.input_tokens) / count
        pairs = list(zip(self.sample.input_tokens, self.sample.output_tokens, strict=True))
        self._context = sum(answer * (prompt + answer / 2) for prompt, answer in pairs) / sum(self.sample.output_tokens)
        """Of a row at any moment, mean: long answers are there longer."""
        self._prompts: dict[str, list[int]] = {}
        self._contexts: dict[str, list[int]] = {}
        """By class, sorted: tokens of prompts, and of contexts in the middle of answers; 0: an answer of one token."""
        for name, (prompt, answer) in zip(self.sample.classes, pairs, strict=True):
            self._prompts.setdefault(name, []).append(prompt)
            self._contexts.setdefault(name, []).append(prompt + answer // 2 if answer > 1 else 0)
        for sizes in (*self._prompts.values(), *self._contexts.values()):
            sizes.sort()
        self._handed_tokens = sum(prompt for prompt, answer in pairs if answer > 1) / count
        """Of a request's prompt, mean: those of answers with one token stay where they are."""

    def costs(self, pool: Pool) -> StepCosts:
        """Of one worker. ValueError where nothing is known of the split."""
        return costs_of(self.setting.device.source, pool.tensor_parallel, pool.pipeline_stages)

    def _new_kind(self, pool: Pool) -> Kind:
        memory = self.setting.device.memory(replica_of(pool))
        return Kind(
            role=pool.role,
            costs=self.costs(pool),
            budget_tokens=max(pool.max_batched_tokens, pool.max_running),
            max_running=pool.max_running,
            kv_tokens=memory.tokens,
        )

    # --- not even alone ---------------------------------------------------------------------------------------------

    def hopeless(self, pool: Pool) -> Hopeless | None:
        """Why such workers cannot keep the promises of enough requests even one at a time; None: they can."""
        worst: Hopeless | None = None
        for slo_class, promise in self.setting.promises.items():
            for what, limit_s, other, alone_s, sizes in (
                ("to its first token", promise.ttft_s, Role.DECODE, self._alone_ttft_s, self._prompts),
                ("for each further token", promise.tpot_s, Role.PREFILL, self._alone_tpot_s, self._contexts),
            ):
                own = sizes.get(slo_class)
                if limit_s is None or not own or pool.role is other:
                    continue
                # Steps take longer for more tokens, so who is asked is known before it is timed.
                needed_s = alone_s(pool, own[max(0, math.ceil(self.setting.target * len(own)) - 1)])
                excess = needed_s / limit_s
                if excess > 1.0 and (worst is None or excess > worst.excess):
                    text = (
                        f"even one unloaded request takes {needed_s * 1e3:.3g} ms {what} with TP "
                        f"{pool.tensor_parallel}, PP {pool.pipeline_stages} ({100 * self.setting.target:g} % "
                        f"of class {slo_class} take at most that); promised are {limit_s * 1e3:g} ms"
                    )
                    worst = Hopeless(pool.role, excess, text)
        return worst

    def _alone_ttft_s(self, pool: Pool, tokens: int) -> float:
        costs, budget = self.costs(pool), pool.max_batched_tokens
        steps = [(at, min(tokens, at + budget)) for at in range(0, tokens, budget)]
        router_s = self.setting.own_s + 5 * self.setting.rpc_s
        # Of a pipeline the next part of a prompt follows as soon as the slowest stage is free.
        *before, last = [(end - at, end * end - at * at, 0, 0) for at, end in steps]
        return router_s + sum(costs.stage_time_s(*sizes) for sizes in before) + costs.step_time_s(*last)

    def _alone_tpot_s(self, pool: Pool, context: int) -> float:
        return self.costs(pool).step_time_s(0, 0, 1, context) if context else 0.0

    # --- at most ----------------------------------------------------------------------------------------------------

    def capacity(self, pool: Pool) -> float:
        """Requests a second that the pool can go on computing at most: full batches that never wait, as much KV as
        memory holds, and no step that is longer than the loosest promise on TPOT. A run too short for its queues to
        grow may look better.
        """
        if pool.role is Role.PREFILL:
            batch = max(1.0, pool.max_batched_tokens / self.sample.mean_input)
            sizes = (round(batch * self.sample.mean_input), round(batch * self._squares), 0, 0)
            return pool.count * batch / self.costs(pool).stage_time_s(*sizes)
        most = float(min(pool.max_running, max(1, int(self._kind(pool).kv_tokens / self._context))))
        if pool.role is Role.MIXED:
            each = self.sample.mean_input / self.sample.mean_output  # prompt tokens for each row, in the long run
            most = min(most, max(1.0, pool.max_batched_tokens / (1.0 + each)))
        limits = [promise.tpot_s for promise in self.setting.promises.values()]
        limit_s = math.inf if None in limits else max(limit for limit in limits if limit is not None)
        rows = most
        if self._row_step_s(pool, most) > limit_s:
            low, high = 1.0, most
            while high - low > 0.5:
                middle = (low + high) / 2
                low, high = (middle, high) if self._row_step_s(pool, middle) <= limit_s else (low, middle)
            rows = low
        return pool.count * rows / (self.sample.mean_output * self._row_step_s(pool, rows))

    def _row_step_s(self, pool: Pool, rows: float) -> float:
        """How long `rows` wait for a token; on a mixed worker as many prompts are computed meanwhile as rows end."""
        stages = pool.pipeline_stages
        if pool.role is Role.DECODE:
            each = max(1, math.ceil(rows / stages))
            return self.costs(pool).step_time_s(0, 0, each, round(each * self._context))
        prompts = rows / self.sample.mean_output
        sizes = (round(prompts * self.sample.mean_input), round(prompts * self._squares))
        return self.costs(pool).stage_time_s(*sizes, max(1, round(rows)), round(rows * self._context))

    def bound(self, candidate: Candidate) -> float:
        """Requests a second that the candidate computes and hands over at most: its narrowest pool, or the links."""
        return min([self._handoffs(candidate), *(self.capacity(pool) for pool in candidate.pools)])

    def _handoffs(self, candidate: Candidate) -> float:
        """Requests a second whose KV the links carry at most."""
        if not candidate.disaggregated:
            return math.inf
        link, lanes = self._lanes(candidate)
        each = self._handed_tokens * self.setting.device.facts.kv_bytes_per_token()
        return candidate.cells * lanes * link.bytes_per_s / each if each else math.inf

    def why_nothing(self, candidate: Candidate) -> str:
        """Why an estimate of its goodput is 0, in words."""
        text, handoffs = "by an estimate it keeps the promises at no rate", self._handoffs(candidate)
        if handoffs > min(self.capacity(pool) for pool in candidate.pools):
            return text
        link, _ = self._lanes(candidate)
        size = self._handed_tokens * self.setting.device.facts.kv_bytes_per_token()
        return f"{text}, as the KV of a prompt takes {link.transfer_time_s(size):.3g} s over {link.name}"

    def _lanes(self, candidate: Candidate) -> tuple[Link, float]:
        """The link that KV goes over inside one cell, and as how many of them all links together count."""
        setting = self.setting
        if candidate.affinity is Affinity.LOW:
            return setting.inside, candidate.pools[0].pipeline_stages
        nodes = {role: [one.node for one in self._replicas(candidate) if one.role is role] for role in Role}
        pairs = [one != other for one in nodes[Role.PREFILL] for other in nodes[Role.DECODE]]
        if not any(pairs):
            return setting.inside, len(set(nodes[Role.DECODE]))
        # What leaves a node shares its link, and what comes to one; those that stay on their node take none.
        ends = min(len(set(nodes[Role.PREFILL])), len(set(nodes[Role.DECODE])))
        return setting.between, ends * len(pairs) / sum(pairs)

    def _replicas(self, candidate: Candidate) -> list[Replica]:
        try:
            return replicas_of(self.setting, candidate)
        except ValueError:  # with a node more than there are
            return replicas_of(replace(self.setting, nodes=self.setting.nodes + 1), candidate)

    # --- about ------------------------------------------------------------------------------------------------------

    def estimate(self, what: Candidate | Pool, seed: int, near: float = 0.0) -> Estimate:
        """Of a candidate, or a phase alone. `near`: a rate near which its goodput is expected."""
        bound = self.capacity(what) if isinstance(what, Pool) else self.bound(what)
        shape = self.shape(what, seed, near)
        return Estimate(min(bound, shape.where(self.setting.target)), shape)  # a run that is short flatters

    def shape(self, what: Candidate | Pool, seed: int, near: float = 0.0) -> Shape:
        """Estimated score over rate, near the goodput."""
        start = near or _START_SHARE * (self.capacity(what) if isinstance(what, Pool) else self.bound(what))
        count = self.setting.run_requests(start / _cells(what))
        guesses: list[Guess] = []

        def guess(rate: float) -> Guess:
            guesses.append(Guess(rate, self.score(what, rate, seed, count)))
            return guesses[-1]

        target = self.setting.target
        rate, _ = find_goodput(
            guess,
            start=start,
            target=target,
            lead=straight(_ANY_SLOPE, target),
            precision=_PRECISION_NEAR if near else _PRECISION,
        )
        if rate and not isinstance(what, Pool):
            for around in (rate * factor for factor in _AROUND):
                if all(abs(one.rate - around) > _BESIDE * around for one in guesses):
                    guess(around)
        if not rate:
            return Shape([(0.0, target), (guesses[-1].rate, min(guesses[-1].score, 0.0))])
        return Shape((one.rate, one.score) for one in guesses)

    def challenge(self, candidate: Candidate, seed: int, rate: float) -> Estimate:
        """In full where `rate` is kept, which is what others reach; else about how much less it is."""
        off = self.score(candidate, rate, seed, self.setting.run_requests(rate / candidate.cells)) - self.setting.target
        if off >= -_NOISE and rate <= self.bound(candidate):
            return self.estimate(candidate, seed, rate)
        return Estimate(min(self.bound(candidate), rate * max(_LEAST_SHARE, 1.0 + min(off, 0.0) / _ANY_SLOPE)))

    def score(self, what: Candidate | Pool, rate: float, seed: int, requests: int) -> float:
        """As `Trial.score`, estimated."""
        sample = self._sample_of(seed).first(requests)
        if isinstance(what, Pool):
            arrivals = [at_s / rate for at_s in sample.arrivals]
            first_s, last_s = serve(self._kind(what), what.count, arrivals, sample.input_tokens, sample.output_tokens)
            if what.role is Role.PREFILL:
                last_s = first_s
            return self._judge(sample, arrivals, first_s, last_s)
        share = rate / what.cells
        arrivals = [at_s / share for at_s in sample.arrivals]
        if not what.disaggregated:
            [pool] = what.pools
            first_s, last_s = serve(self._kind(pool), pool.count, arrivals, sample.input_tokens, sample.output_tokens)
            return self._judge(sample, arrivals, first_s, last_s)
        return self._judge(sample, arrivals, *self._split(what, sample, arrivals))

    def _split(
        self, candidate: Candidate, sample: Sample, arrivals: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        prefill, decode = candidate.pool(Role.PREFILL), candidate.pool(Role.DECODE)
        assert prefill is not None
        assert decode is not None
        cells = candidate.cells
        first_s, _ = serve(
            self._kind(prefill), prefill.count // cells, arrivals, sample.input_tokens, sample.output_tokens
        )
        ready_s = self._handed_over(candidate, sample, first_s)
        order = sorted(range(len(ready_s)), key=ready_s.__getitem__)
        _, ends_s = serve(
            self._kind(decode),
            decode.count // cells,
            [ready_s[place] for place in order],
            [sample.input_tokens[place] for place in order],
            [sample.output_tokens[place] for place in order],
        )
        last_s = list(first_s)
        for place, end_s in zip(order, ends_s, strict=True):
            last_s[place] = end_s if sample.output_tokens[place] > 1 else first_s[place]
        return first_s, last_s

    def _handed_over(self, candidate: Candidate, sample: Sample, first_s: Sequence[float]) -> list[float]:
        """When each prompt's KV is where it is wanted: the links one after another, all of them as one wide link."""
        link, lanes = self._lanes(candidate)
        bytes_per_s = link.bytes_per_s * lanes
        token_bytes = self.setting.device.facts.kv_bytes_per_token()
        free_s, ready_s = 0.0, list(first_s)
        for place in sorted(range(len(first_s)), key=first_s.__getitem__):
            if sample.output_tokens[place] > 1:
                free_s = max(free_s, first_s[place]) + sample.input_tokens[place] * token_bytes / bytes_per_s
                ready_s[place] = free_s
        return ready_s

    def _judge(
        self, sample: Sample, arrivals: Sequence[float], first_s: Sequence[float], last_s: Sequence[float]
    ) -> float:
        """`first_s` of a decode phase is where the request came, `last_s` of a prefill phase its first token."""
        router_s = self.setting.own_s + 5 * self.setting.rpc_s
        limits = {
            name: (
                math.inf if one.ttft_s is None else one.ttft_s - router_s,
                math.inf if one.tpot_s is None else one.tpot_s,
            )
            for name, one in self.setting.promises.items()
        }
        total, kept = dict.fromkeys(limits, 0), dict.fromkeys(limits, 0)
        late, half = 0, len(arrivals) // 2
        for place, name in enumerate(sample.classes):
            ttft_s, tpot_s = limits[name]
            further = sample.output_tokens[place] - 1
            good = first_s[place] - arrivals[place] <= ttft_s and last_s[place] - first_s[place] <= tpot_s * further
            total[name] += 1
            kept[name] += good
            late += good and place >= half
        worst = min(kept[name] / count for name, count in total.items() if count)
        return min(worst, late / (len(arrivals) - half))


def _cells(what: Candidate | Pool) -> int:
    return what.cells if isinstance(what, Candidate) else 1
