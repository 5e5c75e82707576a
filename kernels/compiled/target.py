"""What the kernels are compiled for: the processor's vector width and instructions, and the folder of compiled code.

`TARGET` is read from the processor once, at import. TANDEM_CPU_ISA names another level (`ISAS`): code of a wider level
runs on any processor, only slowly, because LLVM legalizes what is not one instruction there; what needs an instruction
that is missing is emulated with the same operands (`Target.native`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba

from .code_cache import CodeCache

ISA_ENVIRONMENT = "TANDEM_CPU_ISA"
ISAS = {"generic": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}
"""Levels, each with its float32 lanes per vector. `avx512_bf16` means vdpbf16ps and vpdpbusd; `generic` NEON or SSE."""
_NEEDS = {
    "generic": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """One level of instructions, and whether this processor has it."""

    isa: str
    width: int
    """float32 lanes of a vector."""
    native: bool
    """Whether the level's own instructions exist here; if not, they are emulated."""
    cpu: str
    """LLVM's name of this processor."""
    reason: str
    """Why this level, for a person to read."""

    @property
    def registers(self) -> int:
        """Vector registers that a tile may count on."""
        return 16 if self.isa == "avx2" or self.x86_generic else 32

    @property
    def x86_generic(self) -> bool:
        """Whether this is an x86 without AVX2."""
        return self.isa == "generic" and llvm.get_process_triple().startswith(("x86_64", "i686"))


def detect(cpu: str, features: dict[str, bool], wanted: str | None) -> Target:
    """The level for a processor with LLVM's `features`; `wanted` is TANDEM_CPU_ISA's value.

    ValueError if `wanted` is not one of `ISAS`.
    """

    def has(isa: str) -> bool:
        return all(features.get(feature, False) for feature in _NEEDS[isa])

    if wanted:
        if wanted not in ISAS:
            raise ValueError(f"{ISA_ENVIRONMENT}: {wanted!r} is not one of {', '.join(ISAS)}")
        reason = f"{ISA_ENVIRONMENT}={wanted}"
        if not has(wanted):
            reason += f", emulated: {cpu} lacks {', '.join(f for f in _NEEDS[wanted] if not features.get(f, False))}"
        return Target(wanted, ISAS[wanted], has(wanted), cpu, reason)
    best = [isa for isa in ISAS if has(isa)][-1]
    return Target(best, ISAS[best], True, cpu, f"the widest that {cpu} has")


TARGET = detect(llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features()), os.environ.get(ISA_ENVIRONMENT))


OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}
"""How kernels are compiled. No fast-math: sums keep their order, and only an explicit `simd.fma` is fused, so that a
result does not depend on what was compiled around it."""


@functools.cache
def code_folder() -> Path:
    """Where compiled code is kept: one folder per level, processor, compiler and source of these kernels.

    What a kernel calls is compiled into it; hence the hash over all sources.
    """
    configured = os.environ.get("TANDEM_CACHE")
    root = Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tandem"
    digest = hashlib.blake2b(digest_size=8)
    for part in (
        sys.version,
        numba.__version__,
        llvmlite.__version__,
        str(numba.config.OPT),
        llvm.llvm_version_info,
        TARGET.cpu,
        llvm.get_host_cpu_features().flatten(),
    ):
        digest.update(repr(part).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return root.expanduser() / "kernels" / f"{TARGET.isa}-{digest.hexdigest()}"


def kernel(function: Callable[..., Any] | None = None, *, inline: bool = False) -> Any:
    """Decorator: compile at the first call for `TARGET`, without the interpreter lock, and keep the code on disk.

    `inline`: always into its caller (small helpers over vectors).
    """
    if function is None:
        return functools.partial(kernel, inline=inline)
    compiled = numba.njit(forceinline=inline, **OPTIONS)(function)
    compiled._cache = CodeCache(function, code_folder())
    return compiled
