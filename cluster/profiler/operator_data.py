"""Published measurements of GPU operators, as arrays: aiconfigurator's and Vidur's files. Pure but for reading files.

aiconfigurator (NVIDIA, Apache-2.0; kernels of vLLM 0.14 on A100, 0.24 on H100) measures products by (m, n, k),
attention by batch and length, collectives by size; a collective's `message_size` counts elements, two bytes each here.
Vidur (Agrawal et al., MLSys '24; MIT) measures the operators of whole models by tokens and tensor parallelism, and
collectives by bytes.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_MS = 1e-3
MIN_WIDTH = 512
"""Of n and k: no linear of a model that is served on GPUs is smaller; below it is all launch."""
MIN_HEADS = 4
MAX_DECODE_ROWS = 512
MAX_DECODE_CONTEXT = 32768
MAX_DECODE_ROW_HEADS = 2**14


@dataclass(frozen=True, slots=True)
class Samples:
    """Measurements of one operator: its sizes by name and how long it took, all [N]; `group` marks what belongs
    together when every fifth is held out (all sizes of one weight shape, say).
    """

    sizes: dict[str, Array]
    seconds: Array
    group: Array

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, chosen: NDArray[np.bool_]) -> Samples:
        """The samples that are chosen, [N]."""
        return Samples({k: v[chosen] for k, v in self.sizes.items()}, self.seconds[chosen], self.group[chosen])


@dataclass(frozen=True, slots=True)
class OperatorFiles:
    """Where one device's measurements stand below the data folder."""

    gemm: str
    prefill: str
    decode: str
    collectives: str
    fitted_models: tuple[str, ...]
    """Vidur's, in the fit."""
    held_out_models: tuple[str, ...]
    """Vidur's, that the fit never sees; nor does it see another model of the same shapes."""
    all_reduce: str
    send_recv: str
    launches: bool = False
    """Whether all-reduces are fitted to Vidur's, which processes launch one by one and wait for each other, as engines
    without captured graphs do; else to those of NCCL's benchmark, back to back."""
    attention: str | None = None
    """Vidur's, of the kernels of early 2024; never in the fit."""


FILES = {
    "a100-80g": OperatorFiles(
        gemm="aiconfigurator/a100_vllm0.14.0_gemm_bf16.csv.gz",
        prefill="aiconfigurator/a100_vllm0.14.0_context_attention_hd128.csv.gz",
        decode="aiconfigurator/a100_vllm0.14.0_generation_attention_hd128.csv.gz",
        collectives="aiconfigurator/a100_nccl_2.27.3.csv.gz",
        fitted_models=("vidur/compute_a100_Llama-2-7b-hf_mlp.csv.gz",),
        held_out_models=(
            "vidur/compute_a100_Meta-Llama-3-8B_mlp.csv.gz",
            "vidur/compute_a100_Llama-2-70b-hf_mlp.csv.gz",
            "vidur/compute_a100_Meta-Llama-3-70B_mlp.csv.gz",
        ),
        all_reduce="vidur/network_a100_dgx_all_reduce.csv.gz",
        send_recv="vidur/network_a100_dgx_send_recv.csv.gz",
        launches=True,
        attention="vidur/history_e2d00e9_a100_attention_llama2-70b-shape_tp2.csv.gz",
    ),
    "h100": OperatorFiles(
        gemm="aiconfigurator/h100_vllm0.24.0_gemm_bf16_fp8.csv.gz",
        prefill="aiconfigurator/h100_vllm0.24.0_context_attention_hd128.csv.gz",
        decode="aiconfigurator/h100_vllm0.24.0_generation_attention_hd128.csv.gz",
        collectives="aiconfigurator/h100_nccl_2.27.3dir.csv.gz",
        fitted_models=("vidur/compute_h100_Llama-2-70b-hf_mlp.csv.gz",),
        held_out_models=("vidur/compute_h100_Llama-2-7b-hf_mlp.csv.gz",),
        all_reduce="vidur/network_h100_dgx_all_reduce.csv.gz",
        send_recv="vidur/network_h100_dgx_send_recv.csv.gz",
    ),
}


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a gzip CSV. ValueError if it cannot be read."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read ({error})") from None


def gemm_samples(path: Path, dtype: str = "bfloat16") -> Samples:
    """m, n, k of aiconfigurator's products of one dtype; a weight shape is a group."""
    table = _table(
        row for row in read_rows(path)
        if row["gemm_dtype"] == dtype and min(int(row["n"]), int(row["k"])) >= MIN_WIDTH
    )  # fmt: skip
    m, n, k, seconds = (table(name) for name in ("m", "n", "k", "latency"))
    return Samples({"m": m, "n": n, "k": k}, seconds * _MS, _groups(n, k))


def prefill_samples(path: Path) -> Samples:
    """batch, length, heads, kv_heads, head_dim of prompts; a set of heads is a group."""
    table = _table(row for row in _served_heads(path))
    sizes = _attention_sizes(table) | {"length": table("isl")}
    return Samples(sizes, table("latency") * _MS, _groups(sizes["heads"], sizes["kv_heads"]))


def decode_samples(path: Path) -> Samples:
    """batch, context (with the token that is computed), heads, kv_heads, head_dim; a set of heads is a group."""
    table = _table(
        row for row in _served_heads(path)
        if int(row["batch_size"]) <= MAX_DECODE_ROWS
        and int(row["step"]) < MAX_DECODE_CONTEXT
        and int(row["batch_size"]) * int(row["num_heads"]) <= MAX_DECODE_ROW_HEADS
    )  # fmt: skip
    sizes = _attention_sizes(table) | {"context": table("step") + 1}
    return Samples(sizes, table("latency") * _MS, _groups(sizes["heads"], sizes["kv_heads"]))


def _served_heads(path: Path) -> Iterator[dict[str, str]]:
    return (
        row for row in read_rows(path)
        if row["kv_cache_dtype"] == "bfloat16" and int(row["num_heads"]) >= MIN_HEADS
    )  # fmt: skip


def _attention_sizes(table: Callable[[str], Array]) -> dict[str, Array]:
    names = {"batch": "batch_size", "heads": "num_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    return {name: table(column) for name, column in names.items()}


def model_attention_samples(path: Path, *, prompts: bool) -> Samples:
    """Vidur's attention of a batch: the sizes of `prefill_samples` and `start` (tokens before a chunk, `length` with
    them), or those of `decode_samples`.
    """
    table = _table(row for row in read_rows(path) if (row["is_prefill"] == "True") is prompts)
    ranks = table("num_tensor_parallel_workers")
    sizes = {
        "batch": table("batch_size"),
        "heads": table("n_q_head") / ranks,
        "kv_heads": table("n_kv_head") / ranks,
        "head_dim": table("n_embd") / table("n_q_head"),
    }
    cached = table("kv_cache_size")
    sizes |= {"start": cached, "length": cached + table("prefill_chunk_size")} if prompts else {"context": cached}
    seconds = table(f"time_stats.attn_{'prefill' if prompts else 'decode'}.median") * _MS
    return Samples(sizes, seconds, _groups(cached))


def model_gemm_samples(path: Path) -> Samples:
    """m, n, k of the four linears of one of Vidur's models, at every tensor parallelism of the file."""
    found: list[tuple[float, float, float, float]] = []
    for row in read_rows(path):
        model = _VidurRow(row)
        for operator, n, k in model.linears():
            found.append((model.tokens, n, k, model.seconds(operator)))
    m, n, k, seconds = np.array(found).T
    return Samples({"m": m, "n": n, "k": k}, seconds, _groups(n, k))


ELEMENTWISE = {
    "norm_share": ("input_layernorm", "post_attention_layernorm"),
    "activation_share": ("attn_rope", "mlp_act"),
    "add_share": ("add",),
}
"""Vidur's operators by the constant that their bandwidth is fitted with."""


def elementwise_samples(path: Path, operators: tuple[str, ...]) -> Samples:
    """bytes moved by each of `operators`, in one of Vidur's models; a number of tokens is a group."""
    found: list[tuple[float, float, float]] = []
    for row in read_rows(path):
        model = _VidurRow(row)
        for operator in operators:
            if row.get(f"time_stats.{operator}.median"):
                found.append((model.moved_bytes(operator), model.seconds(operator), model.tokens))
    moved, seconds, tokens = np.array(found).T
    return Samples({"bytes": moved}, seconds, _groups(tokens))


class _VidurRow:
    """One row of Vidur's operators of a model."""

    def __init__(self, row: dict[str, str]) -> None:
        self._row = row
        self.tokens = int(row["num_tokens"])
        self._parallel = int(row["num_tensor_parallel_workers"])
        self._hidden, self._heads, self._kv_heads = (int(row[name]) for name in ("n_embd", "n_head", "n_kv_head"))
        self._ffn = int(row["n_expanded_embd"])
        self._gated = row["use_gated_mlp"] == "True"

    def seconds(self, operator: str) -> float:
        return float(self._row[f"time_stats.{operator}.median"]) * _MS

    def linears(self) -> list[tuple[str, float, float]]:
        """(operator, n, k)."""
        head_dim = self._hidden // self._heads
        into = 2 if self._gated else 1
        return [
            ("attn_pre_proj", (self._heads + 2 * self._kv_heads) * head_dim / self._parallel, self._hidden),
            ("attn_post_proj", self._hidden, self._heads * head_dim / self._parallel),
            ("mlp_up_proj", into * self._ffn / self._parallel, self._hidden),
            ("mlp_down_proj", self._hidden, self._ffn / self._parallel),
        ]

    def moved_bytes(self, operator: str) -> float:
        """Read and written, two bytes an element."""
        if operator == "attn_rope":
            elements = 2 * (self._heads + self._kv_heads) * (self._hidden // self._heads) / self._parallel
        elif operator == "mlp_act":
            elements = (3 if self._gated else 2) * self._ffn / self._parallel
        else:
            elements = (3 if operator == "add" else 2) * self._hidden
        return 2.0 * self.tokens * elements


def all_reduce_samples(path: Path) -> Samples:
    """ranks, bytes of aiconfigurator's NCCL all-reduces inside a node; a size is a group."""
    table = _table(row for row in read_rows(path) if row["op_name"] == "all_reduce" and row["nccl_dtype"] == "half")
    size = 2.0 * table("message_size")
    return Samples({"ranks": table("num_gpus"), "bytes": size}, table("latency") * _MS, _groups(size))


def network_all_reduce_samples(path: Path) -> Samples:
    """ranks, bytes of Vidur's all-reduces inside a node; a size is a group."""
    table = _table(row for row in read_rows(path) if row["num_workers"] == row["devices_per_node"])
    size = table("size")
    ranks, seconds = table("num_workers"), table("time_stats.all_reduce.median") * _MS
    return Samples({"ranks": ranks, "bytes": size}, seconds, _groups(size))


def send_samples(network: Path, *, inside_node: bool) -> Samples:
    """bytes from one device to another, of Vidur."""
    devices = "2" if inside_node else "1"
    table = _table(row for row in read_rows(network) if row["devices_per_node"] == devices)
    size = table("size")
    return Samples({"bytes": size}, table("time_stats.send_recv.median") * _MS, _groups(size))


def _table(rows: Iterator[dict[str, str]]) -> Callable[[str], Array]:
    kept = list(rows)
    if not kept:
        raise ValueError("data: a file holds none of the rows that are wanted")
    return lambda name: np.array([float(row[name]) for row in kept])


def _groups(*columns: Array) -> Array:
    """A number for each different row of the columns, in the order of their values, [N]."""
    _, index = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    groups: Array = index.reshape(-1).astype(np.float64)
    return groups
