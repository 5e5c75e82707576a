"""A short soak: requests, cancellations and kills at once, on real processes. `make soak` runs the long ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from soak_cluster import grows

SCRIPT = Path(__file__).with_name("soak.py")


def test_what_grows_is_named() -> None:
    router = {"own_mib_first": 80.0, "own_mib_last": 90.0, "fds_first": 60.0, "fds_last": 70.0}
    young, old = {"own_mib": 70.0, "fds": 40.0}, {"own_mib": 75.0, "fds": 41.0}
    assert grows(router, {"young": young, "old": old}) == []
    assert grows(router | {"own_mib_last": 120.0}, {"young": young}) == ["router: memory from 80.0 to 120.0 MiB"]
    assert grows(router, {"young": young, "old": old | {"fds": 140.0}}) == ["workers: descriptors from 40 to 140"]


def test_killed_workers_and_cancelled_requests_leave_nothing_behind_and_no_request_is_lost() -> None:
    command = [sys.executable, str(SCRIPT), "--requests", "1500", "--kill-every-s", "2", "--seed", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    report = json.loads(ended.stdout)
    assert sum(report["kills"].values()) >= 1, "nothing was killed: the soak was too short to show anything"
    assert report["outcomes"]["canceled"] > 0
