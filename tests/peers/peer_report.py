"""What the measurements add up to: medians with spread, ratios to ours, and reasons where there are none."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from contenders import CONTENDERS

_WIDTH = 21


@dataclass(frozen=True, slots=True)
class Cell:
    """Sequences at once, and the tokens of each one's prompt."""

    batch: int
    prompt: int

    @property
    def text(self) -> str:
        """As the table shows it."""
        return f"{self.batch} x {self.prompt}"


@dataclass(slots=True)
class Results:
    """Everything that was measured, by (contender, threads, cell)."""

    steps: int
    times: dict[tuple[str, int, Cell], list[dict[str, Any]]] = field(default_factory=dict)
    skipped: dict[tuple[str, int, Cell], str] = field(default_factory=dict)
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)
    loads: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, threads: int, cell: Cell, answer: dict[str, Any]) -> None:
        """One measurement (`peer_runner.measure`)."""
        self.times.setdefault((name, threads, cell), []).append(answer)

    def skip(self, name: str, threads: int, cell: Cell, reason: str) -> None:
        """A cell that this contender is not asked for any more."""
        self.skipped[name, threads, cell] = reason

    def is_skipped(self, name: str, threads: int, cell: Cell) -> bool:
        """Whether `skip` was called."""
        return (name, threads, cell) in self.skipped

    def unavailable(self, name: str, threads: int, reason: str) -> None:
        """A contender that does not run, or no longer."""
        self.reasons[name, threads] = reason

    def ready(self, name: str, threads: int, facts: dict[str, Any]) -> None:
        """What a contender said when it had loaded."""
        self.loads[name, threads] = facts

    def took_s(self, name: str, threads: int, cell: Cell) -> float | None:
        """Seconds of the longest measurement of a cell so far; None: there is none."""
        answers = self.times.get((name, threads, cell), [])
        return max((answer["prefill_s"] + sum(answer["decode_s"]) for answer in answers), default=None)

    def forecast_s(self, name: str, threads: int, cell: Cell) -> float | None:
        """Seconds that its prefill would take at the best rate seen so far; None: nothing was seen."""
        seen = [(key[2], answers[0]) for key, answers in self.times.items() if key[:2] == (name, threads)]
        if not seen or (name, threads, cell) in self.times:
            return None
        rate = max(c.batch * c.prompt / answer["prefill_s"] for c, answer in seen)
        return cell.batch * cell.prompt / rate

    def prefill(self, name: str, threads: int, cell: Cell) -> list[float]:
        """Tokens per second of each round."""
        answers = self.times.get((name, threads, cell), [])
        return [cell.batch * cell.prompt / answer["prefill_s"] for answer in answers]

    def decode_ms(self, name: str, threads: int, cell: Cell, which: str = "decode_s") -> list[float]:
        """Median milliseconds of a step of the whole batch, of each round."""
        return [1e3 * statistics.median(answer[which]) for answer in self.times.get((name, threads, cell), [])]

    def as_json(self) -> dict[str, Any]:
        """Everything, flat."""
        rows = [
            {"contender": name, "threads": threads, "batch": cell.batch, "prompt": cell.prompt, "rounds": answers}
            for (name, threads, cell), answers in self.times.items()
        ]
        skipped = [
            {"contender": name, "threads": threads, "batch": cell.batch, "prompt": cell.prompt, "reason": reason}
            for (name, threads, cell), reason in self.skipped.items()
        ]
        missing = [{"contender": n, "threads": t, "reason": reason} for (n, t), reason in self.reasons.items()]
        loads = [{"contender": n, "threads": t, **facts} for (n, t), facts in self.loads.items()]
        return {"steps": self.steps, "rows": rows, "skipped": skipped, "unavailable": missing, "loads": loads}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Results:
        """What `as_json` wrote, but for contenders that did not run: they are tried again. ValueError."""
        try:
            found = cls(steps=saved["steps"])
            for row in saved["rows"]:
                found.times[row["contender"], row["threads"], Cell(row["batch"], row["prompt"])] = row["rounds"]
            for row in saved["skipped"]:
                found.skip(row["contender"], row["threads"], Cell(row["batch"], row["prompt"]), row["reason"])
            for load in saved["loads"]:
                found.ready(load.pop("contender"), load.pop("threads"), load)
            return found
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no saved comparison ({error!r})") from None


def render(results: Results, threads: int) -> str:
    """Tables for one thread count: prefill, decode, processor time of decode, loading, and what is missing and why."""
    shown = [c.name for c in CONTENDERS if (c.name, threads) in results.loads or (c.name, threads) in results.reasons]
    keys = {key[2]: None for key in [*results.times, *results.skipped] if key[1] == threads}
    cells = sorted(keys, key=lambda cell: (cell.prompt, cell.batch))
    plural = "s" if threads > 1 else ""
    lines = [f"\n{threads} thread{plural}, median (lowest … highest) of the rounds; x: how much better ours is"]
    for title, of, higher in (
        ("prefill, tokens/s", results.prefill, True),
        ("decode, ms per step of the batch", results.decode_ms, False),
    ):
        lines += ["", f"{title:<26}" + "".join(f"{cell.text:>{_WIDTH + 7}}" for cell in cells)]
        for name in shown:
            row = [_cell(of(name, threads, cell), _ours(results, of, name, threads, cell), higher) for cell in cells]
            lines.append(f"{name:<26}" + "".join(f"{text:>{_WIDTH + 7}}" for text in row))
    title = "decode, processor ms"
    lines += ["", f"{title:<26}" + "".join(f"{cell.text:>{_WIDTH + 7}}" for cell in cells)]
    for name in shown:
        row = [_cell(results.decode_ms(name, threads, cell, "decode_cpu_s"), None, False) for cell in cells]
        lines.append(f"{name:<26}" + "".join(f"{text:>{_WIDTH + 7}}" for text in row))
    lines.append("")
    for name in shown:
        load = results.loads.get((name, threads))
        if load is not None:
            versions = ", ".join(f"{what} {version}" for what, version in load["versions"].items())
            rss = max(
                [
                    a["rss_bytes"]
                    for key, answers in results.times.items()
                    if key[:2] == (name, threads)
                    for a in answers
                ],
                default=load["rss_bytes"],
            )
            lines.append(f"{name:<26}ready after {load['process_ready_s']:.1f} s, {rss / 2**30:.2f} GiB; {versions}")
        if (name, threads) in results.reasons:
            lines.append(f"{name:<26}cannot run: {results.reasons[name, threads]}")
    for (name, count, cell), reason in results.skipped.items():
        if count == threads:
            lines.append(f"{name:<26}{cell.text}: left out: {reason}")
    return "\n".join(lines)


def _ours(results: Results, of: Any, name: str, threads: int, cell: Cell) -> float | None:
    """The median of the form of ours that `name` is held against; None for our own rows."""
    (contender,) = [c for c in CONTENDERS if c.name == name]
    if contender.engine == "tandem":
        return None
    found = of(f"tandem {contender.against}", threads, cell)
    return statistics.median(found) if found else None


def _cell(values: list[float], ours: float | None, higher: bool) -> str:
    if not values:
        return "-"
    median = statistics.median(values)
    places = 0 if median >= 100 else 1
    text = f"{median:.{places}f} ({min(values):.{places}f} … {max(values):.{places}f})"
    if ours is None:
        return text
    return f"{text} {ours / median if higher else median / ours:>5.2f}x"
