"""A model computed by `kernels.compiled`: one native call a step, without the interpreter lock.

Packed weights come from the cache on disk where it has them: then neither torch nor the model's files are read, and all
workers of a machine share one copy in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...kernels.compiled.code_cache import once
from ...kernels.compiled.decoder import CompiledModel, StepArrays
from ...kernels.compiled.decoder_weights import DecoderShape, DecoderWeights, unsupported, weights_from_arrays
from ...kernels.compiled.file_lock import alone
from ...kernels.compiled.packed import layout
from ...kernels.compiled.target import code_folder
from ..models.config import ModelConfig
from ..models.fetch import default_cache_dir
from ..models.reference import ModelFiles
from .fingerprint import weights_stamp
from .forward import Forward, Stage
from .plan import StepPlan
from .positions import OPT_POSITION_OFFSET, inverse_frequencies
from .weight_cache import WeightCache

__all__ = ["CompiledForward", "decoder_shape", "unsupported"]

_CACHED_FROM_BYTES = 32 * 2**20
"""Packing less takes no time worth a file."""

logger = logging.getLogger(__name__)


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
        weights = _weights(files, shape, kind, f"{fingerprint}-{layout(kind)}-{weights_stamp(files)}", say)
        with once(code_folder(), "decoder", lambda: say("waiting for another worker that compiles the same", None)):
            say("kernels", None)
            self._model = CompiledModel(shape, kind, weights, threads=threads, cpus=cpus)
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


def _weights(files: ModelFiles, shape: DecoderShape, kind: str, key: str, say: Stage) -> DecoderWeights:
    """The packed weights, from the cache where it has them; else one process of this machine packs them."""
    cache = WeightCache(default_cache_dir() / "packed")
    found = _cached(cache, key, shape, kind)
    if found is not None:
        return found
    with alone(code_folder() / f".{key}.lock", lambda: say("waiting for another worker that packs the same", None)):
        found = _cached(cache, key, shape, kind)
        if found is not None:
            return found
        from .compiled_weights import pack

        arrays = pack(files, shape, kind, lambda share: say("loading weights", share))
        if sum(array.nbytes for array in arrays.values()) >= _CACHED_FROM_BYTES and cache.save(key, arrays):
            found = _cached(cache, key, shape, kind)  # the mapped file, which other workers share
        return found or weights_from_arrays(shape, kind, arrays)


def _cached(cache: WeightCache, key: str, shape: DecoderShape, kind: str) -> DecoderWeights | None:
    arrays = cache.load(key)
    if arrays is None:
        return None
    try:
        return weights_from_arrays(shape, kind, arrays)
    except ValueError as error:
        logger.warning("packed weights %s are not used, and packed anew: %s", key, error)
        return None


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
