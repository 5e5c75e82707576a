"""What control groups grant of the processors, in both versions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tandem.cluster import processors as module
from tandem.cluster.processors import processors, quota


def found(tmp_path: Path, membership: str, files: dict[str, str]) -> float:
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    own = tmp_path / "cgroup"
    own.write_text(membership)
    return quota(tmp_path / "groups", own)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/outside/pod7\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/../../pod7\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:cpu,cpuacct:/pod\n", {"cpu,cpuacct/pod/cpu.cfs_quota_us": "-1\n"}, math.inf),
        (
            "9:memory:/\n4:cpu,cpuacct:/pod\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"},
            2.0,
        ),
        ("0::/\n", {"cpu.max": "nonsense\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_tightest_grant_counts(tmp_path: Path, membership: str, files: dict[str, str], expected: float) -> None:
    assert found(tmp_path, membership, files) == expected


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path, tmp_path / "none") == math.inf


def test_a_quota_bounds_the_processors_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for granted, expected in ((math.inf, 8), (20.0, 8), (2.9, 2), (0.5, 1)):
        monkeypatch.setattr(module, "quota", lambda granted=granted: granted)
        assert processors() == expected
