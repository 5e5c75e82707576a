"""Runs the GPU kernels' tests: on a GPU where there is one, else in Triton's interpreter, on CPU tensors.

This folder needs torch, triton, numpy, pytest and hypothesis, and `tandem.kernels` on the path: `make test-gpu` runs it
without the conftests above it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules that these tests share
sys.path.insert(0, str(Path(__file__).parents[3] / "common"))

import triton_here

WHERE = triton_here.choose()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests' tensors lie: `cuda`, or `cpu` for the interpreter."""
    return torch.device(WHERE)


@pytest.fixture
def seeded(device: torch.device) -> torch.Generator:
    """A generator on the device with a fixed seed."""
    return torch.Generator(device=device).manual_seed(0)


def pytest_report_header() -> str:
    """Which of the two it is."""
    import triton

    if torch.cuda.is_available():
        return f"GPU kernels: {torch.cuda.get_device_name()}, triton {triton.__version__}, torch {torch.__version__}"
    return f"GPU kernels: no GPU here, triton {triton.__version__} interprets them; Python {sys.version.split()[0]}"
