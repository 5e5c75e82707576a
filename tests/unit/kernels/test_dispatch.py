"""Who computes, and why: without numba, without a GPU, with one that lacks something. No worker dies of it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tandem.cluster.config import EngineConfig
from tandem.cluster.config_schema import ConfigError, OneOf
from tandem.kernels import dispatch
from tandem.kernels.picked import Picked

_BROKEN = """
raise RuntimeError("Numba needs another NumPy.\\nGot this one.")
"""
_SCRIPT = """
from tandem.cluster.cli_doctor import _kernels
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.models.reference import resolve_model

files = resolve_model("dummy:tiny-llama")
options = {"dtype": "float32", "block_size": 4, "kv_cache_bytes": 2**20}
device = CpuDevice(files, kernels="auto", **options)
print(device.picked.kernels, device.picked.reason)
print(*_kernels())
for wanted in ({"kernels": "compiled"}, {"kernels": "auto", "quantization": "w8a8"}):
    try:
        CpuDevice(files, **wanted, **options)
    except ValueError as error:
        print(error)
"""


def test_numba_that_cannot_be_imported_leaves_the_work_to_torch(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text(_BROKEN)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reason = "numba cannot be imported (RuntimeError: Numba needs another NumPy.)"
    device, doctor, compiled, quantized = done.stdout.splitlines()
    assert device == doctor == f"torch compiled kernels cannot run here: {reason}"
    assert compiled == f"kernels: 'compiled' is not allowed: {reason}; allowed: auto, torch, reference"
    assert quantized == f"quantization: 'w8a8' is not allowed: it needs compiled kernels, and {reason}"


def test_numba_that_is_not_installed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'tandem-serve[engine]'" in str(dispatch.numba_problem.__wrapped__())


H100 = dispatch.GpuFacts(
    driver=True, torch="2.11.0", cuda="13.0", name="NVIDIA H100", capability=(9, 0), triton="3.6.0"
)


@pytest.mark.parametrize(
    ("lacks", "problem"),
    [
        ({"driver": False}, "no GPU: the system has no device of NVIDIA's driver"),
        ({"torch": ""}, "torch is not installed (pip install 'tandem-serve[engine,gpu]')"),
        ({"torch": "2.13.0+cpu", "cuda": ""}, "torch 2.13.0+cpu is built without CUDA"),
        ({"name": ""}, "no GPU: torch 2.11.0 (CUDA 13.0) sees no device"),
    ],
)
def test_without_a_gpu_nothing_is_picked_for_one(lacks: dict[str, Any], problem: str) -> None:
    facts = dataclasses.replace(H100, **lacks)
    assert dispatch.gpu_problem(facts) == problem
    for kernels in dispatch.ON_GPU:
        with pytest.raises(ValueError, match="device: 'cuda' is not allowed: ") as refused:
            dispatch.pick_gpu(kernels, facts)
        assert str(refused.value).endswith(f"{problem}; allowed: cpu, paced")


def test_a_gpu_is_computed_on_by_triton() -> None:
    assert dispatch.gpu_problem(H100) is None
    picked = dispatch.pick_gpu("auto", H100)
    assert picked == dispatch.pick_gpu("triton", H100)
    assert picked == Picked("triton", "NVIDIA H100, sm_90, triton 3.6.0, CUDA 13.0")


@pytest.mark.parametrize(
    ("lacks", "unsupported", "problem"),
    [
        ({"triton": ""}, None, "triton is not installed (pip install 'tandem-serve[gpu]')"),
        ({"triton": "3.5.1"}, None, "triton 3.5.1 is older than 3.6 (pip install 'tandem-serve[gpu]')"),
        ({"triton": "odd"}, None, "triton odd is older than 3.6 (pip install 'tandem-serve[gpu]')"),
        ({"name": "Tesla T4", "capability": (7, 5)}, None, "Tesla T4 is sm_75, older than sm_80"),
        ({}, "head_dim 512 is not in 16…256", "head_dim 512 is not in 16…256"),
    ],
)
def test_where_triton_cannot_run_torch_does(lacks: dict[str, Any], unsupported: str | None, problem: str) -> None:
    facts = dataclasses.replace(H100, **lacks)
    picked = dispatch.pick_gpu("auto", facts, None, unsupported)
    reason = f"Triton kernels cannot run here: {problem}; decode steps are not captured"
    assert picked == Picked("torch", reason)
    with pytest.raises(ValueError, match="kernels: 'triton' is not allowed: ") as refused:
        dispatch.pick_gpu("triton", facts, None, unsupported)
    assert str(refused.value).endswith(f"{problem}; allowed: auto, torch, reference")
    with pytest.raises(
        ValueError, match="quantization: 'w8a8' is not allowed: it needs Triton kernels, and "
    ) as refused:
        dispatch.pick_gpu("auto", facts, "w8a8", unsupported)
    assert str(refused.value).endswith(problem)


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_what_is_asked_for_is_picked_on_a_gpu(kernels: str) -> None:
    reason = "asked for; decode steps are not captured"
    assert dispatch.pick_gpu(kernels, H100) == Picked(kernels, reason)
    for quantization in ("w8a8", "w4a16"):
        assert dispatch.pick_gpu("auto", H100, quantization).kernels == "triton"
        with pytest.raises(ValueError, match=f"'{quantization}' is not allowed: .* and kernels is '{kernels}'"):
            dispatch.pick_gpu(kernels, H100, quantization)


def test_kernels_of_another_device_are_named_so() -> None:
    with pytest.raises(ValueError, match="kernels: 'compiled' is not allowed on a GPU; allowed: one of auto, triton"):
        dispatch.pick_gpu("compiled", H100)
    with pytest.raises(ValueError, match="kernels: 'triton' is not allowed on processors; allowed: one of auto, compi"):
        dispatch.pick("triton")
    for pick in (dispatch.pick, lambda kernels: dispatch.pick_gpu(kernels, H100)):
        with pytest.raises(ValueError, match="kernels: 'tritn' is not allowed; allowed: one of auto"):
            pick("tritn")
    assert set(dispatch.KERNELS) == set(dispatch.ON_CPU) | set(dispatch.ON_GPU)
    with pytest.raises(ConfigError, match="kernels: 'triton' is not allowed; allowed: auto, compiled, torch or ref"):
        EngineConfig(kernels="triton")
    assert get_args(get_type_hints(EngineConfig, include_extras=True)["kernels"])[1] == OneOf(dispatch.KERNELS)


def test_facts_of_this_machine_are_told_without_a_gpu() -> None:
    facts = dispatch.gpu_facts()
    assert facts.torch == torch.__version__
    if not torch.cuda.is_available():
        assert dispatch.gpu_problem(facts) is not None


def test_facts_are_of_the_gpu_that_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", {None: "current", torch.device("cuda:1"): "A100"}.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {None: (9, 0), torch.device("cuda:1"): (8, 0)}.get)
    second = dispatch.gpu_facts(torch.device("cuda:1"))
    assert (second.name, second.capability) == ("A100", (8, 0))
    assert dispatch.gpu_facts().name == "current"


def test_operations_are_the_modules_that_ship_kernels() -> None:
    folder = Path(dispatch.__file__).parent / "gpu"
    ship = {path.stem for path in folder.glob("*.py") if "\nSHIPPED = " in path.read_text()}
    assert set(dispatch.GPU_OPERATIONS) == ship
