"""Reads GGUF files: metadata, tokenizer and where each tensor lies. Tensor bytes stay mapped until they are asked for.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The walk over
the header is ours rather than `gguf.GGUFReader`'s: that one makes several numpy views per vocabulary entry (seconds for
49,152 tokens, in each of three processes) and reads past the end of a truncated file without noticing. Block sizes,
type numbers and dequantization are the `gguf` library's. Every problem with a file is a `ModelError` that says why.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import numpy.typing as npt

from .errors import ModelError

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
MAX_ARRAY_DEPTH = 4
MAX_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies. `shape` is row-major as torch has it (GGUF stores the innermost dimension first)."""

    name: str
    shape: tuple[int, ...]
    type: ggml.GGMLQuantizationType
    offset_bytes: int
    """From the start of the file."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """One open file: `metadata` as plain Python values, `tensors` by name."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: npt.NDArray[np.uint8]
    """The whole file, mapped read-only."""

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored (quantized) bytes of a tensor, without a copy. Raises `ModelError` if there is no such tensor."""
        tensor = self.tensor(name)
        return self.data[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]

    def tensor(self, name: str) -> GgufTensor:
        """The descriptor of a tensor. Raises `ModelError` if there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelError(f"{self.path}: tensor {name!r} is missing") from None

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor dequantized to float32 in its row-major shape (a copy, or a view of the mapped file for F32)."""
        tensor = self.tensor(name)
        raw = self.raw(name)
        if tensor.type == ggml.GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(tensor.shape)
        if tensor.type == ggml.GGMLQuantizationType.F16:
            return raw.view("<f2").astype(np.float32).reshape(tensor.shape)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            return np.asarray(ggml.dequantize(rows, tensor.type), dtype=np.float32).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: tensor {name!r} has type {tensor.type.name}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """What a GGUF file says about its tokenizer; the token id is the index into `tokens`."""

    model: str
    """`gpt2` (byte-level BPE), `llama` (SentencePiece), …"""
    pre: str
    """llama.cpp's name of the pre-tokenizer (`smollm`, `qwen2`, `llama-bpe`, `default`, …)."""
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    """llama.cpp's: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Empty if the file has none."""
    merges: tuple[str, ...]
    """BPE merges, most important first, each two tokens separated by one space."""
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


class _Cursor:
    """Walks the header; every step is checked against the end of the file."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size_bytes = len(buffer)
        self.offset = 0

    def fail(self, reason: str) -> ModelError:
        return ModelError(f"{self.path} is not a usable GGUF file: {reason}")

    def take(self, count_bytes: int, what: str) -> int:
        """Moves over `count_bytes` and returns where they begin."""
        start = self.offset
        if count_bytes > self.size_bytes - start:
            raise self.fail(
                f"it is truncated: {what} at byte {start} needs {count_bytes} bytes, "
                f"{self.size_bytes - start} of {self.size_bytes} are left"
            )
        self.offset = start + count_bytes
        return start

    def scalar(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack_from(self.buffer, self.take(layout.size, what))[0]

    def string(self, what: str) -> str:
        length = self.scalar(_U64, what)
        start = self.take(length, what)
        try:
            return str(self.buffer[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is not UTF-8: {error.reason}") from error

    def value(self, type_number: int, what: str, depth: int = 0) -> Any:
        layout = _SCALARS.get(type_number)
        if layout is not None:
            return self.scalar(layout, what)
        if type_number == _STRING:
            return self.string(what)
        if type_number == _ARRAY and depth < MAX_ARRAY_DEPTH:
            return self._array(what, depth)
        raise self.fail(f"{what} has the unknown value type {type_number}")

    def _array(self, what: str, depth: int) -> list[Any]:
        item_type = self.scalar(_U32, what)
        count = self.scalar(_U64, what)
        layout = _SCALARS.get(item_type)
        if layout is not None:
            start = self.take(count * layout.size, what)
            return list(struct.unpack_from(f"<{count}{layout.format[1:]}", self.buffer, start))
        if count * 8 > self.size_bytes - self.offset:  # a string or an array takes at least its 8-byte length
            raise self.fail(f"it is truncated: {what} claims {count} items, more than the rest of the file can hold")
        if item_type == _STRING:
            return [self.string(what) for _ in range(count)]
        return [self.value(item_type, what, depth + 1) for _ in range(count)]


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file and maps the rest.

    Raises `ModelError` for a file that cannot be read, is truncated anywhere (tensor data included) or is malformed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            version, metadata, tensors = _read_header(_Cursor(path, buffer))
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not a usable GGUF file: {error}") from error  # an empty file cannot be mapped
    return GgufFile(path=path, version=version, metadata=metadata, tensors=tensors, data=data)


def _read_header(cursor: _Cursor) -> tuple[int, dict[str, Any], dict[str, GgufTensor]]:
    start = cursor.take(len(MAGIC), "the magic number")
    magic = cursor.buffer[start : start + len(MAGIC)]
    if magic != MAGIC:
        raise cursor.fail(f"it begins with {magic!r}, not {MAGIC!r}")
    version = cursor.scalar(_U32, "the version")
    if version not in SUPPORTED_VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in SUPPORTED_VERSIONS
        hint = "it is big-endian" if swapped else f"it has version {version}"
        raise cursor.fail(f"{hint}; allowed: little-endian, versions {', '.join(map(str, SUPPORTED_VERSIONS))}")
    tensor_count = cursor.scalar(_U64, "the tensor count")
    key_count = cursor.scalar(_U64, "the metadata count")
    metadata: dict[str, Any] = {}
    for index in range(key_count):
        key = cursor.string(f"metadata key {index}")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.scalar(_U32, key), f"metadata value {key!r}")
    infos = [_read_tensor_info(cursor, index) for index in range(tensor_count)]
    alignment = metadata.get("general.alignment", ggml.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, allowed: a power of two")
    base_bytes = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_number, offset_bytes in infos:
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} comes twice")
        tensors[name] = _place_tensor(cursor, name, shape, type_number, base_bytes + offset_bytes)
    return version, metadata, tensors


def _read_tensor_info(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"the name of tensor {index}")
    what = f"the description of tensor {name!r}"
    dimensions = cursor.scalar(_U32, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} has {dimensions} dimensions, allowed: 1 to {MAX_DIMENSIONS}")
    sizes = [cursor.scalar(_U64, what) for _ in range(dimensions)]
    return name, tuple(reversed(sizes)), cursor.scalar(_U32, what), cursor.scalar(_U64, what)


def _place_tensor(
    cursor: _Cursor, name: str, shape: tuple[int, ...], type_number: int, offset_bytes: int
) -> GgufTensor:
    try:
        tensor_type = ggml.GGMLQuantizationType(type_number)
        block, block_bytes = ggml.GGML_QUANT_SIZES[tensor_type]
    except (ValueError, KeyError):
        raise cursor.fail(f"tensor {name!r} has the unknown type {type_number}") from None
    if min(shape) < 1 or shape[-1] % block:
        raise cursor.fail(
            f"tensor {name!r} of type {tensor_type.name} has shape {shape}; rows come in blocks of {block}"
        )
    size_bytes = math.prod(shape) // block * block_bytes
    if offset_bytes + size_bytes > cursor.size_bytes:
        raise cursor.fail(
            f"it is truncated: tensor {name!r} ends at byte {offset_bytes + size_bytes} of {cursor.size_bytes}"
        )
    return GgufTensor(name=name, shape=shape, type=tensor_type, offset_bytes=offset_bytes, size_bytes=size_bytes)


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """The tokenizer inside a GGUF file. Raises `ModelError` if the file is broken or has none."""
    return gguf_tokenizer(open_gguf(path))


_BOS_BY_DEFAULT_PRE = ("llama3", "llama-v3", "llama-bpe")
"""Pre-tokenizers for which llama.cpp adds BOS where the file does not say (src/llama-vocab.cpp)."""


def gguf_tokenizer(file: GgufFile) -> GgufTokenizer:
    """The tokenizer of an open file; see `read_gguf_tokenizer`."""

    def get(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = file.metadata.get(f"tokenizer.{key}", default)
        if value is not default and not isinstance(value, kind):
            raise ModelError(
                f"{file.path}: tokenizer.{key} is a {type(value).__name__}, which is not what belongs there"
            )
        return value

    model = get("ggml.model", str)
    tokens = get("ggml.tokens", list)
    if model is None or not tokens:
        raise ModelError(f"{file.path}: the file has no tokenizer (tokenizer.ggml.model, tokenizer.ggml.tokens)")
    token_types = tuple(get("ggml.token_type", list, ()))
    if token_types and len(token_types) != len(tokens):
        count = len(token_types)
        raise ModelError(f"{file.path}: tokenizer.ggml.token_type has {count} entries for {len(tokens)} tokens")
    ids = {name: get(f"ggml.{name}_token_id", int) for name in ("bos", "eos", "eot", "eom")}
    for name, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelError(f"{file.path}: tokenizer.ggml.{name}_token_id is {token_id}, allowed: below {len(tokens)}")
    pre = get("ggml.pre", str, "default")
    return GgufTokenizer(
        model=model,
        pre=pre,
        tokens=tuple(tokens),
        token_types=token_types,
        merges=tuple(get("ggml.merges", list, ())),
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        add_bos=get("ggml.add_bos_token", bool, model == "llama" or pre in _BOS_BY_DEFAULT_PRE),
        add_eos=get("ggml.add_eos_token", bool, False),
        chat_template=get("chat_template", str),
    )
