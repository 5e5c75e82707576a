"""Text files that a benchmark reads, gzipped or not: bounded, so that a small file cannot unpack to gigabytes."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 512 * 2**20
"""Unpacked."""


def numbered_lines(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> Iterator[tuple[int, str]]:
    """Line number from 1 and text of every line that is not blank. Raises ValueError naming the file."""
    file = Path(path)
    number = size_bytes = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            while line := stream.readline(max_bytes - size_bytes + 1):
                number += 1
                size_bytes += len(line)
                if size_bytes > max_bytes:
                    raise ValueError(f"dataset_path: {str(file)!r} is over {max_bytes} bytes")
                text = line.decode("utf-8").strip()
                if text:
                    yield number, text
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"dataset_path: {str(file)!r} cannot be read ({why})") from None


def parse_json(text: str, where: str) -> Any:
    """A line's JSON. Raises ValueError naming the line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset_path: {where} is not JSON ({error})") from None
