"""Options that several commands of `tandem` have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from .config import EngineConfig

API_KEY_VARIABLE = "TANDEM_API_KEY"

Url = Annotated[str, typer.Option("--url", help="The router's HTTP address.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar=API_KEY_VARIABLE, show_envvar=True, help="Client's key.")]
Ca = Annotated[
    str | None,
    typer.Option("--ca", metavar="FILE", help="Who signed the router's certificate (https). [env var: TANDEM_CA]"),
]
# Of an engine that is measured by itself; `engine_of` makes it of them.
Model = Annotated[str, typer.Option(help="Alias, folder, .gguf, Hugging Face id or dummy:<config>.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
Quantization = Annotated[str | None, typer.Option(help="w8a8: int8 weights and activations.")]
KVCacheDtype = Annotated[str, typer.Option(help="auto (as --dtype); cuda: int8 or fp8.")]
KVScalesFile = Annotated[str | None, typer.Option("--kv-scales", metavar="FILE", help="Of int8 or fp8 KV.")]
Kernels = Annotated[str, typer.Option(help="auto, compiled, torch or reference.")]
Threads = Annotated[int, typer.Option(help="Compute threads.")]
Cpus = Annotated[str, typer.Option(help="Processors to pin them to, e.g. 0,1. Default: not pinned.")]
BlockSize = Annotated[int, typer.Option(help="Token slots of a KV block.")]

_OF_ENGINE = (
    "model",
    "device",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "kv_scales",
    "kernels",
    "threads",
    "block_size",
    "paced_profile",
)


def engine_of(given: Mapping[str, Any]) -> EngineConfig:
    """The engine that a command's options describe, by name; those that it has not are the engine's own. ValueError
    naming the option.
    """
    from .config import EngineConfig
    from .config_schema import parse_bytes

    values = {name: given[name] for name in _OF_ENGINE if name in given}
    if "kv_cache" in given:
        try:
            values["kv_cache_bytes"] = parse_bytes(given["kv_cache"])
        except ValueError as error:
            raise ValueError(f"kv_cache: {error}") from None
    return EngineConfig(**values, cpus=numbers("cpus", given["cpus"]))


def numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of an option that takes several. ValueError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"{name}: {text!r} is not allowed; allowed: numbers separated by commas, e.g. 1,8,32"
        ) from None


def check_output(path: Path) -> None:
    """ValueError where a command's result could not be written, before anything is measured for it."""
    import tempfile

    name = f"output: {str(path)!r} is not allowed; allowed: a file in a folder"
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{name} that exists")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise ValueError(f"{name} that can be written ({error.strerror or error})") from None
