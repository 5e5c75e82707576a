"""Packs a model's files for the compiled kernels, tensor by tensor. Loads torch: the readers of files speak it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.compiled.decoder_weights import DecoderShape, build_weights
from ..models.reference import ModelFiles
from .forward import Progress
from .weight_source import check_shapes, expected_shapes
from .weights import open_weights


@torch.inference_mode()
def pack(files: ModelFiles, shape: DecoderShape, kind: str, progress: Progress) -> dict[str, NDArray[Any]]:
    """Every packed array by name. `kind`: `float32`, `bfloat16` or `w8a8`. ModelError naming what is wrong."""
    source = open_weights(files)
    check_shapes(files.config, source)
    total = sum(torch.Size(expected).numel() for expected in expected_shapes(files.config).values())
    done = 0

    def read(name: str) -> NDArray[np.float32]:
        nonlocal done
        # A copy: views of a mapped file would keep its pages in memory.
        tensor: NDArray[np.float32] = source.read(name).to(torch.float32, copy=True).numpy()
        source.release()
        done += tensor.size
        progress(done / total)
        return tensor

    return build_weights(shape, kind, read).arrays()
