"""How large keys and values become, by layer and KV head, and from it the scales of narrow KV memory (int8, e4m3).

A file of `tandem calibrate`, or the scales that a Hugging Face checkpoint ships. A number is stored as number / scale,
rounded, and read back as stored * scale. Loads torch only to read a checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.config import ModelConfig
from ..models.errors import ModelError
from ..models.reference import ModelFiles

FORMAT = "tandem-kv-scales"
VERSION = 1
LARGEST_STORED = {"int8": 127.0, "float8_e4m3": 448.0}
"""The largest number of each narrow type (e4m3: Micikevicius et al. 2022, table 1)."""
SIDES = ("keys", "values")
MAX_FILE_BYTES = 16 * 2**20
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KVScales:
    """Of a whole model, whatever ranks share it."""

    largest: NDArray[np.float32]
    """[L, 2, K]: the largest magnitude of keys (after rotary) and of values by layer and KV head; 0: none was seen."""
    model: str = ""
    made_by: str = ""
    """How, for people."""

    def scales(self, dtype: str) -> NDArray[np.float32]:
        """[L, 2, K] for `int8` or `float8_e4m3`: what stored numbers are multiplied with; 1 where nothing was seen."""
        if dtype not in LARGEST_STORED:
            raise ValueError(f"dtype: {dtype!r} is not one of {sorted(LARGEST_STORED)}")
        scales = self.largest / np.float32(LARGEST_STORED[dtype])
        # below the normal numbers a reciprocal would be infinite
        return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)

    def digest(self) -> str:
        """Equal for equal magnitudes and shapes, wherever they came from."""
        shape = np.array(self.largest.shape, dtype="<u4").tobytes()
        return blake2b(shape + self.largest.astype("<f4").tobytes(), digest_size=16).hexdigest()

    def save(self, path: Path) -> None:
        """One line of JSON a layer. OSError where it cannot be written."""
        head = {"format": FORMAT, "version": VERSION, "model": self.model, "made_by": self.made_by}
        layers = [
            json.dumps({side: [float(str(number)) for number in layer[place]] for place, side in enumerate(SIDES)})
            for layer in self.largest
        ]
        fields = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
        text = "{\n" + fields + ',\n  "layers": [\n    ' + ",\n    ".join(layers) + "\n  ]\n}\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> KVScales:
        """What `save` wrote for a model of this shape. ValueError naming `kv_scales`, what is wrong and allowed."""
        data = _read(path)
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            found = _shown([data.get("format"), data.get("version")])
            raise _refuse(path, f"format and version are {found}", f"{FORMAT!r} and {VERSION}, of `tandem calibrate`")
        for name in ("model", "made_by"):
            if not isinstance(data.get(name, ""), str):
                raise _refuse(path, f"{name} is {_shown(data[name])}", "a string")
        layers = data.get("layers")
        if not isinstance(layers, list) or len(layers) != config.num_layers:
            found = f"{len(layers)} of them" if isinstance(layers, list) else _shown(layers)
            raise _refuse(path, f"layers: {found}", f"a list of {config.num_layers}, one of each layer of the model")
        largest = np.array([_layer(path, index, layer, config) for index, layer in enumerate(layers)], dtype=np.float32)
        return cls(largest=largest, model=data.get("model", ""), made_by=data.get("made_by", ""))


def checkpoint_scales(files: ModelFiles) -> KVScales | None:
    """The scales for e4m3 that a Hugging Face checkpoint ships, per tensor or per head; None where it has none.

    ModelError where some layers lack theirs, or one is no positive number for each KV head.
    """
    if files.kind != "hf":
        return None
    from .hf_weights import HfWeights  # torch, which planning and checking a file need not

    assert files.path is not None
    config = files.config
    source = HfWeights(files.path, config)
    stored = source.kv_scales()
    source.release()
    if not stored:
        return None
    shape = (config.num_layers, len(SIDES), config.num_kv_heads)
    scales = np.zeros(shape, dtype=np.float32)
    for layer, side in np.ndindex(shape[:2]):
        if (layer, side) not in stored:
            raise ModelError(
                f"{files.path}: layer {layer} has no scale for its {SIDES[side]}, others have; allowed: all or none"
            )
        name, tensor = stored.pop((layer, side))
        with np.errstate(over="ignore"):
            largest = tensor.double().numpy().reshape(-1).astype(np.float32) * np.float32(LARGEST_STORED["float8_e4m3"])
        if len(largest) not in (1, shape[2]) or not (np.isfinite(largest) & (largest > 0)).all():
            raise ModelError(
                f"{files.path}: tensor {name!r} of shape {tuple(tensor.shape)} is {_shown(tensor.flatten().tolist())}, "
                f"allowed: positive numbers, one or {shape[2]} of them (one a KV head)"
            )
        scales[layer, side] = largest
    if stored:
        name, _ = next(iter(stored.values()))
        raise ModelError(f"{files.path}: tensor {name!r} is of a layer beyond the model's {config.num_layers}")
    return KVScales(largest=scales, model=files.name, made_by="the checkpoint's own scales")


def _refuse(path: Path, what: str, allowed: str) -> ValueError:
    return ValueError(f"kv_scales: {str(path)!r}: {what}, allowed: {allowed}")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"kv_scales: {str(path)!r} cannot be read ({error})") from None
    if len(content) > MAX_FILE_BYTES:
        raise _refuse(path, "its size", f"at most {MAX_FILE_BYTES} bytes")
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"not JSON ({error})", "a file of `tandem calibrate`") from None
    if not isinstance(data, dict):
        raise _refuse(path, f"holds {_shown(data)}", "a JSON object, of `tandem calibrate`")
    return data


def _layer(path: Path, index: int, layer: object, config: ModelConfig) -> list[list[float]]:
    sides = [layer.get(side) if isinstance(layer, dict) else None for side in SIDES]
    for side, heads in zip(SIDES, sides, strict=True):
        if not isinstance(heads, list) or len(heads) != config.num_kv_heads:
            allowed = f"a list of {config.num_kv_heads} numbers, one of each KV head of the model"
            raise _refuse(path, f"layer {index}: {side} is {_shown(heads)}", allowed)
        for number in heads:
            if not _is_magnitude(number):
                raise _refuse(path, f"layer {index}: {side} has {_shown(number)}", "numbers from 0, finite in float32")
    return sides  # type: ignore[return-value]


def _is_magnitude(number: object) -> bool:
    if not isinstance(number, int | float) or isinstance(number, bool):
        return False
    if not 0 <= number < 2**128:  # NaN included
        return False
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(number)))
