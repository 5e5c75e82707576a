"""A worker or a router inside this process, behind plain blocking calls: for Ray actors, plain processes and tests.

What a worker is made of is imported with the first worker, a router's with the first router.
Each member has an event loop in a thread of its own; `start` returns when it serves, `stop` when nothing of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from ..config import RouterConfig, WorkerConfig

if TYPE_CHECKING:
    from ..engine.parallel.rank_process import Recruit
    from .compose import WorkerRuntime
    from .compose_router import RouterRuntime

T = TypeVar("T")
Progress = Callable[[str, float | None], None]
"""(stage, share of it done or None)."""
logger = logging.getLogger(__name__)
STOP_TIMEOUT_S = 30.0
_ANSWER_S = 1.0


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Runs a coroutine on the loop and waits for it; TimeoutError, after cancelling it, when it takes longer."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancels what is left on the loop and ends the thread; idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
    await asyncio.get_running_loop().shutdown_default_executor()


class _Member:
    """What worker and router have in common."""

    _runtime: WorkerRuntime | RouterRuntime

    def __init__(self, name: str, progress: Progress | None, loop: asyncio.AbstractEventLoop) -> None:
        self._progress = progress
        self._host = _LoopThread(name, loop)
        self._stopped = False
        self._started = False

    def start(self, timeout_s: float) -> None:
        """Serves when it returns. Raises what went wrong, TimeoutError included, and leaves nothing behind then."""
        try:
            self._host.call(self._runtime.start(self._progress), timeout_s)
        except BaseException:
            self.stop()
            raise
        self._started = True

    def drain(self, timeout_s: float) -> bool:
        """Takes no new work and waits for what runs; False if some was left after `timeout_s`."""
        return self._host.call(self._runtime.drain(timeout_s), timeout_s + STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Ends everything; idempotent."""
        if self._stopped:
            return
        self._stopped = True
        try:
            self._host.call(self._runtime.stop(), STOP_TIMEOUT_S)
        finally:
            self._host.close()

    def healthy(self) -> bool:
        """Whether it serves."""
        return self._started and not self._stopped

    def why_not_serving(self) -> str:
        """A router's: empty once a request could be served. A worker has nothing to say."""
        return ""

    def warning(self) -> str:
        """One line for the operator of a member that has started; empty where there is nothing to say."""
        return ""


class WorkerMember(_Member):
    """One worker. `on_failure` is called, on its loop, when its engine dies: the process should end then. `on_leave` is
    called there too, when somebody asks it to drain within some seconds and to end; it may not block. `recruit`: who
    hands over its other ranks; None: they are children of this process.
    """

    def __init__(
        self,
        config: WorkerConfig,
        progress: Progress | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
        on_leave: Callable[[float], None] | None = None,
        recruit: Recruit | None = None,
    ) -> None:
        from .compose import WorkerRuntime

        super().__init__(f"worker-{config.worker_id}", progress, asyncio.new_event_loop())
        self._failure: BaseException | None = None
        self._report = on_failure
        self._runtime: WorkerRuntime = WorkerRuntime(config, self._on_failure, on_leave, recruit)

    def _on_failure(self, error: BaseException) -> None:
        self._failure = error
        if self._report is not None:
            self._report(error)

    @property
    def runtime(self) -> WorkerRuntime:
        """For tests: the parts."""
        return self._runtime

    @property
    def address(self) -> str:
        """host:port of the worker's gRPC server."""
        assert self._runtime.shell is not None
        return self._runtime.shell.address

    @property
    def kv_address(self) -> str:
        """host:port of its KV server."""
        assert self._runtime.shell is not None
        return self._runtime.shell.kv_address

    @property
    def epoch(self) -> int:
        """Names this life of the worker."""
        assert self._runtime.shell is not None
        return self._runtime.shell.facts.epoch

    def warning(self) -> str:
        """One line where its settings could not all be kept."""
        return self._runtime.warning

    def healthy(self) -> bool:
        """Whether it serves and its engine lives."""
        return super().healthy() and self._failure is None


class RouterMember(_Member):
    """One router, on uvloop: every request's tokens pass through its loop."""

    def __init__(self, config: RouterConfig, progress: Progress | None = None) -> None:
        from .compose_router import RouterRuntime

        super().__init__("router", progress, uvloop.new_event_loop())
        self._runtime: RouterRuntime = RouterRuntime(config)
        self._warning = ""

    @property
    def runtime(self) -> RouterRuntime:
        """For tests: the parts."""
        return self._runtime

    def why_not_serving(self) -> str:
        """Empty once a request could be served. Does not block for long."""
        try:
            return self._host.call(self._runtime.why_not_serving(), _ANSWER_S)
        except TimeoutError:
            return "the router is busy"

    def warning(self) -> str:
        """One line where no client can get in; what was said last while the router is busy."""
        with contextlib.suppress(TimeoutError):
            self._warning = self._host.call(self._runtime.warning(), _ANSWER_S)
        return self._warning

    @property
    def http_address(self) -> str:
        """host:port of the OpenAI-style API."""
        return self._runtime.http_address

    @property
    def grpc_address(self) -> str:
        """host:port of tandem.v1."""
        return self._runtime.grpc_address

    @property
    def registry_address(self) -> str:
        """host:port that workers heartbeat to."""
        return self._runtime.registry_address
