"""A model computed by `kernels.compiled`: one native call a step, without the interpreter lock.

Packed weights come from the cache on disk where it has them: then neither torch nor the model's files are read, and all
workers of a machine share one copy in memory.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.compiled.decoder import CompiledModel, StepArrays
from ...kernels.compiled.decoder_weights import DecoderShape, unsupported
from ...kernels.compiled.packed import layout
from ...kernels.compiled.target import code_folder
from ..models.config import ModelConfig
from ..models.fetch import default_cache_dir
from ..models.reference import ModelFiles
from .forward import Forward, Stage
from .plan import StepPlan
from .positions import OPT_POSITION_OFFSET, inverse_frequencies
from .weight_cache import WeightCache

__all__ = ["CompiledForward", "decoder_shape", "unsupported"]

_COMPILING = "kernels (the first start on a machine compiles them)"
_ALONE_S = 300.0
_POLL_S = 0.05
_CACHED_FROM_BYTES = 32 * 2**20
"""Packing less takes no time worth a file."""


def decoder_shape(config: ModelConfig) -> DecoderShape:
    """What the kernels must know of a model."""
    c = config
    return DecoderShape(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        norm=c.norm,
        norm_eps=c.norm_eps,
        norm_before=c.norm_before,
        activation=c.activation,
        gated_mlp=c.gated_mlp,
        rotary_frequencies=None if c.learned_positions else tuple(inverse_frequencies(c).tolist()),
        position_offset=OPT_POSITION_OFFSET if c.learned_positions else 0,
        qkv_bias=c.qkv_bias,
        attention_out_bias=c.attention_out_bias,
        mlp_bias=c.mlp_bias,
        qk_norm=c.qk_norm,
        tie_word_embeddings=c.tie_word_embeddings,
        sliding_window=c.sliding_window,
        embed_dim=c.embed_dim,
    )


class CompiledForward(Forward):
    """A compiled model over one KV memory."""

    def __init__(
        self,
        files: ModelFiles,
        kind: str,
        kv: NDArray[np.generic],
        *,
        fingerprint: str,
        threads: int = 1,
        cpus: Sequence[int] = (),
        stage: Stage | None = None,
    ) -> None:
        """`kind`: `float32`, `bfloat16` or `w8a8`; `kv`: [N, L, 2, K, S, D], bfloat16 as uint16; `fingerprint`: of the
        weights. ModelError for the files.
        """
        self._kv = kv
        self._block_size = kv.shape[4]
        say = stage or (lambda text, share: None)
        shape = decoder_shape(files.config)
        with _alone(code_folder(), say):
            arrays = _packed(files, shape, kind, f"{fingerprint}-{layout(kind)}", say)
            say(_COMPILING, None)
            self._model = CompiledModel.from_arrays(shape, kind, arrays, threads=threads, cpus=cpus)
            self._warm()
        self.resident_bytes = self._model.resident_bytes

    def run(self, plan: StepPlan) -> NDArray[np.float32]:
        return self._model.step(_step_arrays(plan, self._block_size), self._kv)

    def close(self) -> None:
        self._model.close()

    def _warm(self) -> None:
        """One step over memory of its own, so that no request waits for code to be compiled or weights to be read."""
        token = np.zeros(1, dtype=np.int64)
        row = np.array([[0, 0, 1, 0]], dtype=np.int64)
        self._model.step(StepArrays(token, row, token, token), np.zeros_like(self._kv[:1]))


@contextmanager
def _alone(folder: Path, say: Stage) -> Iterator[None]:
    """One process of this machine at a time: who waits finds what the first has compiled and packed, instead of doing
    it again beside it. Where no lock can be had, or not in time, it is done twice.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context((folder / ".lock").open("a"))
        except OSError:
            handle = None
        deadline_s = time.monotonic() + _ALONE_S
        while handle is not None and time.monotonic() < deadline_s:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                say("waiting for another worker that compiles the same", None)
                time.sleep(_POLL_S)
            except OSError:
                break
        yield


def _packed(files: ModelFiles, shape: DecoderShape, kind: str, key: str, say: Stage) -> dict[str, NDArray[Any]]:
    """The packed weights, from the cache where it has them."""
    cache = WeightCache(default_cache_dir() / "packed")
    arrays = cache.load(key)
    if arrays is None:
        from .compiled_weights import pack

        arrays = pack(files, shape, kind, lambda share: say("loading weights", share))
        if sum(array.nbytes for array in arrays.values()) >= _CACHED_FROM_BYTES and cache.save(key, arrays):
            arrays = cache.load(key) or arrays  # the mapped file, which other workers share
    return arrays


def _step_arrays(plan: StepPlan, block_size: int) -> StepArrays:
    """The rows of a checked plan, flattened."""
    tokens: list[int] = []
    tables: list[int] = []
    sampled: list[int] = []
    rows = np.empty((len(plan.rows), 4), dtype=np.int64)
    for index, row in enumerate(plan.rows):
        length, offset = len(row.token_ids), len(tokens)
        rows[index] = offset, row.start, length, len(tables)
        tokens.extend(row.token_ids)
        tables.extend(row.block_ids[: -(-(row.start + length) // block_size)])
        if row.sample is not None:
            sampled.append(offset + length - 1)
    return StepArrays(
        tokens_T=np.array(tokens, dtype=np.int64),
        rows_B4=rows,
        tables=np.array(tables, dtype=np.int64),
        sampled_R=np.array(sampled, dtype=np.int64),
    )
