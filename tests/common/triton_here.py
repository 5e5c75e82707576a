"""Which Triton computes in tests: the GPU's compiler where there is a GPU, else the interpreter, on CPU tensors.

Triton reads `TRITON_INTERPRET` when a kernel is defined, its own library's included: `choose` is called while tests are
collected, before any of them imports triton.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

_MENDED_IN = (3, 7)


def choose() -> str:
    """`cuda`, or `cpu` for the interpreter: where tests' tensors lie. Once or more often, from conftests."""
    if torch.cuda.is_available():
        return "cuda"
    os.environ["TRITON_INTERPRET"] = "1"
    triton: Any = importlib.import_module("triton")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if not isinstance(triton.language.sum, interpreter.InterpretedFunction):
        raise RuntimeError("triton was imported before TRITON_INTERPRET was set: its kernels cannot be interpreted")
    if tuple(map(int, triton.__version__.split(".")[:2])) < _MENDED_IN:
        _mend(interpreter)
    return "cpu"


def _mend(interpreter: Any) -> None:
    """Lets scalars be bounds of loops: older interpreters take an array of one number for an integer, which numpy
    deprecates since 1.25 and refuses since 2.4 (https://github.com/triton-lang/triton/issues/9171).
    """
    patch = interpreter._patch_lang_tensor
    if getattr(patch, "mends", False):
        return

    def mended(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    mended.mends = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = mended
