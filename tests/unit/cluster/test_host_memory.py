"""What a machine, or a control group, says of its memory."""

from __future__ import annotations

from pathlib import Path

from tandem.cluster.host_memory import available_bytes, total_bytes

MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\n"


def written(folder: Path, **values: str) -> dict[str, Path]:
    (folder / "meminfo").write_text(MEMINFO)
    for name, text in values.items():
        (folder / f"memory.{name}").write_text(text + "\n")
    return {"meminfo": folder / "meminfo", "group": folder}


def test_a_machine_says_what_it_has_and_what_is_left(tmp_path: Path) -> None:
    where = written(tmp_path)
    assert (total_bytes(**where), available_bytes(**where)) == (16000 * 1024, 9000 * 1024)


def test_a_control_group_may_allow_less(tmp_path: Path) -> None:
    where = written(tmp_path, max="2000000", current="500000")
    assert (total_bytes(**where), available_bytes(**where)) == (2_000_000, 1_500_000)
    where = written(tmp_path, max="2000000", current="2100000")
    assert available_bytes(**where) == 0
    where = written(tmp_path, max="max", current="500000")
    assert (total_bytes(**where), available_bytes(**where)) == (16000 * 1024, 9000 * 1024)


def test_where_nothing_is_said_nothing_is_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) == total_bytes(tmp_path / "none", tmp_path) == 0
