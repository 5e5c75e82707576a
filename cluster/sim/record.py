"""What a simulation leaves behind: the records that a benchmark's reports are made of, a table of every request, and
what was seen of queues, steps and transfers on the way. Pure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from ..types import SLO
from ..workload.report import RequestRecord
from .observer import StepSpan, TransferSpan, WorkerSample
from .request import Outcome

DONE, UNFINISHED = "done", "unfinished"
COLUMNS = (
    "request_id",
    "arrival_s",
    "input_tokens",
    "output_tokens",
    "slo_class",
    "outcome",
    "attained",
    "path",
    "prefill_worker",
    "decode_worker",
    "tries",
    "cached_tokens",
    "answered_tokens",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "dispatch_ms",
    "queue_ms",
    "prefill_ms",
    "exposed_transfer_ms",
    "decode_queue_ms",
    "transferred_bytes",
)
"""Of `requests_csv`. The names of arrivals and lengths are those of a trace, so that the table can be replayed."""


def ended(outcome: Outcome) -> bool:
    """Refused, given up, or answered to its end."""
    return bool(outcome.refused or outcome.failed) or outcome.done


def fate(outcome: Outcome) -> str:
    """`done`, `unfinished` where the run ended before it, else why it was refused or given up."""
    if outcome.refused:
        return f"refused: {outcome.refused}"
    if outcome.failed:
        return f"failed: {outcome.failed}"
    return DONE if outcome.done else UNFINISHED


def record(outcome: Outcome) -> RequestRecord:
    """As the benchmark client would have seen it: sent when due, its output in one piece."""
    asked = outcome.asked
    return RequestRecord(
        due_s=asked.arrival_s,
        sent_s=asked.arrival_s,
        first_token_s=outcome.first_token_s,
        last_token_s=outcome.last_token_s,
        prompt_tokens=len(asked.prompt_token_ids),
        output_tokens=outcome.output_tokens,
        error="" if fate(outcome) == DONE else fate(outcome),
        ended_s=asked.arrival_s if outcome.last_token_s is None else outcome.last_token_s,
        timings=_timings(outcome),
    )


def _timings(outcome: Outcome) -> dict[str, float | str]:
    """Those of `cluster.types.Timings` that are known; none for a request that was not let in."""
    first_s, last_s, ttft_s = outcome.first_token_s, outcome.last_token_s, outcome.ttft_s
    if first_s is None or last_s is None or ttft_s is None:
        return {}
    return {
        "path": outcome.path,
        "queue_s": outcome.queue_s,
        "prefill_s": outcome.prefill_s,
        "ttft_s": ttft_s,
        "exposed_transfer_s": outcome.exposed_transfer_s,
        "decode_queue_s": outcome.decode_queue_s,
        "decode_s": last_s - first_s,
        "e2e_s": last_s - outcome.asked.arrival_s,
        "transferred_bytes": float(outcome.transferred_bytes),
        "prefill_worker": outcome.prefill_worker,
        "decode_worker": outcome.decode_worker,
    }


def attained_by_class(outcomes: Sequence[Outcome], promises: Mapping[str, SLO]) -> dict[str, tuple[int, int]]:
    """By SLO class: requests that kept their promises, and all."""
    counts = dict.fromkeys(promises, (0, 0))
    for outcome in outcomes:
        name = outcome.asked.slo_class
        kept, total = counts[name]
        counts[name] = kept + outcome.attains(promises[name]), total + 1
    return counts


def requests_csv(outcomes: Sequence[Outcome], promises: Mapping[str, SLO]) -> str:
    """A line for each request, in order of arrival; empty cells: that never came."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for outcome in outcomes:
        table.writerow(_cells(outcome, promises[outcome.asked.slo_class]))
    return text.getvalue()


def _cells(outcome: Outcome, slo: SLO) -> tuple[object, ...]:
    asked = outcome.asked
    seen = outcome.first_token_s is not None
    e2e_s = None if outcome.last_token_s is None else outcome.last_token_s - asked.arrival_s
    dispatch_s = None if outcome.dispatched_s is None else outcome.dispatched_s - asked.arrival_s
    return (
        asked.request_id,
        f"{asked.arrival_s:.6f}",
        len(asked.prompt_token_ids),
        asked.output_tokens,
        asked.slo_class,
        fate(outcome),
        int(outcome.attains(slo)),
        outcome.path,
        outcome.prefill_worker,
        outcome.decode_worker,
        outcome.tries,
        outcome.cached_tokens,
        outcome.output_tokens,
        _ms(outcome.ttft_s),
        _ms(outcome.tpot_s),
        _ms(e2e_s),
        _ms(dispatch_s),
        _ms(outcome.queue_s if seen else None),
        _ms(outcome.prefill_s if seen else None),
        _ms(outcome.exposed_transfer_s if outcome.transferred_bytes else None),
        _ms(outcome.decode_queue_s if outcome.transferred_bytes else None),
        outcome.transferred_bytes,
    )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


class Recorder:
    """Keeps what an observed cluster tells (`observer.Observer`): samples for pictures, spans for traces."""

    def __init__(self, *, sample_period_s: float, spans: bool) -> None:
        self._period_s = sample_period_s
        self._spans = spans
        self.samples: list[tuple[float, int, tuple[WorkerSample, ...]]] = []
        """(when, requests waiting at the router, every worker)."""
        self.steps: list[StepSpan] = []
        self.transfers: list[TransferSpan] = []

    @property
    def sample_period_s(self) -> float:
        """See `Observer.sample_period_s`."""
        return self._period_s

    @property
    def wants_spans(self) -> bool:
        """See `Observer.wants_spans`."""
        return self._spans

    def sample(self, at_s: float, waiting_at_router: int, workers: Sequence[WorkerSample]) -> None:
        """See `Observer.sample`."""
        self.samples.append((at_s, waiting_at_router, tuple(workers)))

    def step(self, span: StepSpan) -> None:
        """See `Observer.step`."""
        self.steps.append(span)

    def transfer(self, span: TransferSpan) -> None:
        """See `Observer.transfer`."""
        self.transfers.append(span)
