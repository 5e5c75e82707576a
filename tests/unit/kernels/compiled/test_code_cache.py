"""Compiled code on disk: found again, never believed where it is not what was written, never a reason not to start."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from tandem.kernels.compiled import code_cache, file_lock
from tandem.kernels.compiled.code_cache import CodeCache, once, prune
from tandem.kernels.compiled.compiling import telling
from tandem.kernels.compiled.file_lock import alone


def triple(x):  # type: ignore[no-untyped-def]
    return 3 * x


def quadruple(x):  # type: ignore[no-untyped-def]
    return 4 * x


def compiled(folder: Path, function: Callable[..., Any] = triple) -> Any:
    """`function` as a fresh process would have it."""
    dispatcher = numba.njit(function)
    dispatcher._cache = CodeCache(function, folder)
    return dispatcher


def code_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.code"))


def hits(dispatcher: Any) -> int:
    return sum(dispatcher.stats.cache_hits.values())


def test_code_is_found_again_by_signature(tmp_path: Path) -> None:
    first = compiled(tmp_path / "code")
    assert (first(2), first(2.5), hits(first)) == (6, 7.5, 0)
    assert len(code_files(tmp_path / "code")) == 2
    again = compiled(tmp_path / "code")
    assert (again(3), again(1.5), hits(again)) == (9, 4.5, 2)


def test_what_is_compiled_is_told_and_what_was_kept_is_not(tmp_path: Path) -> None:
    told: list[str] = []
    with telling(lambda: told.append("compiles")):
        compiled(tmp_path)(2)
        assert told == ["compiles"]
        compiled(tmp_path)(2)
        assert told == ["compiles"]
        (path,) = code_files(tmp_path)
        path.write_bytes(b"")
        compiled(tmp_path)(2)
    compiled(tmp_path)(2.5)
    assert told == ["compiles", "compiles"]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "garbage", "foreign version", "another kernel's"])
def test_what_is_not_what_was_written_is_compiled_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(tmp_path)(2)
    (path,) = code_files(tmp_path)
    content = path.read_bytes()
    compiled(tmp_path / "other", quadruple)(2)
    other = code_files(tmp_path / "other")[0].read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "flipped": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
            "garbage": b"\x80\x04" * 3000,
            "foreign version": b"TANDEMC0" + content[8:],
            "another kernel's": other,
        }[damage]
    )
    dispatcher = compiled(tmp_path)
    assert (dispatcher(5), hits(dispatcher)) == (15, 0)
    assert "is not used" in caplog.text
    assert path.read_bytes()[:8] == code_cache.MAGIC
    healed = compiled(tmp_path)
    assert (healed(5), hits(healed)) == (15, 1)


def test_objects_that_cannot_be_rebuilt_are_compiled_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sound by its digest, and yet nothing that this numba can read."""
    compiled(tmp_path)(2)
    (path,) = code_files(tmp_path)
    payload = b"cno_such_module\nno_such_class\n."
    path.write_bytes(code_cache.MAGIC + code_cache._digest(path.name, payload) + payload)
    assert compiled(tmp_path)(2) == 6
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_costs_one_warning(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(tmp_path)(2)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(code_cache, "_write", refuse)
    dispatcher = compiled(tmp_path)
    assert (dispatcher(2), hits(dispatcher)) == (6, 1)  # what is there is used
    assert compiled(tmp_path)(2.5) == 7.5
    assert compiled(tmp_path, quadruple)(2.5) == 10
    assert caplog.text.count("cannot be kept") == 1
    assert os.strerror(code) in caplog.text


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", refuse)
    assert compiled(tmp_path)(2) == 6
    assert [path.name for path in tmp_path.iterdir()] == [".used"]


def test_a_lax_umask_does_not_turn_the_cache_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = os.umask(0o002)
    try:
        compiled(tmp_path)(2)
    finally:
        os.umask(before)
    assert compiled(tmp_path)(2) == 6
    assert "is not used" not in caplog.text
    [path] = tmp_path.glob("*.code")
    path.chmod(0o664)
    assert compiled(tmp_path)(2) == 6
    assert "can be written by others" in caplog.text


def test_no_folder_is_made_where_none_can_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert compiled(tmp_path / "file" / "code")(2) == 6
    assert "cannot be kept" in caplog.text


def test_old_folders_go_and_used_ones_stay(tmp_path: Path) -> None:
    names = [f"avx2-{age:016x}" for age in range(6)]
    (tmp_path / "of somebody else").mkdir()
    for age, name in enumerate(names):
        (tmp_path / name / "sub").mkdir(parents=True)
        used = tmp_path / name / ".used"
        used.touch()
        os.utime(used, (1000 - age, 1000 - age))
    with (tmp_path / names[4] / ".used").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        removed = prune(tmp_path, keep=2)
    assert {path.name for path in removed} == {names[2], names[3], names[5]}
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[1], names[4], "of somebody else"]
    assert prune(tmp_path / "missing") == []


def test_the_first_use_compiles_alone_and_later_ones_lock_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    held = []
    for _ in range(2):
        with once(folder, "step"):
            probe = (folder / ".step.lock").open()
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(False)
            except BlockingIOError:
                held.append(True)
            probe.close()
    assert held == [True, False]


def test_a_body_that_fails_is_not_done(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"), once(tmp_path, "step"):
            raise RuntimeError("no")
    assert not (tmp_path / ".step.done").exists()


def test_who_waits_too_long_goes_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "ALONE_S", 0.1)
    waits: list[int] = []
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with alone(tmp_path / "lock", lambda: waits.append(1)):
            assert waits


_TWO = """
import sys, numba
from pathlib import Path
from tandem.kernels.compiled.code_cache import CodeCache, once

def heavy(x):
    total = 0.0
    for i in range(10):
        total += x * i
    return total

folder = Path(sys.argv[1])
dispatcher = numba.njit(heavy)
dispatcher._cache = CodeCache(heavy, folder)
with once(folder, "heavy"):
    assert dispatcher(2.0) == 90.0
print(sum(dispatcher.stats.cache_hits.values()))
"""


def test_of_two_cold_processes_one_compiles(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_TWO)
    command = [sys.executable, str(script), str(tmp_path / "code")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate(timeout=120)[0].strip() for process in both) == ["0", "1"]
    assert len(code_files(tmp_path / "code")) == 1
