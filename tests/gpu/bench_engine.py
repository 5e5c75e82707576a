"""The engine on random weights of Llama-3.1-8B's shape: decode steps against the bandwidth bound, prompts against the
peak of matrix products, whole runs against transformers' continuous batching on the same weights.

A decode step's bound is the time to read all products' weights and the batch's KV once, at the bandwidth that a copy
reaches. Steps are timed as captured graphs, with greedy draws; whole runs with the scheduler, in wall-clock time.
Without a GPU (a dry run) everything is tiny, and its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engine_rig import (
    DTYPE,
    Ran,
    Rig,
    has_transformers,
    kv_token_bytes,
    prefill_operations,
    serve_all,
    transformers_model,
)
from measure import Bounds, Line, time_s
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.gpu.inputs import Limits
from tandem.cluster.engine.gpu.weights import DeviceDummyWeights
from tandem.cluster.models.config import ModelConfig
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS

DECODE = "engine, decode step"
PREFILL = "engine, prefill of one prompt"
WHOLE = "engine, whole runs"
_HEADS = {
    DECODE: ("weights", "batch", "context", "ms", "bound ms", "of bound", "tokens/s", ""),
    PREFILL: ("weights", "tokens", "ms", "tokens/s", "TFLOP/s", "of peak"),
    WHOLE: ("who", "prompts", "input", "output", "s", "output tokens/s", "against transformers", ""),
}
_LEFT_FREE_BYTES = 6 * 2**30
"""Of the device, beside weights and KV: activations, logits, workspaces."""
_SEEDS = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured."""

    config: ModelConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    whole: tuple[int, int, int]
    """Prompts, input tokens and output tokens of each."""
    quantizations: tuple[str | None, ...]

    @property
    def limits(self) -> Limits:
        """Of every step."""
        longest = max(*self.contexts, *self.prompts)
        return Limits(max(self.batches), max(self.prompts), -(-longest // 16))


FULL = Sizes(
    config=CONFIGS["llama-3.1-8b"],
    batches=(1, 8, 32, 128),
    contexts=(1024, 8192),
    prompts=(512, 2048, 8192),
    whole=(64, 512, 128),
    quantizations=(None, "w8a8", "w4a16"),
)
TINY = Sizes(
    config=dataclasses.replace(
        CONFIGS["tiny-llama"], num_layers=1, vocab_size=300, max_model_len=64, tie_word_embeddings=False
    ),
    batches=(2,),
    contexts=(20,),
    prompts=(6,),
    whole=(2, 5, 2),
    quantizations=(None,),
)


def lines(device: torch.device, bounds: Bounds) -> Iterator[Line]:
    """Decode first: it is what most time goes to."""
    sizes = FULL if device.type == "cuda" else TINY
    for quantization in sizes.quantizations:
        rig = _rig(sizes, device, quantization)
        for context in sizes.contexts:
            for batch in sizes.batches:
                yield _decode_line(rig, batch, context, bounds, quantization)
        for tokens in sizes.prompts:
            yield _prefill_line(rig, tokens, bounds, quantization)
        if quantization is None:
            rig.narrow_kv(torch.float8_e4m3fn)  # where reading KV is most of a step
            yield _decode_line(rig, max(sizes.batches), max(sizes.contexts), bounds, quantization)
            rig.model.kv = torch.empty(0)
            theirs = _transformers(rig, sizes)
            del rig
            _free(device)
            yield from _whole_lines(sizes, device, theirs)
        else:
            del rig
        _free(device)


def _rig(sizes: Sizes, device: torch.device, quantization: str | None) -> Rig:
    most = max(sizes.batches) * -(-max(sizes.contexts) // 16) * 16
    if device.type == "cuda":
        weights = 2 * sizes.config.num_layers * 4 * sizes.config.hidden_size**2  # more than enough
        free = torch.cuda.mem_get_info(device)[0] - _LEFT_FREE_BYTES - max(weights, 17 * 2**30)
        most = min(most, free // kv_token_bytes(sizes.config))
    return Rig(sizes.config, device, kv_tokens=most, limits=sizes.limits, quantization=quantization)


def _decode_line(rig: Rig, batch: int, context: int, bounds: Bounds, quantization: str | None) -> Line:
    taken_s = time_s(rig.decode(batch, context))
    element_bytes = rig.model.kv.element_size()
    moved = rig.weight_bytes + batch * context * kv_token_bytes(rig.config, element_bytes)
    bound_s = moved / bounds.copy_bytes_per_s
    notes = ["KV in float8_e4m3"] if element_bytes == 1 else []
    notes += ["sequences share blocks: the memory does not hold all"] if rig.shares(batch, context) else []
    cells = (
        quantization or DTYPE,
        str(batch),
        str(context),
        f"{taken_s * 1e3:.3f}",
        f"{bound_s * 1e3:.3f}",
        f"{bound_s / taken_s:.0%}",
        f"{batch / taken_s:.0f}",
        "; ".join(notes),
    )
    return Line(title=DECODE, heads=_HEADS[DECODE], cells=cells)


def _prefill_line(rig: Rig, tokens: int, bounds: Bounds, quantization: str | None) -> Line:
    taken_s = time_s(rig.prefill(tokens), repetitions=10)
    per_s = prefill_operations(rig.config, tokens) / taken_s
    cells = (
        quantization or DTYPE,
        str(tokens),
        f"{taken_s * 1e3:.2f}",
        f"{tokens / taken_s:.0f}",
        f"{per_s / 1e12:.0f}",
        f"{per_s / bounds.products_per_s:.0%}",
    )
    return Line(title=PREFILL, heads=_HEADS[PREFILL], cells=cells)


def prompts_of(sizes: Sizes) -> list[list[int]]:
    """Random, the same for everybody."""
    count, length, _ = sizes.whole
    drawn = torch.randint(1, sizes.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(_SEEDS))
    ids: list[list[int]] = drawn.tolist()
    return ids


def ours(sizes: Sizes, device: torch.device) -> Ran:
    """The engine as `tandem serve` runs it, without the network: a warm-up, then the run."""
    prompts = prompts_of(sizes)
    count, length, output = sizes.whole
    budget, longest = max(sizes.prompts), length + output + 16
    block_bytes = 16 * kv_token_bytes(sizes.config)
    engine = CudaDevice(
        ModelFiles(name="random", kind="dummy", path=None, config=sizes.config),
        dtype=DTYPE,
        block_size=16,
        kv_cache_bytes=count * -(-longest // 16) * block_bytes,
        max_batched_tokens=max(budget, count),
        max_running=count,
        max_model_len=longest,
        device=str(device),
        source=DeviceDummyWeights(sizes.config, device, torch.bfloat16),
    )
    try:
        limits = {"budget": max(budget, count), "running": count, "longest": longest}
        if device.type == "cuda":
            serve_all(engine, prompts, 4, **limits)
        return serve_all(engine, prompts, output, **limits)
    finally:
        engine.close()


def _whole_lines(sizes: Sizes, device: torch.device, theirs: Ran | str) -> Iterator[Line]:
    ran = ours(sizes, device)
    count, length, _ = sizes.whole
    rate = theirs.output_tokens_per_s if isinstance(theirs, Ran) else None
    for who, run in (("tandem", ran), ("transformers, continuous batching", theirs)):
        if isinstance(run, Ran):
            output = sum(map(len, run.tokens.values())) // count
            ratio = f"{run.output_tokens_per_s / rate:.2f}x" if rate else ""
            cells = (f"{run.taken_s:.2f}", f"{run.output_tokens_per_s:.0f}", ratio, "")
            yield Line(title=WHOLE, heads=_HEADS[WHOLE], cells=(who, str(count), str(length), str(output), *cells))
        else:
            yield Line(title=WHOLE, heads=_HEADS[WHOLE], cells=(who, str(count), str(length), "", "", "", "", run))


def _transformers(rig: Rig, sizes: Sizes) -> Ran | str:
    """Their engine on our weights, warmed up; why not, where it is not there or failed."""
    if rig.device.type != "cuda":
        return "not run without a GPU"
    if not has_transformers():
        return "not installed here"
    try:
        model: Any = transformers_model(rig)
        prompts = prompts_of(sizes)
        _generate(model, prompts, 4)
        return _generate(model, prompts, sizes.whole[2])
    except Exception as error:  # of a library that is not ours: told in its line
        return f"failed: {type(error).__name__}: {str(error)[:200]}"


def _generate(model: Any, prompts: Sequence[list[int]], output: int) -> Ran:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    keeps = "persistent_manager" in inspect.signature(model.generate_batch).parameters  # else it warms up each time
    more = {"persistent_manager": True} if keeps else {}
    begin_s = time.perf_counter()
    found = model.generate_batch(inputs=list(prompts), generation_config=config, progress_bar=False, **more)
    taken_s = time.perf_counter() - begin_s
    tokens = {str(index): list(result.generated_tokens) for index, result in enumerate(found.values())}
    return Ran(tokens, taken_s)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
