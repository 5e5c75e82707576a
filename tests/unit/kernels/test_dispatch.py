"""What computes where numba is there and yet cannot be used: torch, with a reason, and no worker dies of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tandem.kernels import dispatch

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
