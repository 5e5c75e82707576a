"""What was measured of handoffs, as percentiles and as text. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..types import Side, seq_id

STAGES = ("reserve", "dispatch", "open", "transfer", "join", "reply", "confirm")
ORCHESTRATION = ("reserve", "dispatch", "open", "join", "reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """One handoff: seconds of each stage, and what was moved."""

    stages_s: Mapping[str, float]
    bytes: int
    reader_cpu_s: float
    """Processor time of the reader's event loop during `transfer`; near it where nothing else wants the processor, 0
    where the transport writes by itself."""
    exposed_s: float
    """Last block written minus end of prefill."""
    memcpy_s: float
    """As many bytes, block by block, from another mapping, by one thread of this process, next (`MemoryCopies`)."""

    @property
    def orchestration_s(self) -> float:
        """All but bytes and computing."""
        return sum(self.stages_s[name] for name in ORCHESTRATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All handoffs of one transport and size."""

    transport: str
    size_mib: float
    handoffs: tuple[Handoff, ...] = field(default=())

    def row(self) -> dict[str, Any]:
        """Percentiles of everything, in ms and GB/s (1e9 bytes)."""
        stages = {name: _percentiles_ms(h.stages_s[name] for h in self.handoffs) for name in STAGES}
        stages["orchestration"] = _percentiles_ms(h.orchestration_s for h in self.handoffs)
        stages["exposed"] = _percentiles_ms(h.exposed_s for h in self.handoffs)
        rate = statistics.median(h.bytes / h.stages_s["transfer"] / 1e9 for h in self.handoffs)
        exposed = statistics.median(h.bytes / h.exposed_s / 1e9 for h in self.handoffs)
        memcpy = statistics.median(h.bytes / h.memcpy_s / 1e9 for h in self.handoffs)
        return {
            "transport": self.transport,
            "size_mib": self.size_mib,
            "handoffs": len(self.handoffs),
            "bytes": self.handoffs[0].bytes,
            "stages_ms": stages,
            "gb_per_s": rate,
            "exposed_gb_per_s": exposed,
            "memcpy_gb_per_s": memcpy,
            "reader_cpu_ms": _percentiles_ms(h.reader_cpu_s for h in self.handoffs),
            "of_memcpy": statistics.median(h.memcpy_s / h.stages_s["transfer"] for h in self.handoffs),
        }


def stages_of(
    request_id: str,
    begin_s: float,
    reserved_s: float,
    replied_s: float,
    marks: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    memcpy_s: float,
) -> Handoff:
    """One handoff from the moments that this process and both workers recorded."""
    prefill_id, decode_id = (seq_id(request_id, 0, side, 1) for side in (Side.PREFILL, Side.DECODE))
    prefill_step = next(mark for mark in marks["prefill"]["steps"] if mark["seq_id"] == prefill_id)
    decode_step = next(mark for mark in marks["decode"]["steps"] if mark["seq_id"] == decode_id)
    pull = next(mark for mark in marks["decode"]["pulls"] if mark["seq_id"] == decode_id)
    confirm = next(mark for mark in marks["decode"]["confirms"] if mark["seq_id"] == decode_id)
    stages_s = {
        "reserve": reserved_s - begin_s,
        "dispatch": prefill_step["launched_s"] - reserved_s,
        "open": pull["first_s"] - prefill_step["done_s"],
        "transfer": pull["last_s"] - pull["first_s"],
        "join": decode_step["launched_s"] - pull["last_s"],
        "reply": replied_s - decode_step["done_s"],
        "confirm": confirm["answered_s"] - confirm["sent_s"],
    }
    exposed_s = pull["last_s"] - prefill_step["done_s"]
    return Handoff(
        stages_s=stages_s, bytes=pull["bytes"], reader_cpu_s=pull["cpu_s"], exposed_s=exposed_s, memcpy_s=memcpy_s
    )


def _percentiles_ms(values_s: Iterable[float]) -> dict[str, float]:
    ordered = np.array(list(values_s)) * 1000
    return {f"p{q}": float(np.percentile(ordered, q)) for q in (50, 90, 99)}


def table(cells: Sequence[Cell]) -> str:
    """p50/p90/p99 of every stage in ms, bandwidth, and what the same copy takes in one process."""
    lines = [f"{'ms: p50 / p90 / p99':<16}" + "".join(f"{name:>21}" for name in (*STAGES, "orchestration"))]
    for row in (cell.row() for cell in cells):
        stages = row["stages_ms"]
        texts = [
            "/".join(_short(stages[name][q]) for q in ("p50", "p90", "p99")) for name in (*STAGES, "orchestration")
        ]
        lines.append(f"{row['transport']} {row['size_mib']:g} MiB".ljust(16) + "".join(f"{text:>21}" for text in texts))
    lines += [
        "",
        f"{'':<20}{'n':>5}{'MB':>9}{'exposed ms':>12}{'reader cpu ms':>15}{'GB/s':>8}"
        f"{'memcpy GB/s':>13}{'of memcpy':>11}",
    ]
    for row in (cell.row() for cell in cells):
        name = f"{row['transport']} {row['size_mib']:g} MiB"
        lines.append(
            f"{name:<20}{row['handoffs']:>5}{row['bytes'] / 1e6:>9.1f}{row['stages_ms']['exposed']['p50']:>12.2f}"
            f"{row['reader_cpu_ms']['p50']:>15.2f}"
            f"{row['gb_per_s']:>8.2f}{row['memcpy_gb_per_s']:>13.2f}{row['of_memcpy']:>11.0%}"
        )
    return "\n".join(lines)


def _short(value_ms: float) -> str:
    return f"{value_ms:.2f}" if value_ms < 100 else f"{value_ms:.0f}"
