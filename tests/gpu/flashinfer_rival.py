"""FlashInfer's kernels at what ours are measured at. It compiles each at its first use, for a minute or two; this file
as a program does that and no more, beside the tests (`run.py`), so that benchmarks find them compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tandem.kernels.paged_attention import AttentionShape

if TYPE_CHECKING:
    from bench_attention import Setting

_WORKSPACE_BYTES = 2**28
_AT_A_TIME = 3
"""Each with as many compilers as MAX_JOBS says, of some GiB of memory each."""
Run = Callable[[], torch.Tensor]


def is_here() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("flashinfer") is not None


def _flashinfer(module: str = "") -> Any:
    return importlib.import_module(f"flashinfer.{module}" if module else "flashinfer")


def prefill(given: Setting, layer: torch.Tensor, **scales: float) -> Run:
    """Attention over the same memory, whose layout it calls HND."""
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=given.q.device)
    wrapper = _flashinfer().BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    starts = torch.tensor([row.offset for row in given.rows] + [len(given.q)], dtype=torch.int32, device=given.q.device)
    wrapper.plan(starts, *_pages(given), *_heads(given.shape), causal=True, **_kinds(given, layer))
    return lambda: wrapper.run(given.q, layer, **scales)


def decode(given: Setting, layer: torch.Tensor, **scales: float) -> Run:
    """As `prefill`; with matrix units, which it advises for grouped heads."""
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=given.q.device)
    wrapper = _flashinfer().BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(*_pages(given), *_heads(given.shape), **_kinds(given, layer))
    return lambda: wrapper.run(given.q, layer, **scales)


def _pages(given: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its page table of rows of one length: first pages, pages, slots used of the last ones."""
    count, context = len(given.rows), given.rows[0].start + given.rows[0].length
    blocks = given.tables.shape[1]
    firsts = torch.arange(count + 1, dtype=torch.int32, device=given.q.device) * blocks
    last = torch.full(
        (count,), context - (blocks - 1) * given.shape.block_size, dtype=torch.int32, device=firsts.device
    )
    return firsts, given.tables.flatten(), last


def _heads(shape: AttentionShape) -> tuple[int, int, int, int]:
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size


def _kinds(given: Setting, layer: torch.Tensor) -> dict[str, object]:
    """Dtypes, and how many keys before its own a query sees (-1: all)."""
    window = given.shape.window
    return {
        "q_data_type": given.q.dtype,
        "kv_data_type": layer.dtype,
        "window_left": -1 if window is None else window - 1,
    }


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """RMS norm of the sum, both inputs overwritten."""
    y = x.clone()
    return partial(_flashinfer("norm").fused_add_rmsnorm, y, residual, weight, 1e-5)


def silu_mul(x: torch.Tensor) -> Run:
    """Gate first, as ours."""
    run: Run = partial(_flashinfer("activation").silu_and_mul, x)
    return run


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor) -> Callable[[], Any]:
    """q [T, H, D], k [T, K, D], angles [positions, D / 2] -> both rotated, [T, H x D] and [T, K x D]."""
    table = torch.cat((angles.cos(), angles.sin()), 1).float()
    apply = _flashinfer().apply_rope_with_cos_sin_cache
    return lambda: apply(positions, q.flatten(1), k.flatten(1), q.shape[2], table)


def rotary_and_write(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: torch.Tensor, layer: torch.Tensor, blocks: torch.Tensor
) -> Callable[[], object]:
    """q [T, H, D] and k [T, K, D], rotated where they are, k and v [T, K, D] written as one sequence's first tokens
    into its `blocks` of the layer: two launches.
    """
    count, size, device = q.shape[0], layer.shape[3], q.device
    table = torch.cat((angles.cos(), angles.sin()), 1).float()
    integers = {"dtype": torch.int32, "device": device}
    positions, row = torch.arange(count, **integers), torch.zeros(count, **integers)
    pages, firsts = blocks.int(), torch.tensor([0, len(blocks)], **integers)
    last = torch.tensor([count - (len(blocks) - 1) * size], **integers)
    rotate = _flashinfer().apply_rope_with_cos_sin_cache_inplace
    append = _flashinfer().append_paged_kv_cache

    def run() -> None:
        rotate(positions, q.flatten(1), k.flatten(1), q.shape[2], table)
        append(k, v, row, positions, layer, pages, firsts, last, "HND")

    return run


def sampled(logits: torch.Tensor, cuts: Mapping[str, float]) -> Run:
    """Tokens [R]; `cuts` as the benchmark names them. Top-k first, then top-p, as ours."""
    sampling = _flashinfer("sampling")
    drawn = _drawn_with(logits.device)
    if "top_k" in cuts:
        draw = sampling.top_k_top_p_sampling_from_probs
        return lambda: draw(logits.softmax(1), int(cuts["top_k"]), cuts["top_p"], **drawn)
    if "top_p" in cuts:
        return lambda: sampling.top_p_sampling_from_probs(logits.softmax(1), cuts["top_p"], **drawn)
    return lambda: sampling.sampling_from_logits(logits, **drawn)


def verified(draft: torch.Tensor, drafted: torch.Tensor, target: torch.Tensor) -> Run:
    """Probabilities [R, N, V] and [R, N + 1, V], drafted tokens [R, N] -> tokens [R, N + 1]; -1: none."""
    verify, drawn = _flashinfer("sampling").chain_speculative_sampling, _drawn_with(draft.device)
    return lambda: verify(draft, drafted, target, **drawn)[0]


def _drawn_with(device: torch.device) -> dict[str, torch.Tensor]:
    """On the device: numbers of the host's would keep a call from being captured."""
    return {name: torch.tensor([7], dtype=torch.int64, device=device) for name in ("seed", "offset")}


def _first_uses(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What compiles all that the benchmarks use, small; what most of them use first."""
    from bench_attention import DTYPE, WINDOW, Setting, llama

    attentions = (("prefill", prefill, (0, 64)), ("decode", decode, (63, 1)))
    for name, run, stretch in attentions:
        given = Setting.make([stretch], llama(), device)
        yield name, partial(_call, run, given, given.layer)
    x = torch.randn(2, 1024, device=device, dtype=DTYPE)
    heads = x.view(2, 8, 128)
    positions, angles = torch.arange(2, device=device), torch.rand(2, 64, device=device)
    likely = torch.rand(1, 2, 512, device=device).softmax(-1)
    tokens = torch.zeros(1, 1, dtype=torch.int32, device=device)
    yield "sampling", partial(_call, sampled, likely[0], {"temperature": 1.0, "top_k": 50, "top_p": 0.9})
    yield "norm", partial(_call, add_norm, x, x.clone(), x[0].clone())
    yield "activation", partial(_call, silu_mul, x)
    yield "rotary", partial(_call, rotary, heads, heads.clone(), positions, angles)
    layer = torch.zeros(1, 2, 8, 16, 128, device=device, dtype=DTYPE)
    blocks = torch.zeros(1, dtype=torch.int64, device=device)
    yield "KV write", partial(_call, rotary_and_write, heads, heads.clone(), heads.clone(), angles, layer, blocks)
    yield "verification", partial(_call, verified, likely[:, :1].contiguous(), tokens, likely)
    for name, run, stretch in attentions:
        given = Setting.make([stretch], llama(), device)
        narrow = given.layer.to(torch.float8_e4m3fn)
        yield f"{name}, float8", partial(_call, run, given, narrow, k_scale=1.0, v_scale=1.0)
        given = Setting.make([stretch], llama(window=WINDOW), device)
        yield f"{name}, window", partial(_call, run, given, given.layer)


def _call(make: Callable[..., Callable[[], object]], *given: object, **more: object) -> None:
    make(*given, **more)()


def compile_all(device: torch.device) -> int:
    """Runs everything once, some at a time; tells what each took. Returns how many failed."""
    failed = 0
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        begin_s = time.monotonic()
        names = {pool.submit(run): name for name, run in _first_uses(device)}
        for done in as_completed(names):
            error = done.exception()
            failed += error is not None
            came = "compiled" if error is None else f"{type(error).__name__}: {str(error)[:300]}"
            print(f"{names[done]}: {came}, after {time.monotonic() - begin_s:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if not is_here() or not torch.cuda.is_available():
        sys.exit(0)
    sys.exit(1 if compile_all(torch.device("cuda")) else 0)
