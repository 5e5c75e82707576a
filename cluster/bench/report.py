"""From what happened to each request to the numbers people compare, with `vllm bench serve`'s field names. Pure.

TTFT runs from the actual sending to the first token's arrival; how late requests were sent is reported apart
(`lateness`), so that a slow client cannot hide in it. TPOT = (E2E - TTFT) / (n - 1), the first token excluded; a
request of one token has none. Attainment is the share of all requests sent that meet every promise jointly; a failed
request meets none, and a promise on TPOT binds only requests that have one. Goodput is attained requests per second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request, as the client saw it. Times are seconds on the client's monotonic clock."""

    due_s: float
    sent_s: float
    first_token_s: float | None = None
    """When the first token came; None: none came."""
    last_token_s: float | None = None
    chunk_times_s: tuple[float, ...] = ()
    """When each piece of output came, the first included."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""
    """Empty: the request ended well."""

    @property
    def ok(self) -> bool:
        """Whether the answer came to its proper end."""
        return not self.error and self.first_token_s is not None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def e2e_s(self) -> float | None:
        """From sending to the last token."""
        return None if self.last_token_s is None else self.last_token_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token, first token excluded; None for fewer than two tokens."""
        if self.output_tokens < 2 or self.first_token_s is None or self.last_token_s is None:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> tuple[float, ...]:
        """Times between pieces of output."""
        return tuple(later - earlier for earlier, later in itertools.pairwise(self.chunk_times_s))

    @property
    def lateness_s(self) -> float:
        """How much later than due the request was sent: the load generator's own fault."""
        return self.sent_s - self.due_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The whole run. Keys of `metrics_ms`: ttft, tpot, itl, e2el, lateness; each with mean, median, std, max, p<N>."""

    completed: int
    failed: int
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    metrics_ms: Mapping[str, Mapping[str, float]]
    attained: int | None = None
    """Requests that met every promise; None: nothing was promised."""
    goodput_slo_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def request_throughput(self) -> float:
        """Completed requests per second."""
        return self.completed / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Output tokens per second."""
        return self.total_output_tokens / self.duration_s

    @property
    def total_token_throughput(self) -> float:
        """Input and output tokens per second."""
        return (self.total_input_tokens + self.total_output_tokens) / self.duration_s

    @property
    def attainment(self) -> float | None:
        """Share of the requests sent that met every promise."""
        return None if self.attained is None else self.attained / (self.completed + self.failed)

    @property
    def request_goodput(self) -> float | None:
        """Requests per second that met every promise."""
        return None if self.attained is None else self.attained / self.duration_s


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """`["ttft:200", "tpot:50"]` to milliseconds by metric. Raises ValueError naming what is allowed."""
    promises: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        if name not in GOODPUT_METRICS:
            raise ValueError(f"goodput: {pair!r} is not allowed; allowed: ttft:MS, tpot:MS, e2el:MS")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"goodput: {pair!r} is not allowed; allowed: milliseconds above 0")
        if name in promises:
            raise ValueError(f"goodput: {name} is given twice")
        promises[name] = value
    return promises


def attains(record: RequestRecord, promises_ms: Mapping[str, float]) -> bool:
    """Whether the request met every promise."""
    if not record.ok:
        return False
    seen = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.e2e_s}
    return all(value is None or value * 1e3 <= promises_ms[name] for name, value in seen.items() if name in promises_ms)


def summarize(
    records: Sequence[RequestRecord], promises_ms: Mapping[str, float], percentiles: Sequence[float] = (99.0,)
) -> Summary:
    """Adds the records up. The duration runs from the first sending to the last token or failure seen."""
    done = [record for record in records if record.ok]
    ends = [record.last_token_s for record in done if record.last_token_s is not None]
    begin = min((record.sent_s for record in records), default=0.0)
    duration_s = max(max(ends, default=begin) - begin, 1e-9)
    series: dict[str, list[float | None]] = {
        "ttft": [record.ttft_s for record in done],
        "tpot": [record.tpot_s for record in done],
        "itl": [gap for record in done for gap in record.itls_s],
        "e2el": [record.e2e_s for record in done],
        "lateness": [record.lateness_s for record in records],
    }
    return Summary(
        completed=len(done),
        failed=len(records) - len(done),
        duration_s=duration_s,
        total_input_tokens=sum(record.prompt_tokens for record in done),
        total_output_tokens=sum(record.output_tokens for record in done),
        metrics_ms={name: _statistics(values, percentiles) for name, values in series.items()},
        attained=sum(attains(record, promises_ms) for record in records) if promises_ms else None,
        goodput_slo_ms=dict(promises_ms),
    )


def _statistics(values_s: Iterable[float | None], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation (population), maximum and percentiles (linear interpolation), in ms."""
    values = np.array([value for value in values_s if value is not None], dtype=np.float64) * 1e3
    names = ["mean", "median", "std", "max", *(f"p{percentile:g}" for percentile in percentiles)]
    if values.size == 0:
        return dict.fromkeys(names, math.nan)
    numbers = [values.mean(), np.median(values), values.std(), values.max(), *np.percentile(values, list(percentiles))]
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}


def result_json(summary: Summary, records: Sequence[RequestRecord], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The saved result, with vLLM's field names; `facts` (date, backend, model_id, request_rate, …) come first.

    `ttfts` and `itls` are seconds, as vLLM has them; everything ending in `_ms` is milliseconds; nothing is NaN.
    """
    result: dict[str, Any] = {
        **facts,
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "attainment": summary.attainment,
        "goodput_slo_ms": dict(summary.goodput_slo_ms),
    }
    for metric, statistics in summary.metrics_ms.items():
        for name, value in statistics.items():
            result[f"{name}_{metric}_ms"] = None if math.isnan(value) else value
    result |= {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [list(record.itls_s) for record in records],
        "lateness": [record.lateness_s for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }
    return result
