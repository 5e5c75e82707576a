"""The plans of a pipeline that the leader has begun and that are not done: a thread waits for them, so that the leader
can wait for something else, and one that is done is noticed while the leader computes the next.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from ..forward import Pending

CLOSE_S = 5.0
Finish = Callable[[], NDArray[np.float32]]


class UnderWay:
    """Owned by the thread that begins plans; the thread inside only waits, in plan order."""

    def __init__(self) -> None:
        self._plans: deque[Future[NDArray[np.float32]]] = deque()
        self._waits: queue.SimpleQueue[tuple[Finish, Future[NDArray[np.float32]]] | None] = queue.SimpleQueue()
        self._wake: threading.Event | None = None
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        self._thread.start()

    def add(self, finish: Finish) -> Pending:
        """A plan has been begun, and `finish` waits for its logits. The answer gives them, or raises what `finish`
        raised; it is called in plan order.
        """
        done: Future[NDArray[np.float32]] = Future()
        self._plans.append(done)
        self._waits.put((finish, done))

        def pending() -> NDArray[np.float32]:
            oldest = self._plans.popleft()
            assert oldest is done, "a plan was collected before an older one"
            return done.result()

        return pending

    def done(self) -> bool:
        """Whether the oldest plan that is under way is done."""
        return bool(self._plans) and self._plans[0].done()

    def wait(self, wake: threading.Event) -> bool:
        """As `Device.wait`. False also where nothing is under way."""
        self._wake = wake  # before the look: from now on the end of a plan sets it
        if not self._plans:
            return False
        oldest = self._plans[0]
        if not oldest.done():
            wake.wait()
        return oldest.done()

    def close(self) -> None:
        """Once nothing that is under way can come any more; idempotent."""
        self._waits.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (next_one := self._waits.get()) is not None:
            finish, done = next_one
            try:
                done.set_result(finish())
            except BaseException as error:
                done.set_exception(error)
            if self._wake is not None:
                self._wake.set()
