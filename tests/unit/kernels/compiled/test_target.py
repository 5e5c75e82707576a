from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tandem.kernels import dispatch
from tandem.kernels.compiled import check, linear
from tandem.kernels.compiled.target import TARGET, code_folder, detect

AVX2 = {"avx2": True, "fma": True}
AVX512 = {**AVX2, "avx512f": True, "avx512bw": True, "avx512vl": True, "avx512dq": True}
DOT = {**AVX512, "avx512bf16": True, "avx512vnni": True}
SELECTED = """
import dataclasses, sys
import llvmlite.binding as llvm, llvmlite.ir as ir
from tandem.kernels.compiled import tile

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
tile.TARGET = dataclasses.replace(tile.TARGET, native=True)
module = ir.Module()
module.triple = "x86_64-unknown-linux-gnu"
for form in tile.USED_FORMS:
    for rows in (1, tile.FULL_ROWS):
        tile.tile_function(module, form, rows, tile.PANELS_AT_ONCE[rows]).linkage = "external"
machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu="znver4", opt=3)
parsed = llvm.parse_assembly(str(module))
parsed.verify()
sys.stdout.write(machine.emit_assembly(parsed))
"""


@pytest.mark.parametrize(
    ("features", "isa", "width"),
    [({}, "generic", 4), ({"neon": True}, "generic", 4), (AVX2, "avx2", 8), (AVX512, "avx512", 16),
     (DOT, "avx512_bf16", 16)],
)  # fmt: skip
def test_the_widest_level_is_taken(features: dict[str, bool], isa: str, width: int) -> None:
    target = detect("some-cpu", features, None)
    assert (target.isa, target.width, target.native) == (isa, width, True)


def test_a_level_that_is_asked_for_is_emulated_where_it_lacks() -> None:
    target = detect("znver3", AVX2, "avx512_bf16")
    assert (target.isa, target.width, target.native) == ("avx512_bf16", 16, False)
    assert "emulated: znver3 lacks avx512f" in target.reason
    assert detect("znver4", DOT, "avx2").native
    with pytest.raises(ValueError, match="TANDEM_CPU_ISA: 'avx3' is not one of generic, avx2"):
        detect("znver3", AVX2, "avx3")


def test_compiled_code_has_a_folder_of_its_level() -> None:
    assert code_folder().name.startswith(f"{TARGET.isa}-")


def run_as(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TANDEM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="assembles for x86-64 Linux")
def test_the_levels_own_instructions_are_selected_and_sums_stay_in_registers() -> None:
    done = run_as("avx512_bf16", "-c", SELECTED)
    assert done.returncode == 0, done.stderr
    lines = [line.split("#")[0].strip() for line in done.stdout.splitlines()]
    for instruction in ("vfmadd", "vdpbf16ps", "vpdpbusd"):
        chosen = [line for line in lines if line.startswith(instruction)]
        assert chosen, instruction
        assert any("zmm" in line for line in chosen), instruction
    assert not [line for line in lines if "zmm" in line and "(%rsp" in line]


@pytest.mark.parametrize("isa", ["generic", "avx512_bf16"])
def test_products_and_functions_hold_at_other_levels(isa: str) -> None:
    """Other widths and packings, emulated where this processor lacks their instructions."""
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_simd.py", "test_compiled_linear.py")]
    done = run_as(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not blocks_of_rows", *files)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_check_at_start_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.wrong_product() is None
    right = linear.product
    monkeypatch.setattr(linear, "product", lambda packed, x: right(packed, np.roll(x, 1, axis=1)))
    assert "a float32 product on" in str(check.wrong_product())


def test_a_wrong_product_leaves_the_work_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "problem", lambda: "a product is off")
    picked = dispatch.pick("auto")
    assert picked.kernels == "torch"
    assert "a product is off" in picked.reason
    with pytest.raises(ValueError, match="a product is off"):
        dispatch.pick("compiled")
