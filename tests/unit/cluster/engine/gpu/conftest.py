"""Runs the GPU engine's tests on a GPU where there is one, else on CPU tensors, its kernels in Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # modules that these tests share
sys.path.insert(0, str(Path(__file__).parents[4] / "common"))

import triton_here

WHERE = triton_here.choose()


@pytest.fixture(scope="session")
def where() -> str:
    """The device that the engine computes on: `cuda`, or `cpu` for the interpreter."""
    return WHERE


@pytest.fixture(params=["triton", "torch", "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Who computes between the products."""
    return str(request.param)


@pytest.fixture
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Padding of an interpreted decode step's work list is computed one program after another: for two instead of 132
    multiprocessors there is little.
    """
    if where == "cpu":
        from tandem.cluster.engine.gpu import inputs

        monkeypatch.setattr(inputs, "multiprocessors", lambda device: 2)
