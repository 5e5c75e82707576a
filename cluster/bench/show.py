"""A benchmark's summary as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .report import Summary

_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E", "lateness": "sent late"}


def table(summary: Summary, percentile: float = 99.0) -> str:
    """One row per metric in milliseconds, then rates, and what was kept of the promises."""
    tail = f"p{percentile:g}"
    head = f"{'ms':<10}{'mean':>10}{'median':>10}{tail:>10}{'max':>10}"
    lines = [head, "-" * len(head)]
    for metric, title in _TITLES.items():
        statistics = summary.metrics_ms[metric]
        cells = "".join(_cell(statistics, name) for name in ("mean", "median", tail, "max"))
        lines.append(f"{title:<10}{cells}")
    lines += [
        "",
        f"requests    {summary.completed} completed, {summary.failed} failed in {summary.duration_s:.1f} s",
        f"throughput  {summary.request_throughput:.2f} requests/s, {summary.output_throughput:.1f} output tokens/s, "
        f"{summary.total_token_throughput:.1f} tokens/s in all",
    ]
    if summary.attainment is not None and summary.request_goodput is not None:
        promises = " and ".join(f"{_TITLES[name]} <= {limit:g} ms" for name, limit in summary.goodput_slo_ms.items())
        lines += [
            f"attainment  {summary.attainment:.1%} of requests kept {promises}",
            f"goodput     {summary.request_goodput:.2f} requests/s",
        ]
    return "\n".join(lines)


def _cell(statistics: Mapping[str, float], name: str) -> str:
    value = statistics.get(name, math.nan)
    return f"{'-':>10}" if math.isnan(value) else f"{value:>10.1f}"
