"""The file by which an operator's commands find a running cluster: who can read it, when it counts, when it goes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.cluster.config import SecurityConfig
from tandem.cluster.launch import runtime_file
from tandem.cluster.launch.runtime_file import RunningCluster

SECRET = "0123456789abcdef0123456789abcdef"
HERE = RunningCluster(
    http="127.0.0.1:8000",
    grpc="127.0.0.1:8001",
    registry="127.0.0.1:8002",
    security=SecurityConfig(secret=SECRET),
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "tandem"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    return process.pid


def test_what_is_written_is_found_by_address() -> None:
    path = runtime_file.write(HERE)
    assert runtime_file.find("http://127.0.0.1:8000") == HERE
    assert runtime_file.find("http://localhost:8000/") == HERE
    assert runtime_file.find() == HERE
    assert runtime_file.find("http://127.0.0.1:8003") is None
    assert runtime_file.find("http://192.0.2.1:8000") is None
    assert runtime_file.find("http://127.0.0.1:notaport") is None
    runtime_file.remove(path)
    runtime_file.remove(path)
    assert runtime_file.find() is None


def test_only_the_owner_can_read_it(home: Path) -> None:
    home.mkdir(mode=0o755)
    path = runtime_file.write(HERE)
    assert path.parent == home
    assert home.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(home.iterdir()) == [path], "nothing half-written is left"


def test_the_newest_of_several_is_found() -> None:
    runtime_file.write(HERE)
    newer = replace(HERE, http="127.0.0.1:9000", registry="127.0.0.1:9002", since_unix_s=HERE.since_unix_s + 1)
    runtime_file.write(newer)
    assert runtime_file.find() == newer
    assert runtime_file.find("http://127.0.0.1:8000") == HERE


def test_a_cluster_whose_process_is_gone_is_passed_over_and_swept() -> None:
    gone = runtime_file.write(replace(HERE, pid=dead_pid()))
    assert gone.exists(), "it was written after the sweep"
    assert runtime_file.find() is None
    runtime_file.write(HERE)
    assert not gone.exists()
    assert runtime_file.running() == (HERE,)


def test_another_process_under_the_same_number_is_not_taken_for_it() -> None:
    path = runtime_file.write(replace(HERE, started_ticks=HERE.started_ticks - 1))
    assert runtime_file.find() is None
    runtime_file.sweep()
    assert not path.exists()


def test_files_of_other_machines_are_left_alone() -> None:
    path = runtime_file.write(replace(HERE, node="elsewhere", pid=dead_pid()))
    runtime_file.write(HERE)
    assert path.exists()
    assert runtime_file.running() == (HERE,)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"http": 1}', "\xff", '{"pid": "x"}'])
def test_what_is_no_such_file_is_ignored(home: Path, text: str) -> None:
    home.mkdir()
    (home / "1-2.json").write_bytes(text.encode("latin-1"))
    runtime_file.write(HERE)
    assert runtime_file.running() == (HERE,)


def test_a_file_that_others_could_have_written_is_ignored() -> None:
    path = runtime_file.write(HERE)
    path.chmod(0o666)
    assert runtime_file.find() is None


def test_without_a_runtime_folder_it_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    assert runtime_file.write(HERE).parent == tmp_path / "cache" / "run"
    assert runtime_file.find() == HERE


def test_the_secret_does_not_show_where_the_object_does() -> None:
    assert SECRET not in repr(HERE)


def test_this_process_is_alive() -> None:
    assert HERE.pid == os.getpid()
    assert HERE.alive
    assert not replace(HERE, pid=dead_pid()).alive
