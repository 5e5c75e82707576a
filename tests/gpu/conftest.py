"""Marks of these tests, under whatever configuration they run."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: looks at the device's memory as a whole (run.py)")
