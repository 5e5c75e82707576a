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
METRICS = ("ttft", "tpot", "itl", "e2el")
_LATE_SHARE = 0.25
_LATE_S = 0.002  # the event loop's timers count milliseconds


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
    ended_s: float | None = None
    """When the answer was over, well or not; None: nobody looked."""
    timings: Mapping[str, float | str] = field(default_factory=dict)
    """The server's own, where it sends them (`cluster.types.Timings`)."""

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
class ExposedWait:
    """What the passage of KV adds to answers that two workers made, from the server's own timings."""

    requests: int
    exposed_ms_p50: float
    """Last KV byte minus end of prefill."""
    share_of_ttft: float
    """That, over the median TTFT of the same requests as the client saw it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The whole run.

    Keys of `metrics_ms`: ttft, tpot, itl, e2el, lateness, stall; each with mean, median, std, max, p<N>.
    """

    completed: int
    failed: int
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    metrics_ms: Mapping[str, Mapping[str, float]]
    attained: int | None = None
    """Requests that met every promise; None: nothing was promised."""
    goodput_slo_ms: Mapping[str, float] = field(default_factory=dict)
    max_concurrent_requests: int = 0
    max_output_tokens_per_s: float = 0.0
    """In the busiest second; the tokens of a request count evenly over its pieces."""
    exposed_wait: ExposedWait | None = None
    """None: the server told of no handoff."""

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
            raise ValueError(f"goodput: {pair!r} is not allowed; allowed: {name}:MS, with milliseconds above 0")
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
    records: Sequence[RequestRecord],
    promises_ms: Mapping[str, float],
    percentiles: Sequence[float] = (99.0,),
    stalls_s: Sequence[float] = (),
) -> Summary:
    """Adds the records up. The duration runs from the first sending to the last token or failure seen.

    `stalls_s`: by how much the client's event loop came back late, whenever that was looked at.
    """
    done = [record for record in records if record.ok]
    ends = [end_s for record in records if (end_s := record.last_token_s if record.ok else record.ended_s) is not None]
    begin = min((record.sent_s for record in records), default=0.0)
    duration_s = max(max(ends, default=begin) - begin, 1e-9)
    series: dict[str, Sequence[float | None]] = {
        "ttft": [record.ttft_s for record in done],
        "tpot": [record.tpot_s for record in done],
        "itl": [gap for record in done for gap in record.itls_s],
        "e2el": [record.e2e_s for record in done],
        "lateness": [record.lateness_s for record in records],
        "stall": stalls_s,
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
        max_concurrent_requests=_most_at_once(done),
        max_output_tokens_per_s=_busiest_second(done),
        exposed_wait=exposed_wait(done),
    )


def exposed_wait(done: Sequence[RequestRecord]) -> ExposedWait | None:
    """Of the requests whose KV was handed over. Fields that the server leaves out are 0."""
    split = [record for record in done if record.timings.get("path") == "split" and record.ttft_s is not None]
    if not split:
        return None
    exposed_s = float(np.median([float(record.timings.get("exposed_transfer_s", 0.0)) for record in split]))
    ttft_s = float(np.median([record.ttft_s for record in split if record.ttft_s is not None]))
    return ExposedWait(requests=len(split), exposed_ms_p50=exposed_s * 1e3, share_of_ttft=exposed_s / max(ttft_s, 1e-9))


def distortion(summary: Summary, *, closed_loop: bool = False) -> str:
    """Why the client itself may have spoilt the numbers, on one line; empty: it did not.

    A client that sends late loads the server less evenly than was asked for; one whose event loop stalls stamps tokens
    late. Either counts where its 99th percentile (or, without that, its maximum) exceeds a quarter of the median TTFT.
    In a closed loop requests are held back on purpose.
    """
    ttft_ms = summary.metrics_ms["ttft"]["median"]
    if math.isnan(ttft_ms):
        return ""
    allowed_ms = max(_LATE_SHARE * ttft_ms, _LATE_S * 1e3)
    found = []
    for name, what in (("lateness", "sent requests late"), ("stall", "read answers late")):
        statistics = summary.metrics_ms[name]
        late_ms = statistics.get("p99", statistics["max"])
        if late_ms > allowed_ms and not (name == "lateness" and closed_loop):
            found.append(f"{what} (p99 {late_ms:.1f} ms)")
    if not found:
        return ""
    return (
        f"this client {' and '.join(found)}, against a median TTFT of {ttft_ms:.1f} ms: "
        "the numbers say less about the server; give the client more processor time, or send less"
    )


def _most_at_once(done: Sequence[RequestRecord]) -> int:
    edges = [(record.sent_s, 1) for record in done]
    edges += [(record.last_token_s, -1) for record in done if record.last_token_s is not None]
    most = now = 0
    for _, change in sorted(edges):
        now += change
        most = max(most, now)
    return most


def _busiest_second(done: Sequence[RequestRecord]) -> float:
    times = np.array([when_s for record in done for when_s in record.chunk_times_s])
    if not times.size:
        return 0.0
    weights = [record.output_tokens / max(1, len(record.chunk_times_s)) for record in done]
    spread = np.repeat(weights, [len(record.chunk_times_s) for record in done])
    return float(np.bincount((times - times.min()).astype(np.int64), weights=spread).max())


def _statistics(values_s: Iterable[float | None], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation (population), maximum and percentiles (linear interpolation), in ms."""
    values = np.array([value for value in values_s if value is not None], dtype=np.float64) * 1e3
    names = ["mean", "median", "std", "max", *(f"p{percentile:g}" for percentile in percentiles)]
    if values.size == 0:
        return dict.fromkeys(names, math.nan)
    numbers = [values.mean(), np.median(values), values.std(), values.max(), *np.percentile(values, list(percentiles))]
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}


def result_json(
    summary: Summary,
    records: Sequence[RequestRecord],
    facts: Mapping[str, Any],
    *,
    metrics: Sequence[str] = METRICS,
    detailed: bool = True,
) -> dict[str, Any]:
    """The saved result, with vLLM's field names; `facts` (date, backend, model_id, request_rate, …) come first.

    `ttfts`, `itls`, `latencies`, `queue_times` and `start_times` are seconds, as vLLM has them; everything ending in
    `_ms` is milliseconds; nothing is NaN. `metrics`: those whose statistics are saved. Not `detailed`: nothing that
    there is one of for each request.
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
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
        "attainment": summary.attainment,
        "goodput_slo_ms": dict(summary.goodput_slo_ms),
        "handoffs": summary.exposed_wait.requests if summary.exposed_wait else None,
        "median_exposed_transfer_ms": summary.exposed_wait.exposed_ms_p50 if summary.exposed_wait else None,
        "exposed_transfer_share_of_ttft": summary.exposed_wait.share_of_ttft if summary.exposed_wait else None,
        "client_warning": distortion(summary, closed_loop=facts.get("max_concurrency") is not None),
    }
    for metric in (*metrics, "lateness", "stall"):
        for name, value in summary.metrics_ms[metric].items():
            result[f"{name}_{metric}_ms"] = None if math.isnan(value) else value
    if not detailed:
        return result
    begin_s = min((record.due_s for record in records), default=0.0)
    return result | {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft_s for record in records],
        "itls": [list(record.itls_s) for record in records],
        "latencies": [record.e2e_s for record in records],
        "start_times": [record.sent_s - begin_s for record in records],
        "queue_times": [record.lateness_s for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }
