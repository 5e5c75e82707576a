"""The engine on random weights of Llama-3.1-8B's shape: decode steps against the bandwidth bound, prompts against the
peak of matrix products, whole runs against transformers on the same weights.

A decode step's bound is the time to read all products' weights and the batch's KV once, at the bandwidth that a copy
reaches. Steps are timed as captured graphs, with greedy draws; whole runs with the scheduler, in wall-clock time from
the first request to the last token, ours first.
Without a GPU (a dry run) everything is tiny, and its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import transformers_rival
from engine_rig import BLOCK_SIZE, DTYPE, Ran, Rig, kv_token_bytes, prefill_operations, serve_all
from measure import Bounds, Line, Tell, time_s
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
    WHOLE: ("who", "prompts", "input", "output", "s", "output tokens/s", "tandem against it", ""),
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


def lines(device: torch.device, bounds: Bounds) -> Iterator[Callable[[Tell], None]]:
    """Decode first: it is what most time goes to. A rig that cannot be made costs its own lines."""
    sizes = FULL if device.type == "cuda" else TINY
    for quantization in sizes.quantizations:
        held: list[Rig] = []
        yield partial(_hold, held, sizes, device, quantization)
        for context in sizes.contexts:
            for batch in sizes.batches:
                yield partial(_decode_line, held, batch, context, bounds, quantization)
        for tokens in sizes.prompts:
            yield partial(_prefill_line, held, tokens, bounds, quantization)
        if quantization is None:
            yield partial(_narrow_decode_line, held, max(sizes.batches), max(sizes.contexts), bounds)
        yield partial(_let_go, held, device)
        if quantization is None:
            ran: list[Ran] = []
            yield partial(_our_line, sizes, device, ran)
            yield partial(_their_lines, sizes, device, ran)


def _hold(held: list[Rig], sizes: Sizes, device: torch.device, quantization: str | None, tell: Tell) -> None:
    held.append(_rig(sizes, device, quantization))


def _let_go(held: list[Rig], device: torch.device, tell: Tell) -> None:
    held.clear()
    _free(device)


def _rig(sizes: Sizes, device: torch.device, quantization: str | None) -> Rig:
    most = max(sizes.batches) * -(-max(sizes.contexts) // 16) * 16
    if device.type == "cuda":
        weights = 2 * sizes.config.num_layers * 4 * sizes.config.hidden_size**2  # more than enough
        free = torch.cuda.mem_get_info(device)[0] - _LEFT_FREE_BYTES - max(weights, 17 * 2**30)
        most = min(most, free // kv_token_bytes(sizes.config))
    return Rig(sizes.config, device, kv_tokens=most, limits=sizes.limits, quantization=quantization)


def _decode_line(
    held: list[Rig], batch: int, context: int, bounds: Bounds, quantization: str | None, tell: Tell
) -> None:
    for rig in held:
        tell(_decoded(rig, batch, context, bounds, quantization))


def _narrow_decode_line(held: list[Rig], batch: int, context: int, bounds: Bounds, tell: Tell) -> None:
    """Where reading KV is most of a step."""
    for rig in held:
        rig.narrow_kv(torch.float8_e4m3fn)
        tell(_decoded(rig, batch, context, bounds, None))


def _decoded(rig: Rig, batch: int, context: int, bounds: Bounds, quantization: str | None) -> Line:
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


def _prefill_line(held: list[Rig], tokens: int, bounds: Bounds, quantization: str | None, tell: Tell) -> None:
    for rig in held:
        tell(_prefilled(rig, tokens, bounds, quantization))


def _prefilled(rig: Rig, tokens: int, bounds: Bounds, quantization: str | None) -> Line:
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


def _our_line(sizes: Sizes, device: torch.device, kept: list[Ran], tell: Tell) -> None:
    kept.append(ours(sizes, device))
    tell(_whole_line("tandem", sizes, kept[0]))


def _their_lines(sizes: Sizes, device: torch.device, kept: list[Ran], tell: Tell) -> None:
    """transformers' on the same weights, when ours holds no memory any more; leaves none of its own behind."""
    ways = {
        "transformers, continuous batching": transformers_rival.continuous,
        "transformers, generate": transformers_rival.static,
    }
    if not transformers_rival.is_here():
        for who in ways:
            tell(_whole_line(who, sizes, "not installed here"))
        return
    rig = Rig(sizes.config, device, kv_tokens=4 * BLOCK_SIZE, limits=sizes.limits)
    model = transformers_rival.model_of(rig)
    del rig
    _free(device)
    for who, run in ways.items():
        try:
            ran, attention = run(model, prompts_of(sizes), sizes.whole[2])
        except Exception as error:  # of a library that is not ours: told in its line
            tell(_whole_line(who, sizes, f"failed: {type(error).__name__}: {str(error)[:200]}"))
        else:
            tell(_whole_line(who, sizes, ran, kept, f"attention: {attention}"))
        _free(device)
    del model
    _free(device)


def _whole_line(who: str, sizes: Sizes, ran: Ran | str, mine: list[Ran] | None = None, note: str = "") -> Line:
    """`mine`: our run, if there was one, that theirs is held against; `ran`: why not, where it did not."""
    count, length, output = sizes.whole
    if isinstance(ran, str):
        cells = (who, str(count), str(length), "", "", "", "", ran)
        return Line(title=WHOLE, heads=_HEADS[WHOLE], cells=cells)
    ratio = ""
    for our in mine or ():
        ratio = f"{our.output_tokens_per_s / ran.output_tokens_per_s:.2f}x"
        alike = sum(ids[0] == our.tokens[name][0] for name, ids in ran.tokens.items())
        note += f"; first token as ours in {alike} of {count}"
    figures = (f"{ran.taken_s:.2f}", f"{ran.output_tokens_per_s:.0f}", ratio, note)
    return Line(title=WHOLE, heads=_HEADS[WHOLE], cells=(who, str(count), str(length), str(output), *figures))


def _free(device: torch.device) -> None:
    gc.collect()  # models and managers point at each other
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
