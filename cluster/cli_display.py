"""What the commands print: progress where a person watches; plain lines, without control characters, in logs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID

    Report = Callable[[str, str, float | None], None]


class Display:
    """Lines and steps on one stream. `live` follows from the stream being a terminal."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.live = self._stream.isatty()
        self._progress: Progress | None = None

    def line(self, text: str = "") -> None:
        """Prints one or more lines as they are, so that they can be copied; above the steps where some are shown."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        print(text, file=self._stream, flush=True)

    def piece(self, text: str) -> None:
        """Prints a part of a line, for text that comes bit by bit."""
        print(text, end="", file=self._stream, flush=True)

    @contextmanager
    def steps(self, *, remaining: bool = False) -> Iterator[Report]:
        """Shows steps while inside: call what it gives with (who, what, share done or None). `remaining`: also the time
        that is left.
        """
        if not self.live:
            yield _PlainSteps(self._stream)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(file=self._stream, highlight=False)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[who]}", markup=False),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            *([TextColumn("left"), TimeRemainingColumn(compact=True)] if remaining else []),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            self._progress = progress
            try:
                yield _LiveSteps(progress)
            finally:
                self._progress = None

    @contextmanager
    def count(self, who: str, total: int) -> Iterator[Callable[[], None]]:
        """Shows how many of `total` are done: call what it gives once for each."""
        done = 0
        with self.steps() as report:

            def advance() -> None:
                nonlocal done
                done += 1
                if self.live or 4 * done >= total:  # a log's first line is that of the first quarter
                    report(who, f"{done} of {total}" if self.live else "done", done / total)

            yield advance


class _LiveSteps:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, who: str, what: str, share: float | None) -> None:
        task = self._tasks.get(who)
        if task is None:
            task = self._tasks[who] = self._progress.add_task(what, total=None, who=who)
        if what == "ready":
            share = 1.0
        total = None if share is None else 1.0
        self._progress.update(task, description=what, total=total, completed=share or 0.0)


class _PlainSteps:
    """A line for each new step, and for each further quarter of one."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._shown: dict[str, tuple[str, int]] = {}

    def __call__(self, who: str, what: str, share: float | None) -> None:
        quarters = 0 if share is None else int(share * 4)
        before = self._shown.get(who)
        if before is not None and before[0] == what and quarters <= before[1]:
            return
        self._shown[who] = (what, quarters)
        percent = f" {quarters * 25}%" if quarters else ""
        print(f"{who}: {what}{percent}", file=self._stream, flush=True)
