"""Packed weights on disk: what was kept comes back, a damaged file is never computed with, the folder is bounded."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from tandem.cluster.engine.weight_cache import WeightCache

ARRAYS = {
    "layers.0.qkv": np.arange(100003, dtype=np.uint8),
    "norm": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    "shape": np.array(7, dtype=np.int64),
}


def file_of(folder: Path, key: str = "k") -> Path:
    (path,) = folder.glob(f"{key}.*")
    return path


def test_arrays_come_back_mapped_and_aligned(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "packed")
    assert cache.load("k") is None
    assert cache.save("k", ARRAYS)
    found = cache.load("k")
    assert found is not None
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].ctypes.data % 4096 == 0
        assert not found[name].flags.writeable
    assert [path.suffix for path in (tmp_path / "packed").iterdir()] == [".weights"]


@pytest.mark.parametrize("where", [0, 9, 40, 5000, -1])
def test_a_changed_byte_is_noticed(tmp_path: Path, where: int, caplog: pytest.LogCaptureFixture) -> None:
    cache = WeightCache(tmp_path)
    # The last array fills its page, so that the last byte is content, not padding.
    cache.save("k", {**ARRAYS, "tail": np.ones(8192, dtype=np.uint8)})
    content = bytearray(file_of(tmp_path).read_bytes())
    content[where] ^= 0x55
    file_of(tmp_path).write_bytes(content)
    assert cache.load("k") is None
    assert "are not used" in caplog.text


@pytest.mark.parametrize("size", [0, 3, 16, 100, 4096, 50000])
def test_a_file_that_is_cut_short_is_not_used(tmp_path: Path, size: int) -> None:
    cache = WeightCache(tmp_path)
    cache.save("k", ARRAYS)
    os.truncate(file_of(tmp_path), size)
    assert cache.load("k") is None
    assert cache.save("k", ARRAYS)
    assert cache.load("k") is not None


@pytest.mark.parametrize(("name", "value"), [("<f4", "<i4"), ("norm", "nomr")])
def test_a_digest_covers_names_and_types(tmp_path: Path, name: str, value: str) -> None:
    cache = WeightCache(tmp_path)
    cache.save("k", ARRAYS)
    content = file_of(tmp_path).read_bytes()
    assert content.count(name.encode()) == 1
    file_of(tmp_path).write_bytes(content.replace(name.encode(), value.encode()))
    assert cache.load("k") is None


def test_a_digest_covers_shapes(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    cache.save("k", ARRAYS)
    content = file_of(tmp_path).read_bytes()
    assert content.count(b"\x92\x03\x04") == 1  # msgpack's [3, 4]
    file_of(tmp_path).write_bytes(content.replace(b"\x92\x03\x04", b"\x92\x04\x03"))
    assert cache.load("k") is None


def test_a_file_of_another_version_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = WeightCache(tmp_path)
    cache.save("k", ARRAYS)
    file_of(tmp_path).write_bytes(b"TANDEMW1" + file_of(tmp_path).read_bytes()[8:])
    assert cache.load("k") is None
    assert "its head is not that of packed weights" in caplog.text


def test_what_a_dead_writer_left_goes(tmp_path: Path) -> None:
    dead, alive = tmp_path / "a.part", tmp_path / "b.part"
    for part in (dead, alive):
        part.write_bytes(b"half")
    os.utime(dead, (1, 1))
    assert WeightCache(tmp_path).save("k", ARRAYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.part", "k.weights"]


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not WeightCache(tmp_path).save("k", ARRAYS)
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in caplog.text


def test_the_files_that_were_not_used_for_longest_go(tmp_path: Path) -> None:
    WeightCache(tmp_path).save("k0", ARRAYS)
    cache = WeightCache(tmp_path, max_bytes=int(2.5 * file_of(tmp_path, "k0").stat().st_size))
    cache.save("k1", ARRAYS)
    os.utime(file_of(tmp_path, "k0"), (0, 0))
    os.utime(file_of(tmp_path, "k1"), (1, 1))
    assert cache.load("k0") is not None  # used just now
    cache.save("new", ARRAYS)
    assert len(list(tmp_path.iterdir())) == 2
    assert cache.load("k1") is None
    assert cache.load("k0") is not None


def test_a_model_larger_than_the_folder_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not WeightCache(tmp_path, max_bytes=1000).save("k", ARRAYS)
    assert "not kept" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert not WeightCache(tmp_path / "file" / "packed").save("k", ARRAYS)
    assert "cannot be kept" in caplog.text
