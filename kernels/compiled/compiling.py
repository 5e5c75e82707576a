"""Whether a start compiles kernels or finds them compiled: only the folder of compiled code knows. Loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TELL: ContextVar[Callable[[], None] | None] = ContextVar("tell", default=None)


@contextmanager
def telling(tell: Callable[[], None]) -> Iterator[None]:
    """Inside, in this thread, `tell` is called before each function that is compiled because it was not kept."""
    before = _TELL.set(tell)
    try:
        yield
    finally:
        _TELL.reset(before)


def told() -> None:
    """One is about to be compiled."""
    tell = _TELL.get()
    if tell is not None:
        tell()
