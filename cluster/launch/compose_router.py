"""Builds a router from its parts: tokenizer, membership and its registry server, core, front ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import time
from collections.abc import Callable

from grpc import aio

from ...router.core import RouterCore
from ...router.frontend import Frontend
from ...router.members import Membership
from ...router.plan_watch import PlanWatch
from ...router.service import ModelCard
from ...router.siblings import Siblings
from ...router.tokenizer import load_tokenizer
from ..auth import MemberCredentials
from ..clock import MonotonicClock
from ..config import RouterConfig
from ..events import WaterfallLog
from ..metrics import RouterMetrics
from ..models.reference import resolve_model
from ..proto.tandem_internal_v1_pb2_grpc import add_RegistryServicer_to_server, add_SiblingServicer_to_server
from ..rpc import make_server
from .checks import check_shared_ports

logger = logging.getLogger(__name__)
GC_OBJECTS = 20_000
Progress = Callable[[str, float | None], None]


class RouterRuntime:
    """A router on the running event loop: `start`, serve, `drain`, `stop`."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.members: Membership | None = None
        self.core: RouterCore | None = None
        self.frontend: Frontend | None = None
        self.http_address = ""
        self.grpc_address = ""
        self.registry_address = ""
        self._siblings: Siblings | None = None
        self._watching: asyncio.Task[None] | None = None
        self._plan: PlanWatch | None = None
        self._registry: aio.Server | None = None

    async def start(self, progress: Progress | None = None) -> None:
        """Reads the tokenizer and serves. Raises ModelError, ValueError, OSError (a port in use). From then on the
        process's collector of cycles runs less often.
        """
        config, clock = self._config, MonotonicClock()
        check_shared_ports(config)
        if progress is not None:
            progress("tokenizer", None)
        credentials = await asyncio.to_thread(MemberCredentials.load, config.security)
        credentials.check_exposure(config.host, insecure=config.insecure)
        files = await asyncio.to_thread(resolve_model, config.model, progress=progress)
        tokenizer = await asyncio.to_thread(load_tokenizer, files)
        if progress is not None:
            progress("services", None)
        router_id = f"router-{secrets.token_hex(6)}"
        name = config.served_model_name or config.model
        self.members = Membership(
            router_id=router_id,
            clock=clock,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            worker_lost_after_s=config.worker_lost_after_s,
            credentials=credentials,
        )
        metrics = RouterMetrics(name)
        metrics.watch_workers(self.members.statuses)
        card = ModelCard(id=name, max_model_len=files.config.max_model_len, created_unix_s=int(time.time()))
        log = WaterfallLog(config.events_path)
        self._plan = plan = PlanWatch(config, clock, log)
        self.core = RouterCore(
            config,
            router_id=router_id,
            members=self.members,
            tokenizer=tokenizer,
            metrics=metrics,
            log=log,
            clock=clock,
            card=card,
            attainment=plan.attainment,
        )
        self._siblings = Siblings(config, metrics, credentials=credentials, plan=plan)
        self._watching = asyncio.create_task(plan.run(self._siblings.seen), name="plan watch")
        await self._start_registry(credentials, self._siblings)
        self.frontend = await asyncio.to_thread(
            Frontend, self.core, tokenizer, config, metrics, siblings=self._siblings
        )
        addresses = await self.frontend.start()
        self.http_address, self.grpc_address = addresses.http, addresses.grpc
        # A request makes thousands of objects and few cycles: Python's own threshold (700) has them searched at every
        # few tokens.
        gc.set_threshold(GC_OBJECTS, 20, 20)
        logger.info("router serves HTTP on %s, gRPC on %s", addresses.http, addresses.grpc)

    async def _start_registry(self, credentials: MemberCredentials, siblings: Siblings) -> None:
        assert self.members is not None
        self._registry = make_server(credentials)
        add_RegistryServicer_to_server(self.members, self._registry)
        add_SiblingServicer_to_server(siblings, self._registry)
        address = f"{self._config.host}:{self._config.registry_ports[self._config.process]}"
        try:
            port = credentials.listen(self._registry, address)
        except RuntimeError as error:
            raise OSError(f"registry_port: cannot listen on {address}; it is taken or not of this machine") from error
        await self._registry.start()
        self.registry_address = f"{self._config.host}:{port}"

    async def why_not_serving(self) -> str:
        """Empty once a request could be served."""
        assert self.core is not None
        readiness = self.core.readiness()
        return "" if readiness.ready else readiness.reason or "not ready"

    async def warning(self) -> str:
        """One line for the operator; empty where there is nothing to say."""
        assert self.frontend is not None
        below = "" if self._plan is None else self._plan.warning
        return "; ".join(text for text in (self.frontend.warning, below) if text)

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for those inside; False if some are left after `timeout_s`."""
        assert self.frontend is not None
        return await self.frontend.drain(timeout_s)

    async def stop(self) -> None:
        """Ends everything; idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self.frontend is not None:
            await self.frontend.stop()
        if self.core is not None:
            await self.core.close()
        if self._siblings is not None:
            await self._siblings.close()
        if self.members is not None:
            await self.members.close()
        if self._registry is not None:
            await self._registry.stop(grace=0.5)
