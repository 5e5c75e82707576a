"""The fingerprint that names a model's KV: two workers exchange KV only where theirs are equal."""

from __future__ import annotations

import hashlib
from pathlib import Path

import xxhash

from ..models.reference import ModelFiles
from .narrow_kv import NarrowKV

_FULL_HASH_BYTES = 2**30
_SAMPLE_BYTES = 2**20
_SAMPLES = 64


def fingerprint(
    files: ModelFiles, dtype: str, quantization: str | None = None, narrow_kv: NarrowKV | None = None
) -> str:
    """Hex digest of everything that decides a token's KV: weights, architecture with its rope facts, precision, and
    what narrow KV is held by.

    Files below 1 GiB are hashed whole; of larger ones the size, the first MiB (safetensors and GGUF keep their headers
    there) and 64 stretches of 1 MiB spread evenly. It names files that are the same, not files that an adversary made.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(("tandem-kv-1", files.kind, files.config, dtype, quantization)).encode())
    if narrow_kv is not None:
        digest.update(repr((narrow_kv.dtype, narrow_kv.digest())).encode())
    if files.kind == "dummy":
        return digest.hexdigest()
    for path in _weight_files(files):
        digest.update(_content_hash(path))
    return digest.hexdigest()


def weights_stamp(files: ModelFiles) -> str:
    """Hex digest of every weight file's name, size and time of change: tells apart, on one machine, what `fingerprint`
    does not read.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in [] if files.kind == "dummy" else _weight_files(files):
        facts = path.stat()
        digest.update(repr((path.name, facts.st_size, facts.st_mtime_ns)).encode())
    return digest.hexdigest()


def _weight_files(files: ModelFiles) -> list[Path]:
    assert files.path is not None
    return sorted(files.path.glob("*.safetensors")) if files.path.is_dir() else [files.path]


def _content_hash(path: Path) -> bytes:
    size_bytes = path.stat().st_size
    hashed = xxhash.xxh3_128(size_bytes.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size_bytes <= _FULL_HASH_BYTES:
            while piece := file.read(_SAMPLE_BYTES):
                hashed.update(piece)
        else:
            for sample in range(_SAMPLES + 1):
                file.seek((size_bytes - _SAMPLE_BYTES) * sample // _SAMPLES)
                hashed.update(file.read(_SAMPLE_BYTES))
    return hashed.digest()
