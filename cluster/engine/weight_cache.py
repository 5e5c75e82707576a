"""Packed weights on disk: what a model was packed into for one processor is kept, and mapped at the next start.

A file is `magic | header length u64 | header (msgpack) | padding | array | padding | array …`, arrays on whole pages,
so that kernels read them where they lie and workers of one machine share the memory. It is written under another name,
synced and renamed; the header's digest covers all arrays and is checked at every opening, so that a damaged file is
made anew, never computed with. The folder is bounded: the files that were not used for longest go, and so does what a
writer that died left behind.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

MAGIC = b"TANDEMW2"
MAX_BYTES = 16 * 2**30
"""Of all files together; a model that is larger is packed anew at every start."""
_PREFIX = struct.Struct("<8sQ")
_ALIGN = 4096
_MAX_HEADER_BYTES = 2**24
_SUFFIX, _PART_SUFFIX = ".weights", ".part"
_ABANDONED_S = 900.0
"""A part that nobody wrote to for so long has no writer any more."""

logger = logging.getLogger(__name__)
Arrays = Mapping[str, NDArray[Any]]


class WeightCache:
    """One folder of packed weights. Several processes may use it at once."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def load(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays kept under `key`, read-only views of a mapped file; None: there is no sound file of that name."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            arrays = _parse(mapped)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("packed weights %s are not used: %s", path, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return arrays

    def save(self, key: str, arrays: Arrays) -> bool:
        """Keeps `arrays` under `key`; False, with a warning, where the folder takes no file: it costs time, no more."""
        size_bytes = sum(array.nbytes for array in arrays.values())
        if size_bytes > self._max_bytes:
            logger.warning("packed weights of %d bytes are not kept: more than %d", size_bytes, self._max_bytes)
            return False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            _write(self._path(key), arrays)
        except OSError as error:
            logger.warning("packed weights cannot be kept in %s: %s", self._folder, error.strerror or error)
            return False
        self._forget_oldest()
        return True

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"

    def _remove_abandoned(self) -> None:
        with contextlib.suppress(OSError):  # another process may be at it as well
            for path in self._folder.glob(f"*{_PART_SUFFIX}"):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)

    def _forget_oldest(self) -> None:
        with contextlib.suppress(OSError):  # another process may be at it as well
            found = [(path.stat(), path) for path in self._folder.glob(f"*{_SUFFIX}")]
            found.sort(key=lambda pair: pair[0].st_mtime, reverse=True)
            total_bytes = 0
            for index, (facts, path) in enumerate(found):
                total_bytes += facts.st_size
                if index and total_bytes > self._max_bytes:
                    path.unlink(missing_ok=True)


def _write(path: Path, arrays: Arrays) -> None:
    """Under another name, synced, renamed. OSError: nothing is left of it."""
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:12]}{_PART_SUFFIX}")
    try:
        with part.open("xb") as file:
            for piece in _pieces(arrays):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _pieces(arrays: Arrays) -> list[Any]:
    """The file's content, in order."""
    contents = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    entries, offset = [], 0
    for name, array in contents.items():
        entries.append([name, array.dtype.str, list(array.shape), offset])
        offset += _padded(array.nbytes)
    header = msgpack.packb({"arrays": entries, "bytes": offset, "digest": _digest(contents)})
    start = _padded(_PREFIX.size + len(header))
    pieces: list[Any] = [(_PREFIX.pack(MAGIC, len(header)) + header).ljust(start, b"\0")]
    for array in contents.values():
        pieces += [array.reshape(-1).view(np.uint8).data, bytes(_padded(array.nbytes) - array.nbytes)]
    return pieces


def _parse(mapped: mmap.mmap) -> dict[str, NDArray[Any]]:
    """The arrays of a file. Raises ValueError where it is not what `_pieces` makes."""
    whole = memoryview(mapped)
    if len(whole) < _PREFIX.size:
        raise ValueError("it is too short")
    magic, header_bytes = _PREFIX.unpack(whole[: _PREFIX.size])
    if magic != MAGIC or header_bytes > min(_MAX_HEADER_BYTES, len(whole) - _PREFIX.size):
        raise ValueError("its head is not that of packed weights")
    try:
        header = msgpack.unpackb(whole[_PREFIX.size : _PREFIX.size + header_bytes])
        start, arrays = _padded(_PREFIX.size + header_bytes), {}
        if len(whole) != start + header["bytes"]:
            raise ValueError("it is cut short")
        for name, dtype, shape, offset in header["arrays"]:
            count = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(whole, np.dtype(dtype), count, start + offset).reshape(shape)
        digest = header["digest"]
    except (msgpack.UnpackException, KeyError, TypeError) as error:
        raise ValueError(f"its header cannot be read ({error})") from None
    if _digest(arrays) != digest:
        raise ValueError("its content is damaged")
    return arrays


def _digest(arrays: Arrays) -> bytes:
    hashed = xxhash.xxh3_128()
    for name, array in arrays.items():
        hashed.update(repr((name, array.dtype.str, array.shape)).encode())
        hashed.update(array.reshape(-1).view(np.uint8).data)
    return hashed.digest()


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN) * _ALIGN
