"""What `dispatch` decided. Loads nothing: those who only carry it load no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picked:
    """Who computes, and why."""

    kernels: str
    """`compiled`, `triton`, `torch`, `reference`, or `none` on a device that computes nothing."""
    reason: str
    """One line for people."""
