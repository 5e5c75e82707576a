"""The router's real front ends before a service that answers by a script; its core behind workers that do."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.config import RouterConfig
from tandem.cluster.metrics import RouterMetrics
from tandem.cluster.types import FinishReason, SampledToken, Timings
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.errors import ServiceError
from tandem.router.frontend import Addresses, Frontend
from tandem.router.http_protocol import HttpLimits
from tandem.router.service import Delta, GenerateRequest, GenerationService, ModelCard, Readiness, Tap

sys.path.insert(0, str(Path(__file__).parent))  # the folder's own modules

from router_rig import MODEL, WAIT_S, Rig

MAX_MODEL_LEN = 256
TIMINGS = Timings(
    queue_s=0.01,
    prefill_s=0.02,
    ttft_s=0.05,
    e2e_s=0.25,
    prefill_worker="p0",
    decode_worker="d0",
    cached_tokens=16,
    transferred_bytes=4096,
)


class ScriptedService(GenerationService):
    """Answers `text` byte by byte for every choice; `fail_at` and `hang_at` count deltas."""

    def __init__(self) -> None:
        self.text = "Héllo, wörld"
        self.error: ServiceError | None = None
        self.fail_at = 0
        self.hang_at: int | None = None
        self.ready = True
        self.requests: list[GenerateRequest] = []
        self.canceled = threading.Event()
        self.hanging = threading.Event()
        self.running = 0

    async def generate(self, request: GenerateRequest, tap: Tap | None = None) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.running += 1
        finished = False
        try:
            for count, delta in enumerate(self._deltas(request)):
                if self.error is not None and count == self.fail_at:
                    raise self.error
                if count == self.hang_at:
                    self.hanging.set()
                    await asyncio.Event().wait()
                yield delta
            finished = True
        finally:
            self.running -= 1
            if not finished and self.error is None:
                self.canceled.set()

    def _deltas(self, request: GenerateRequest) -> Iterator[Delta]:
        data = self.text.encode()[: request.sampling.max_tokens]
        shown = 0
        for index, byte in enumerate(data):
            whole = data[: index + 1].decode("utf-8", "ignore")
            top = request.sampling.top_logprobs
            rivals = tuple((97 + k, -1.0 - k) for k in range(top or 0))
            token = SampledToken(byte, -0.5, rivals) if top is not None else SampledToken(byte)
            last = index + 1 == len(data)
            stopped = len(data) == len(self.text.encode())
            for choice in range(request.n):
                yield Delta(
                    choice=choice,
                    text=whole[shown:],
                    tokens=(token,),
                    finish_reason=None if not last else FinishReason.STOP if stopped else FinishReason.LENGTH,
                    timings=self._timings(index + 1) if last else None,
                )
            shown = len(whole)

    def _timings(self, output_tokens: int) -> Timings:
        values = {name: getattr(TIMINGS, name) for name in Timings.__slots__}
        return Timings(**{**values, "output_tokens": output_tokens})

    def models(self) -> tuple[ModelCard, ...]:
        return (ModelCard(id=MODEL, max_model_len=MAX_MODEL_LEN, created_unix_s=1_700_000_000),)

    def readiness(self) -> Readiness:
        return Readiness(ready=self.ready, reason="" if self.ready else "no decode worker")


class Front:
    """A running `Frontend`; its loop runs in a thread of its own."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        limits: HttpLimits | None = None,
    ) -> None:
        self.service = ScriptedService()
        self.metrics = RouterMetrics(MODEL)
        self.tokenizer = ByteTokenizer(300)
        self.frontend = Frontend(self.service, self.tokenizer, config, self.metrics, limits=limits)
        self._loop = loop or asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="front")
        self._thread.start()
        try:
            addresses: Addresses = self.run(self.frontend.start())
        except BaseException:
            self.close()
            raise
        self.http, self.grpc = addresses.http, addresses.grpc
        self.url = f"{'http' if config.tls_cert is None else 'https'}://{self.http}"

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.submit(work).result(WAIT_S)

    def close(self) -> None:
        self.run(self.frontend.stop())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()


def make_config(**changes: Any) -> RouterConfig:
    return RouterConfig(**{"http_port": 0, "grpc_port": 0, "max_body_bytes": 64 * 1024, "max_choices": 4, **changes})


@pytest.fixture
def start_front() -> Iterator[Callable[..., Front]]:
    fronts: list[Front] = []

    def start(
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        limits: HttpLimits | None = None,
        **changes: Any,
    ) -> Front:
        fronts.append(Front(make_config(**changes), loop=loop, limits=limits))
        return fronts[-1]

    yield start
    for front in fronts:
        front.close()


@pytest.fixture(scope="module")
def shared_front() -> Iterator[Front]:
    """One server for a module's tests that leave its service as it is."""
    front = Front(make_config())
    yield front
    front.close()


@pytest.fixture
def front(start_front: Callable[..., Front]) -> Front:
    return start_front()


@pytest.fixture
def rig() -> type[Rig]:
    """`async with rig(max_attempts=2) as r: prefill, decode = await r.split()`."""
    return Rig
