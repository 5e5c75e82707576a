"""A benchmark's summary as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..workload.report import METRICS, Summary, distortion
from ..workload.sweep import SweepPoint, SweepResult

_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E", "lateness": "sent late", "stall": "read late"}


def table(
    summary: Summary,
    percentiles: Sequence[float] = (99.0,),
    metrics: Sequence[str] = METRICS,
    *,
    closed_loop: bool = False,
    client: bool = True,
    refused: int | None = None,
) -> str:
    """One row per metric in milliseconds, then rates, what was kept of the promises, and a warning where it is due.

    Not `client`: nobody sent the load or read the answers, so that nothing could be late. `refused`: how many of those
    that failed were refused at the door; None: it is not known.
    """
    columns = ("mean", "median", *(f"p{percentile:g}" for percentile in percentiles), "max")
    head = f"{'ms':<10}" + "".join(f"{column:>10}" for column in columns)
    lines = [head, "-" * len(head)]
    for metric in (*metrics, *(("lateness", "stall") if client else ())):
        statistics = summary.metrics_ms[metric]
        lines.append(f"{_TITLES[metric]:<10}" + "".join(_cell(statistics, column) for column in columns))
    lines += [
        "",
        f"requests    {summary.completed} completed, {_lost(summary.failed, refused)} in {summary.duration_s:.1f} s, "
        f"at most {summary.max_concurrent_requests} at once",
        f"throughput  {summary.request_throughput:.2f} requests/s, {summary.output_throughput:.1f} output tokens/s, "
        f"{summary.total_token_throughput:.1f} tokens/s in all",
    ]
    if summary.attainment is not None and summary.request_goodput is not None:
        lines += [
            f"attainment  {summary.attainment:.1%} of requests kept {promised(summary.goodput_slo_ms)}",
            f"goodput     {summary.request_goodput:.2f} requests/s kept them, over all {summary.duration_s:.1f} s",
        ]
    if (wait := summary.exposed_wait) is not None:
        lines.append(
            f"handoff     {counted(wait.requests, 'request')}: KV came {wait.exposed_ms_p50:.1f} ms after the end of "
            f"prefill (p50), {wait.share_of_ttft:.1%} of TTFT p50"
        )
    if spoilt := distortion(summary, closed_loop=closed_loop):
        lines.append(f"WARNING     {spoilt}")
    return "\n".join(lines)


def counted(count: int, what: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _lost(failed: int, refused: int | None) -> str:
    return f"{failed} failed" if refused is None else f"{refused} refused, {failed - refused} failed"


def promised(promises_ms: Mapping[str, float]) -> str:
    """`TTFT <= 200 ms and TPOT <= 50 ms`; a metric of one SLO class is called `<class> ttft`."""
    return " and ".join(f"{_titled(name)} <= {limit:g} ms" for name, limit in promises_ms.items())


def _titled(name: str) -> str:
    slo_class, _, metric = name.rpartition(" ")
    return f"{slo_class} {_TITLES[metric]}".lstrip()


SWEEP_HEAD = (
    f"{'req/s':>8}{'kept':>8}{'2nd half':>10}{'goodput':>9}{'TTFT p50':>10}{'p99':>9}{'TPOT p50':>10}{'p99':>8}"
    f"{'failed':>8}  seeds (latencies in ms, goodput in req/s)"
)


def sweep_row(point: SweepPoint, target: float) -> str:
    """One line per point: medians over the seeds, times in ms."""
    runs = point.runs
    cells = [
        f"{point.rate:>8.3g}{point.attainment:>8.1%}{point.late_attainment:>10.1%}{point.goodput:>9.2f}",
        _middle([run.median_ttft_ms for run in runs], 10),
        _middle([run.p99_ttft_ms for run in runs], 9),
        _middle([run.median_tpot_ms for run in runs], 10),
        _middle([run.p99_tpot_ms for run in runs], 8),
        f"{sum(run.failed for run in runs):>8}",
    ]
    seeds = " ".join(f"{run.attainment:.0%}" for run in runs)
    marks = "" if point.keeps(target) else "  not kept"
    marks += ", ended early" if any(run.ended_early for run in runs) else ""
    marks += "  CLIENT LATE" if any(run.client_late for run in runs) else ""
    return f"{''.join(cells)}  {seeds}{marks}"


def sweep_verdict(result: SweepResult) -> str:
    """What the sweep found, in a sentence or two."""
    promise = f"{result.target:.0%} of requests keep {promised(result.promises_ms)}"
    best = result.best
    if best is None:
        lines = [f"even the lowest rate that was tried is too high for this: {promise}"]
    else:
        lines = [f"highest rate at which {promise}: {best.rate:.3g} requests/s"]
    above = [
        point.rate for point in result.points if point.keeps(result.target) and (not best or point.rate > best.rate)
    ]
    if above:
        lines.append(
            f"{above[-1]:.3g} requests/s kept it though a lower rate did not: more seeds or longer runs would tell"
        )
    if not result.complete:
        lines.append("the search ended before the knee was closed in on: more points or more time would say more")
    if any(run.client_late for point in result.points for run in point.runs):
        lines.append("WARNING: this client was late in the runs marked so; there the numbers say less about the server")
    return "\n".join(lines)


def _middle(values: Sequence[float], width: int) -> str:
    found = sorted(value for value in values if not math.isnan(value))
    return f"{'-':>{width}}" if not found else f"{found[len(found) // 2]:>{width}.1f}"


def _cell(statistics: Mapping[str, float], name: str) -> str:
    value = statistics.get(name, math.nan)
    return f"{'-':>10}" if math.isnan(value) else f"{value:>10.1f}"
