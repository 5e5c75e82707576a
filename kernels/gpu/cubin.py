"""Compiles kernels for a GPU that is not there, and tells what they would take of it: registers, shared memory, spills.

`python -m tandem.kernels.gpu.cubin` compiles every configuration that any module of this package ships (`SHIPPED`), for
each of its architectures, and prints a table; exit status 1 where one exceeds its architecture's limits. Triton's
interpreter must be off (no `TRITON_INTERPRET`): interpreted functions cannot be compiled.

Usage is read from the cubin by the `cuobjdump` that comes with triton. A thread's stack frame counts as spilled, as
Triton itself counts it (`CompiledKernel.n_spills`): Triton's code has no other use for one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a block of threads may take (CUDA C++ Programming Guide, "Technical Specifications", by capability)."""

    registers_per_thread: int = 255
    registers_per_block: int = 65_536
    shared_bytes: int
    """Dynamic shared memory that a block can have where it asks for it."""


LIMITS = {
    80: Limits(shared_bytes=163 * 1024),
    86: Limits(shared_bytes=99 * 1024),
    90: Limits(shared_bytes=227 * 1024),
    120: Limits(shared_bytes=99 * 1024),
}
"""By architecture: 80 is the A100, 90 the H100 and H200; 86 (A40) and 120 (RTX 50) stand for those with less."""
USUAL = (80, 90)
"""What a configuration is compiled for that the others run alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One configuration that a kernel is shipped with: its arguments' types, its constants and how it is launched."""

    label: str
    """What tells it from the kernel's other configurations."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Triton's type of every argument that is no constant: `*bf16`, `i32`, `i64`, `fp32` …"""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    divisible: Sequence[str] = ()
    """Integer arguments that are multiples of 16 in practice, as Triton finds at launch. Pointers always are."""
    architectures: Sequence[int] = USUAL


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled configuration takes."""

    kernel: str
    label: str
    architecture: int
    registers: int
    """Per thread."""
    shared_bytes: int
    """Per block."""
    spill_bytes: int
    """Of local memory, per thread."""
    threads: int
    """Per block."""

    def problem(self) -> str | None:
        """Which limit of its architecture it exceeds, or None."""
        limits = LIMITS[self.architecture]
        if self.registers > limits.registers_per_thread:
            return f"{self.registers} registers per thread, of {limits.registers_per_thread}"
        if self.registers * self.threads > limits.registers_per_block:
            return f"{self.registers} registers for each of {self.threads} threads, of {limits.registers_per_block}"
        if self.shared_bytes > limits.shared_bytes:
            return f"{self.shared_bytes} bytes of shared memory, of {limits.shared_bytes}"
        return None


def compile_build(build: Build, architecture: int) -> Usage:
    """Compiles to a cubin (kept in Triton's cache). Raises what Triton raises where the kernel does not compile."""
    names = build.kernel.arg_names
    missing = set(names) ^ (set(build.signature) | set(build.constants))
    if missing:
        raise ValueError(f"signature: {sorted(missing)} of {build.kernel.__name__} must be a type or a constant, once")
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    multiples = [name for name, type_ in signature.items() if type_.startswith("*") or name in build.divisible]
    source = ASTSource(
        build.kernel,
        signature,
        constexprs=dict(build.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack_bytes = _resources(compiled.asm["cubin"])
    threads = build.num_warps * 32
    name = build.kernel.__name__
    return Usage(name, build.label, architecture, registers, compiled.metadata.shared, stack_bytes, threads)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack frame per thread of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no resource usage: {told!r}")
    return int(found[1]), int(found[2])


def shipped() -> list[tuple[str, int]]:
    """Module and index in its `SHIPPED` of every configuration of this package."""
    found = []
    package = importlib.import_module(__package__ or "")
    for entry in pkgutil.iter_modules(package.__path__):
        if f"{package.__name__}.{entry.name}" == __spec__.name:
            continue
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        found += [(module.__name__, index) for index in range(len(getattr(module, "SHIPPED", ())))]
    return found


def _compile_one(module: str, index: int, architecture: int) -> Usage | str:
    build = importlib.import_module(module).SHIPPED[index]
    if architecture not in build.architectures:
        return ""
    try:
        return compile_build(build, architecture)
    except Exception as error:  # whatever Triton, LLVM or ptxas find wrong: told with the kernel's name, others go on
        return f"{build.kernel.__name__} {build.label} sm_{architecture}: {type(error).__name__}: {error}"


def compile_shipped(processes: int) -> tuple[list[Usage], list[str]]:
    """Usage of everything shipped, and what did not compile."""
    jobs = [(module, index, architecture) for module, index in shipped() for architecture in LIMITS]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = list(pool.map(_compile_one, *zip(*jobs, strict=True))) if jobs else []
    usages = [result for result in results if isinstance(result, Usage)]
    return usages, [result for result in results if isinstance(result, str) and result]


def table(usages: Sequence[Usage]) -> str:
    """For people: a row per kernel, configuration and architecture."""
    heads = ("kernel", "configuration", "target", "regs/thread", "shared KiB", "spilled B/thread", "threads")
    rows = [
        (
            u.kernel,
            u.label,
            f"sm_{u.architecture}",
            u.registers,
            f"{u.shared_bytes / 1024:.1f}",
            u.spill_bytes,
            u.threads,
        )
        for u in usages
    ]
    lines = [heads, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tandem.kernels.gpu.cubin", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object: usages, failures")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted functions cannot be compiled")
    usages, failures = compile_shipped(options.processes)
    if options.json:
        print(json.dumps({"usages": [asdict(usage) for usage in usages], "failures": failures}))
    else:
        print(table(usages))
        print(f"triton {triton.__version__}, {len(usages)} compiled", *failures, sep="\n")
    return 1 if failures or any(usage.problem() for usage in usages) else 0


if __name__ == "__main__":
    sys.exit(main())
