"""Where the scales of narrow KV memory come from: a file, or the checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from ...config_engine import EngineConfig
from ...models.reference import ModelFiles
from ..kv_scales import KVScales, checkpoint_scales
from ..narrow_kv import NarrowKV

logger = logging.getLogger(__name__)


def narrow_kv(config: EngineConfig, files: ModelFiles) -> NarrowKV | None:
    """What an engine's KV is held by; None: as its numbers are. ValueError naming `kv_scales` for a file that cannot be
    read or is of a model of another shape, ModelError for the checkpoint's.
    """
    if config.kv_cache_dtype == "auto":
        return None
    dtype = config.kv_dtype
    if config.kv_scales is not None:
        found = KVScales.load(Path(config.kv_scales).expanduser(), files.config)
        if found.model != files.name:
            logger.warning("kv_scales: %s was made for %s, the model is %s", config.kv_scales, found.model, files.name)
        return NarrowKV.by(dtype, found.scales(dtype))
    own = checkpoint_scales(files)
    if own is not None:
        logger.info("kv_cache_dtype %s: by the checkpoint's own scales", config.kv_cache_dtype)
        return NarrowKV.by(dtype, own.scales(dtype))
    logger.warning(
        "kv_cache_dtype %s: the checkpoint has no scales; every one is 1, so that what is beyond 448 is cut off "
        "(`tandem calibrate` makes kv_scales)",
        config.kv_cache_dtype,
    )
    shape = (files.config.num_layers, 2, files.config.num_kv_heads)
    return NarrowKV.by(dtype, np.ones(shape, np.float32))
