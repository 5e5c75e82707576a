"""Everything that is shipped compiles for every architecture, within its limits, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tandem.kernels.gpu.cubin import LIMITS, Usage, table

KERNEL = """
import triton
import triton.language as tl
from tandem.kernels.gpu.cubin import Build

@triton.jit
def doubled(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < count) * 2, mask=at < count)

def build(**changes):
    given = dict(label="fp16", kernel=doubled, signature={"x_ptr": "*fp16", "y_ptr": "*fp16", "count": "i32"})
    return Build(**(given | dict(constants={"BLOCK": 1024}, num_warps=4) | changes))
"""


def run(arguments: list[str], cwd: Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Python with Triton's compiler instead of its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.parametrize("architecture", LIMITS)
def test_usage_is_read_from_the_cubin(tmp_path: Path, architecture: int) -> None:
    (tmp_path / "made.py").write_text(KERNEL)
    program = f"""
from made import build
from tandem.kernels.gpu.cubin import compile_build
usage = compile_build(build(), {architecture})
assert 8 <= usage.registers <= 64 and usage.spill_bytes == 0 and usage.shared_bytes == 0 and usage.threads == 128, usage
assert usage.problem() is None
try:
    compile_build(build(signature={{"x_ptr": "*fp16"}}), {architecture})
except ValueError as error:
    assert "['count', 'y_ptr'] of doubled" in str(error)
else:
    raise AssertionError("a type is missing")
"""
    result = run(["-c", program], tmp_path)
    assert result.returncode == 0, result.stderr


def test_limits_are_per_architecture() -> None:
    fits = Usage("k", "c", 90, 128, 200 * 1024, 0, 512)
    assert fits.problem() is None
    assert "204800 bytes of shared memory, of 166912" in (Usage("k", "c", 80, 128, 200 * 1024, 0, 512).problem() or "")
    assert "each of 1024 threads" in (Usage("k", "c", 90, 65, 0, 0, 1024).problem() or "")
    assert "256 registers per thread" in (Usage("k", "c", 90, 256, 0, 0, 128).problem() or "")
    assert "sm_90   128          200.0       0                 512" in table([fits])


def test_the_interpreter_cannot_compile(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tandem.kernels.gpu.cubin"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_everything_shipped_compiles_within_its_limits(tmp_path: Path) -> None:
    result = run(["-m", "tandem.kernels.gpu.cubin", "--json"], tmp_path)
    assert result.stdout.startswith("{"), result.stderr
    told = json.loads(result.stdout)
    assert told["failures"] == []
    usages = [Usage(**usage) for usage in told["usages"]]
    assert usages
    assert [f"{usage.kernel} {usage.label}: {usage.problem()}" for usage in usages if usage.problem()] == []
    assert [usage for usage in usages if usage.spill_bytes > 128] == [], "a few registers at most"
    assert result.returncode == 0
