"""How far apart frames of commands leave: only where the router's process has no time to spare."""

from __future__ import annotations

import pytest
from tandem.router.pace import BUSY_SHARE, LONGER_S, MAX_GAP_S, SHORTER_S, WINDOW_S, Pace


class Process:
    """A process and its frames, in virtual time."""

    def __init__(self) -> None:
        self.now_s = self.cpu_s = 100.0
        self.asked = 0
        self.pace = Pace(self.now_s, self._cpu)

    def _cpu(self) -> float:
        self.asked += 1
        return self.cpu_s

    def run(self, windows: int, busy: float, frames: int = 1) -> float:
        """So many windows at that share of a core, with so many frames in each; the gap at their end."""
        step_s = 1.01 * WINDOW_S / frames
        for _ in range(windows * frames):
            self.now_s += step_s
            self.cpu_s += busy * step_s
            self.pace.left(self.now_s)
        return self.pace.gap_s


def test_a_router_with_time_to_spare_sends_at_once() -> None:
    assert Process().run(100, BUSY_SHARE - 0.01) == 0.0


def test_the_gap_grows_with_every_busy_window_up_to_a_bound() -> None:
    process = Process()
    assert process.run(2, 1.0) == pytest.approx(2 * LONGER_S)
    assert process.run(100, 1.0) == MAX_GAP_S


def test_the_gap_shrinks_as_soon_as_there_is_time_to_spare_and_is_gone_soon() -> None:
    process = Process()
    process.run(100, 1.0)
    assert process.run(1, 0.5) == pytest.approx(MAX_GAP_S - SHORTER_S)
    assert process.run(round(MAX_GAP_S / SHORTER_S), 0.5) == 0.0


def test_many_frames_count_once_a_window_and_ask_the_system_as_often() -> None:
    process = Process()
    assert process.run(4, 1.0, frames=50) == pytest.approx(4 * LONGER_S)
    assert process.asked == 1 + 4


def test_more_than_one_core_is_busy_too() -> None:
    assert Process().run(1, 1.7) == LONGER_S
