"""Kernels that other kernels call by address: compiled once, and not again inside everything that calls them.

What numba compiles contains all that it calls, at every level anew. A large kernel called through its address, which
its caller finds among the words it is given, is compiled once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import sigutils
from numba.core.ccallback import CFunc

from .code_cache import CodeCache
from .emit import I64, operation
from .target import OPTIONS, code_folder


@functools.cache
def entry(kernel: Callable[..., Any]) -> Any:
    """A kernel of int64 arguments and no result, compiled (or loaded) to be called from outside; `.address` says where.

    It must be kept as long as it may be called.
    """
    function = kernel.py_func  # type: ignore[attr-defined]
    signature = types.void(*[types.int64] * function.__code__.co_argcount)
    options = {"error_model": OPTIONS["error_model"], "boundscheck": OPTIONS["boundscheck"]}
    callback: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
    callback._cache = CodeCache(function, code_folder(), form="entry")
    callback.compile()
    return callback


def entry_call(arguments: int) -> Any:
    """Kernel function (address, arguments …): calls an entry of so many int64 arguments."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * arguments)

    def call(b: ir.IRBuilder, address: Any, *values: Any) -> None:
        b.call(b.inttoptr(address, kind.as_pointer()), values)

    names = ["b", "address", *(f"argument_{index}" for index in range(arguments))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return operation(types.void, *[types.int64] * (arguments + 1))(call)
