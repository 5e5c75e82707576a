"""Work that one process of a machine should do while the others wait for what it makes: by a lock on a file."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ALONE_S = 300.0
"""How long `alone` waits for another process."""
_POLL_S = 0.05
Wait = Callable[[], None]


@contextmanager
def alone(path: Path, wait: Wait | None = None) -> Iterator[None]:
    """One process of this machine at a time, by a lock on the file `path`; `wait` is called while another has it.

    The body should look first whether the other one did its work. Where no lock can be had, or not within `ALONE_S`,
    the work is done twice.
    """
    with ExitStack() as stack:
        handle = None
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(path.open("a"))
        deadline_s = time.monotonic() + ALONE_S
        while handle is not None and time.monotonic() < deadline_s:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if wait is not None:
                    wait()
                time.sleep(_POLL_S)
            except OSError:
                break
        yield
