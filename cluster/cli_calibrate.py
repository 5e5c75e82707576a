"""`tandem calibrate`: the scales that narrow KV memory (int8, fp8) is read and written with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Cpus, Dtype, Kernels, Quantization, Threads, check_output, engine_of
from .cli_typed import as_typed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .cli_display import Display
    from .config import EngineConfig
    from .engine.calibrate import Seen, Text
    from .models.reference import ModelFiles

_FIELDS = {"prompts": "dataset_path"}
_NAMES = {"int8": "int8", "float8_e4m3": "fp8"}
"""What a configuration calls the narrow types."""
_FEW_TOKENS = 512
"""Fewer are warned of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is computed and where the scales go."""

    config: EngineConfig
    tokens: int
    prompts: Path | None
    seed: int
    output: Path


def calibrate(
    command: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, folder, .gguf, Hugging Face id or dummy:<config>.")
    ] = "smollm2-135m",
    output: Annotated[
        str, typer.Option("--output", "--out", metavar="FILE", help="Where the scales go.")
    ] = "kv_scales.json",
    tokens: Annotated[int, typer.Option(help="Tokens that are looked at; of prompts, at most.")] = 4096,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Text, a prompt a line, or .jsonl. Default: what the model writes by itself."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    kernels: Kernels = "auto",
    threads: Threads = 1,
    cpus: Cpus = "",
    seed: Annotated[int, typer.Option(help="Of what the model writes.")] = 0,
) -> None:
    """Measure how large a model's keys and values become, and save the scales that int8 and fp8 KV memory needs."""
    with as_typed(command, _FIELDS):
        run_calibrate(_wanted(command.params))


def _wanted(given: Mapping[str, Any]) -> Wanted:
    """The command's options, by name. ValueError naming a field."""
    from ..kernels.dispatch import gpu_facts, gpu_problem
    from .config_schema import ConfigError
    from .engine.calibrate import MAX_TOKENS
    from .types import MAX_SEED

    config = engine_of(given)
    if config.device == "paced":
        raise ConfigError("device", config.device, "cpu or cuda: the paced device computes nothing")
    if config.device == "cuda" and (problem := gpu_problem(gpu_facts())) is not None:
        raise ConfigError("device", config.device, f"cpu: {problem}")
    for name, least, most in (("tokens", 1, MAX_TOKENS), ("seed", 0, MAX_SEED)):
        if not least <= given[name] <= most:
            raise ConfigError(name, given[name], f"{least} to {most}")
    return Wanted(
        config=config,
        tokens=given["tokens"],
        prompts=None if given["prompts"] is None else Path(given["prompts"]),
        seed=given["seed"],
        output=Path(given["output"]),
    )


def run_calibrate(wanted: Wanted) -> None:
    """Measures, saves, and says what was found. ValueError, ModelError, RuntimeError."""
    from .cli_display import Display
    from .engine.calibrate import own_texts
    from .engine.kv_scales import KVScales
    from .launch.checks import check_engine
    from .models.reference import resolve_model

    check_output(wanted.output)
    display = Display()
    files = resolve_model(wanted.config.model)
    check_engine(wanted.config, files.config)
    if wanted.prompts is None:
        texts = own_texts(files.config, wanted.tokens, wanted.seed)
        source = f"that the model wrote itself, seed {wanted.seed}"
    else:
        texts, source = _prompt_texts(wanted.prompts, files, wanted.tokens), f"of {wanted.prompts.name}"
    seen = _measured(wanted, files, texts, display)
    config = wanted.config
    how = f"{seen.tokens:,} tokens {source}; {config.quantization or config.dtype}, {config.device}"
    done = "replaced" if wanted.output.exists() else "saved"
    KVScales(largest=seen.largest, model=files.name, made_by=how).save(wanted.output)
    display.line(_summary(files, seen, how, len(texts)))
    display.line(f"{done:<12}{wanted.output}")
    display.line(_configuration(seen, wanted.output))


def _prompt_texts(path: Path, files: ModelFiles, tokens: int) -> tuple[Text, ...]:
    from ..router.tokenizer import load_tokenizer
    from .engine.calibrate import given_texts
    from .workload.datasets import read_prompts
    from .workload.text_file import numbered_lines

    if ".jsonl" in path.suffixes:
        prompts = read_prompts(path)
    else:
        prompts = tuple(line for _, line in numbered_lines(path))
    tokenizer = load_tokenizer(files)
    return given_texts(files.config, (tokenizer.encode(prompt, add_special=True) for prompt in prompts), tokens)


def _measured(wanted: Wanted, files: ModelFiles, texts: tuple[Text, ...], display: Display) -> Seen:
    """Everything that takes time."""
    from dataclasses import replace

    from .engine.calibrate import ROUND_TEXTS, blocks_needed, measure
    from .engine.devices.kv_memory import kv_layout
    from .launch.compose import build_device

    config = wanted.config
    block_bytes = kv_layout(files.config, config.dtype, config.block_size).block_bytes
    config = replace(
        config,
        kv_cache_bytes=blocks_needed(texts, config.block_size) * block_bytes,
        max_running=ROUND_TEXTS,
        max_model_len=max(text.length for text in texts),
        enforce_eager=config.device == "cuda",  # graphs take longer than these steps
    )
    with display.steps(remaining=True) as report:
        device = build_device(config, files, lambda what, share: report("engine", what, share))
        try:
            report("engine", "ready", 1.0)
            return measure(
                device,
                texts,
                rotary=not files.config.learned_positions,
                seed=wanted.seed,
                on_progress=lambda share: report("texts", "computing", share),
            )
        finally:
            device.close()


def _summary(files: ModelFiles, seen: Seen, how: str, texts: int) -> str:
    import numpy as np

    from .engine.kv_scales import SIDES

    layers, _, kv_heads = seen.largest.shape
    lines = [
        f"model       {files.name}: {layers} layers, {kv_heads} KV heads",
        f"seen        {how}; {texts} text{'s' * (texts > 1)}",
    ]
    for place, side in enumerate(SIDES):
        largest = seen.largest[:, place]
        spread = f"{largest.min():.3g} to {largest.max():.3g}, median {np.median(largest):.3g}"
        lost = {name: seen.errors[dtype][:, place] for dtype, name in _NAMES.items()}
        losses = (f"{name} loses {np.median(heads):.1%} (worst {heads.max():.1%})" for name, heads in lost.items())
        lines.append(f"{side:<12}largest of a head {spread}; {'; '.join(losses)}")
    if seen.tokens < _FEW_TOKENS:
        lines.append(f"WARNING     fewer than {_FEW_TOKENS} tokens: other text may be larger and would be cut off")
    return "\n".join(lines)


def _configuration(seen: Seen, output: Path) -> str:
    """What to write into cluster.yaml: the type that loses less, the other beside it."""
    import json
    import math

    lost = {name: math.sqrt((seen.errors[dtype] ** 2).mean()) for dtype, name in _NAMES.items()}
    best, other = sorted(lost, key=lambda name: lost[name])
    return (
        "add to the section `engine` of the cluster's file, for device: cuda (narrow KV wants a GPU):\n"
        f"  kv_cache_dtype: {best}  # or {other}\n"
        f"  kv_scales: {json.dumps(str(output.absolute()))}"
    )
