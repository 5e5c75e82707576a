"""What a target of the fuzzer is, and how parsers of files are fed."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/dev/shm")
SCRATCH = "TANDEM_FUZZ_SCRATCH"


@dataclass(frozen=True)
class Target:
    """One parser."""

    run: Callable[[bytes], object]
    allowed: tuple[type[BaseException], ...]
    seeds: tuple[bytes, ...]


@functools.cache
def scratch() -> Path:
    """A folder in memory where there is one, for parsers that read files; in the long run its parent's."""
    given = os.environ.get(SCRATCH)
    if given:
        return Path(given)
    folder = Path(tempfile.mkdtemp(prefix="tandem-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_file(name: str, run: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A parser of a file, fed with bytes."""

    def fed(data: bytes) -> object:
        path = scratch() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return run(path)

    return fed


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()
