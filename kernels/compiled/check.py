"""A small product of each kind against its formula, where the instructions that it runs on were in no test's reach."""

from __future__ import annotations

import functools

import numpy as np

from . import linear, packed
from .code_cache import once
from .target import TARGET, code_folder
from .tile import MAX_ROWS, NR

_INPUTS = 70
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "w8a8": 4e-2}
"""Of the largest output; rounding of weights and activations included."""


@functools.cache
def problem() -> str | None:
    """Why the compiled products cannot be trusted on this processor, or None.

    Only where its level has instructions of its own (vdpbf16ps, vpdpbusd): `linear` is compiled, or loaded, and run.
    """
    if not TARGET.native or TARGET.isa != "avx512_bf16":
        return None
    with once(code_folder(), "check"):
        return wrong_product()


def wrong_product() -> str | None:
    """The kind whose product differs from its formula, and by how much; None if none does."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((NR + 3, _INPUTS), np.float32)
    x = generator.standard_normal((MAX_ROWS + 1, _INPUTS), np.float32)
    want = x @ weight.T
    for kind, tolerance in _TOLERANCE.items():
        got = linear.product(packed.pack_weight(weight, kind), x)
        error = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
        if not error < tolerance:
            return f"a {kind} product on {TARGET.cpu} ({TARGET.isa}) is off by {error:.1%}"
    return None
