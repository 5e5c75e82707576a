"""A device's memory lies on a GPU where there is one, else in CPU tensors, with kernels in Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `ends`

import triton_here

WHERE = triton_here.choose()


@pytest.fixture(scope="session")
def where() -> str:
    """`cuda`, or `cpu` for the interpreter."""
    return WHERE
