"""Where measured data that is not in the repository lies: `TANDEM_PAPER_DATA`, or `../shared/data` beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with `measured/` and `workloads/`; skips where there is none."""
    folder = Path(os.environ.get("TANDEM_PAPER_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    if not (folder / "measured").is_dir():
        pytest.skip(f"no measured data in {folder}; TANDEM_PAPER_DATA names the folder")
    return folder
