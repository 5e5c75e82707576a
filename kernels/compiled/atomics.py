"""What threads of a team need of the processor: int64 words that all of them see, and waiting for one another."""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types

from .emit import ADDRESS, I32, I64, call, operation, pointer


@operation(types.int64, ADDRESS, types.int64)
def atomic_add(b, address, value):
    """Add to the int64 at an 8-aligned address; what it held before. Sequentially consistent, as all of these."""
    return b.atomic_rmw("add", pointer(b, address, I64), value, "seq_cst")


@operation(types.int64, ADDRESS)
def atomic_load(b, address):
    """The int64 at an 8-aligned address, as another thread wrote it."""
    return b.load_atomic(pointer(b, address, I64), "seq_cst", 8)


@operation(types.void, ADDRESS, types.int64)
def atomic_store(b, address, value):
    """Write an int64 for other threads to see."""
    b.store_atomic(value, pointer(b, address, I64), "seq_cst", 8)


@operation(types.void)
def pause(b):
    """Tell the processor that this thread spins."""
    if b.module.triple.startswith(("x86_64", "i686")):
        call(b, "llvm.x86.sse2.pause", ir.VoidType())
    elif b.module.triple.startswith(("aarch64", "arm64")):
        call(b, "llvm.aarch64.hint", ir.VoidType(), I32(1))


@operation(types.void)
def sched_yield(b):
    """Let another thread run on this core (POSIX sched_yield)."""
    call(b, "sched_yield", I32)
