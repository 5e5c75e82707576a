"""Lets the tests import this folder's own modules, and the files that predictions are made from."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the folder's own modules

from validate_cases import PROFILE


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "lengths.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arrival_s", "input_tokens", "output_tokens"])
        writer.writerows([["", 50 + 7 * number % 90, 5 + 3 * number % 20] for number in range(100)])
    return str(path)


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    PROFILE.save(tmp_path / "steps.json")
    return tmp_path / "steps.json"
