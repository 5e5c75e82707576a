"""Under which promise a request stands: its SLO class's, or what the request itself names instead. Pure.

Two classes are always there: `interactive`, under the router's own promise (`RouterConfig.slo`), for every request that
names no class, and `batch`, without one, which takes what is left and is never starved. The configuration changes
them and adds others (`router.slo_classes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..cluster.config import RouterConfig, SLOClass
from ..cluster.types import SLO
from .params import Fields, show

INTERACTIVE = "interactive"
BATCH = "batch"
INTERACTIVE_SHARE, BATCH_SHARE = 0.9, 0.1
MAX_PROMISE_MS = 86_400_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What one request was promised, seconds; None: nothing."""

    slo_class: str
    share: float
    ttft_s: float | None
    tpot_s: float | None
    own_ttft: bool = False
    """The request named its TTFT itself, so that it is taken as it is."""
    own_tpot: bool = False

    @property
    def slo(self) -> SLO:
        """For counting attainment."""
        return SLO(ttft_s=self.ttft_s, tpot_s=self.tpot_s)

    def effective_ttft_s(self, idle_s: float) -> float:
        """By when the first token is due after arrival, where even an idle cluster needs `idle_s`; inf: no promise.

        A class's promise is stretched for prompts that cannot be served within it at all: twice what an idle cluster
        needs, so that a long prompt that comes alone is not refused.
        """
        if self.ttft_s is None:
            return math.inf
        return self.ttft_s if self.own_ttft else max(self.ttft_s, 2 * idle_s)

    def effective_tpot_s(self, idle_s: float) -> float:
        """The same for the time per output token."""
        if self.tpot_s is None:
            return math.inf
        return self.tpot_s if self.own_tpot else max(self.tpot_s, 2 * idle_s)


class SLOClasses:
    """The classes of one router."""

    def __init__(self, config: RouterConfig) -> None:
        self._classes = {
            INTERACTIVE: SLOClass(ttft_s=config.slo.ttft_s, tpot_s=config.slo.tpot_s, share=INTERACTIVE_SHARE),
            BATCH: SLOClass(share=BATCH_SHARE),
            **config.slo_classes,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """All classes, the built-in ones first."""
        return tuple(self._classes)

    def promise(self, name: str = INTERACTIVE, *, ttft_s: float | None = None, tpot_s: float | None = None) -> Promise:
        """The promise of a request of class `name` (it must be one of `names`), with what it names itself."""
        chosen = self._classes[name]
        return Promise(
            slo_class=name,
            share=chosen.share,
            ttft_s=chosen.ttft_s if ttft_s is None else ttft_s,
            tpot_s=chosen.tpot_s if tpot_s is None else tpot_s,
            own_ttft=ttft_s is not None,
            own_tpot=tpot_s is not None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromiseNames:
    """What the fields are called at one door."""

    slo_class: str
    ttft_ms: str
    tpot_ms: str


HEADERS = PromiseNames(slo_class="x-slo-class", ttft_ms="x-slo-ttft-ms", tpot_ms="x-slo-tpot-ms")
FIELDS = PromiseNames(slo_class="slo_class", ttft_ms="slo_ttft_ms", tpot_ms="slo_tpot_ms")


def parse_promise(fields: Fields, classes: SLOClasses, names: PromiseNames) -> Promise:
    """The promise that a request asks for. Absent or empty class: `interactive`. InvalidRequest names field, value and
    what is allowed.
    """
    name = fields.string(names.slo_class) or INTERACTIVE
    if name not in classes.names:
        raise fields.refuse(names.slo_class, f"{show(name)} is no class here", ", ".join(classes.names))
    ttft_ms = fields.number(names.ttft_ms, 0.0, MAX_PROMISE_MS, above_low=True)
    tpot_ms = fields.number(names.tpot_ms, 0.0, MAX_PROMISE_MS, above_low=True)
    return classes.promise(
        name,
        ttft_s=None if ttft_ms is None else ttft_ms / 1000,
        tpot_s=None if tpot_ms is None else tpot_ms / 1000,
    )


def number_of(text: str | None) -> float | str | None:
    """A header's text as a number; as it came where it is none, for the check to name it."""
    try:
        return text if text is None or "_" in text else float(text)
    except ValueError:
        return text
