"""A pytest plugin (`-p outcomes`): what comes of each test, appended as JSON lines to the file that TANDEM_GPU_OUTCOMES
names as it comes, so that a process that is killed leaves what it has found. `run.py` reads it.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest


def _write(**entry: Any) -> None:
    with open(os.environ["TANDEM_GPU_OUTCOMES"], "a") as file:
        file.write(json.dumps(entry) + "\n")


def _told(report: Any) -> str:
    """What went wrong, in a line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:400]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if not report.passed:
        _write(test=report.nodeid, outcome=report.outcome, message=_told(report))


def pytest_collection_finish(session: pytest.Session) -> None:
    _write(collected=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(begun=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        message = "" if report.passed or report.skipped else _told(report)
        _write(test=report.nodeid, outcome=report.outcome, message=message)
