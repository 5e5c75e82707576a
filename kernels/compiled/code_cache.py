"""Compiled code on disk: one file per kernel and signature, checked before it runs.

numba's own cache lies elsewhere where its folder cannot be written (beside the sources, in the user's cache), fails a
start on a full disk, and believes what it reads. This one keeps to its folder: it reads it even where it cannot write
there; what cannot be kept costs a warning and the next start's time; a file that is not what was written, or is of
another kernel, is compiled anew. Several processes may use a folder at once: a file is written under another name and
renamed, and never belongs to two kernels.

A folder is of one version of the kernels and one processor. Who uses it holds a shared lock (`hold`), so that `prune`
removes no folder in use; `once` lets one process compile while the others wait for what it makes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import pickle
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from .compiling import told
from .file_lock import Wait, alone

MAGIC = b"TANDEMC1"
KEPT_FOLDERS = 8
"""Folders of compiled code that `prune` leaves: the last used ones. One is 2 to 3 MB."""
_DIGEST_BYTES = 16
_IN_USE = ".used"
_SUFFIX = ".code"
_OURS = re.compile(r"[a-z0-9_]+-[0-9a-f]{16}")
"""What `target.code_folder` is called."""

logger = logging.getLogger(__name__)


class CodeCache(NullCache):  # type: ignore[misc]  # numba has no types
    """What numba's compiler asks for one function's code: `load_overload` before it compiles, `save_overload` after."""

    def __init__(self, function: Callable[..., Any], folder: Path, form: str = "") -> None:
        """`form`: tells two compilations of one function and signature apart (called from Python, from outside)."""
        self._function = function
        self._folder = folder
        self._form = form

    @property
    def cache_path(self) -> str:
        """The folder, as numba's statistics name it."""
        return str(self._folder)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function; None: it must be compiled."""
        target_context.refresh()
        hold(self._folder)
        path = self._path(sig, target_context.codegen())
        try:
            payload = _checked(_read_own(path), path.name)
            return CompileResult._rebuild(target_context, *pickle.loads(payload))
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever unpickling a foreign version's objects raises
            logger.warning("compiled code %s is not used: %s: %s", path, type(error).__name__, error)
        told()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps a compiled function, where that can be done."""
        if data.lifted or data.library.has_dynamic_globals:
            return  # holds this process's addresses
        payload = dumps(data._reduce())
        path = self._path(sig, data.library.codegen)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(path, MAGIC + _digest(path.name, payload) + payload)
        except OSError as error:
            _warn_once(self._folder, error.strerror or str(error))

    def _path(self, sig: Any, codegen: Any) -> Path:
        """Names everything that decides the code and is not in the folder's name."""
        function = self._function
        code = function.__code__
        cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        digest = hashlib.blake2b(digest_size=12)
        for part in (str(sig), repr(codegen.magic_tuple()), self._form, function.__module__, function.__qualname__):
            digest.update(part.encode() + b"\0")
        for content in (str(code.co_firstlineno).encode(), code.co_code, _source_digest(code.co_filename)):
            digest.update(content)
        digest.update(dumps(cells))
        return self._folder / f"{function.__name__.strip('_')}-{digest.hexdigest()}{_SUFFIX}"


@functools.cache
def _source_digest(path: str) -> bytes:
    with suppress(OSError):
        return hashlib.blake2b(Path(path).read_bytes()).digest()
    return b""


def _digest(name: str, payload: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(name.encode() + b"\0", digest_size=_DIGEST_BYTES)
    digest.update(payload)
    return digest.digest()


def _read_own(path: Path) -> bytes:
    """The file's content. ValueError where others could have written it: it is code, and will run."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid not in (0, os.getuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"the file is owned by user {found.st_uid} or can be written by others")
        return file.read()


def _checked(content: bytes, name: str) -> memoryview:
    """What was kept in the file `name`. ValueError where it is not what `save_overload` writes under that name."""
    start = len(MAGIC) + _DIGEST_BYTES
    payload = memoryview(content)[start:]
    if content[: len(MAGIC)] != MAGIC or content[len(MAGIC) : start] != _digest(name, payload):
        raise ValueError("the file is damaged")
    return payload


def _write(path: Path, content: bytes) -> None:
    """Under another name, then renamed. Not synced: what a crash leaves of it is noticed by its digest. No group may
    write it, whatever the umask: it would not be read again.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@functools.cache
def _warn_once(folder: Path, why: str) -> None:
    logger.warning("compiled code cannot be kept in %s: %s; every start compiles it anew", folder, why)


@functools.cache
def hold(folder: Path) -> None:
    """Marks a folder as used, now and until this process ends, where that can be done."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)  # closed by the end
        os.utime(folder / _IN_USE)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def prune(root: Path, keep: int = KEPT_FOLDERS) -> list[Path]:
    """Removes the folders of code under `root` that were not used for longest, all but `keep`, and none that is in use
    or is named otherwise.

    Returns those that were removed.
    """

    def used_at(folder: Path) -> float:
        for path in (folder / _IN_USE, folder):
            with suppress(OSError):
                return path.stat().st_mtime
        return 0.0

    removed = []
    with suppress(OSError):
        ours = (path for path in root.iterdir() if _OURS.fullmatch(path.name) and not path.is_symlink())
        folders = sorted((path for path in ours if path.is_dir()), key=used_at, reverse=True)
        for folder in folders[keep:]:
            if _remove_unused(folder):
                removed.append(folder)
    return removed


def _remove_unused(folder: Path) -> bool:
    with ExitStack() as stack:
        try:
            handle = stack.enter_context((folder / _IN_USE).open("rb"))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass  # of a version that held nothing
        except OSError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return True


@contextmanager
def once(folder: Path, what: str, wait: Wait | None = None) -> Iterator[None]:
    """The body compiles `what` into `folder`: one process of this machine at a time, until one has done it.

    Then nobody waits for anybody, and nothing is locked.
    """
    done = folder / f".{what}.done"
    if done.exists():
        yield
        return
    with alone(folder / f".{what}.lock", wait):
        yield
    with suppress(OSError):
        done.touch()
        prune(folder.parent)
