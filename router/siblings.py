"""The router processes behind one port, and what each says for all of them.

The kernel gives a connection to any of them, so that who asks `/metrics` or `/ready` reaches one by chance. That one
asks the others, over the registry's port and with the cluster's secret, and answers for all: every series of a process
carries the label `router`, the process's number. One that does not answer is named as such, not left out.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from grpc import aio

from ..cluster.auth import OPEN, MemberCredentials
from ..cluster.config import RouterConfig
from ..cluster.metrics import RouterMetrics
from ..cluster.proto import tandem_internal_v1_pb2 as pb
from ..cluster.proto.tandem_internal_v1_pb2_grpc import SiblingServicer, SiblingStub
from ..cluster.rpc import open_channel
from .attainment import Seen, together
from .plan_watch import PlanWatch, render, report, seen_in
from .service import Readiness

ANSWER_S = 1.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Account:
    """What one router process says of itself, or why it says nothing."""

    process: int
    registry: str
    """Its registry's address, host:port."""
    report: pb.RouterReport | None = None
    error: str = ""

    def describe(self) -> dict[str, object]:
        """As plain values, for `/ready`."""
        about: dict[str, object] = {"process": self.process, "registry": self.registry}
        if self.report is None:
            return {**about, "ready": False, "reason": self.error}
        report = self.report
        return {
            **about,
            "pid": report.pid,
            "ready": report.ready,
            "reason": report.reason,
            "requests_inside": report.requests_inside,
            "choices_waiting": dict(sorted(report.choices_waiting.items())),
        }


class Siblings(SiblingServicer):
    """One process's view of all of them, itself included. Lives on the router's event loop."""

    def __init__(
        self,
        config: RouterConfig,
        metrics: RouterMetrics,
        *,
        credentials: MemberCredentials = OPEN,
        plan: PlanWatch | None = None,
    ) -> None:
        """`plan`: what this process has seen of promises; None: nobody looks."""
        self._process = config.process
        self._model_name = config.served_model_name or config.model
        self._metrics = metrics
        self._plan = plan
        self._readiness: Callable[[], Readiness] = lambda: Readiness(ready=False, reason="starting")
        self._credentials = credentials
        host = _LOOPBACK.get(config.host, config.host)
        tls, self._hint = credentials.tls, ""
        if host != config.host and tls is not None and tls.server_name is None:
            # Under no name that the operator gave: who listens everywhere has only this one for sure.
            self._hint = f"; asked at {host}: its certificate must hold that, or security.tls_server_name a name in it"
        shown = f"[{host}]" if ":" in host else host
        self._addresses = [f"{shown}:{port}" for port in config.registry_ports]
        self._channels: dict[int, aio.Channel] = {}

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return len(self._addresses) > 1

    def watch(self, readiness: Callable[[], Readiness]) -> None:
        """Says whether this process could serve a request now; must not block."""
        self._readiness = readiness

    async def Report(self, request: pb.ReportRequest, context: aio.ServicerContext) -> pb.RouterReport:  # noqa: N802
        """Another process asks how this one is."""
        return self._own(metrics=request.metrics)

    async def accounts(self, *, metrics: bool = False) -> list[Account]:
        """All processes in order; waits at most `ANSWER_S` for those that do not answer. Does not raise."""
        return list(await asyncio.gather(*(self._account(index, metrics) for index in range(len(self._addresses)))))

    async def render_metrics(self) -> bytes:
        """The exposition text of all processes, and of the workers as this one heard them."""
        accounts = await self.accounts(metrics=self.several)
        if not self.several:
            return self._metrics.render() + self._render_plan(accounts)
        texts = {str(one.process): one.report.metrics.decode() for one in accounts if one.report is not None}
        up = [f'tandem:router_up{{router="{one.process}"}} {float(one.report is not None)}' for one in accounts]
        about = "# HELP tandem:router_up 1: this router process answers\n# TYPE tandem:router_up gauge\n"
        merged = await asyncio.to_thread(merge_expositions, texts, "router")
        own = (merged + about + "\n".join(up) + "\n").encode() + self._metrics.render_workers()
        return own + self._render_plan(accounts)

    async def seen(self) -> Seen:
        """What all processes that answer have seen of promises."""
        return _seen_by(await self.accounts())

    def _render_plan(self, accounts: Sequence[Account]) -> bytes:
        if self._plan is None:
            return b""
        states = {name: state for one in accounts if one.report for name, state in one.report.plan_states.items()}
        return render(self._model_name, self._plan.plan, _seen_by(accounts), states)

    async def close(self) -> None:
        """Closes the channels; idempotent."""
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))

    async def _account(self, index: int, metrics: bool) -> Account:
        address = self._addresses[index]
        if index == self._process:
            return Account(index, address, self._own(metrics=metrics))
        if index not in self._channels:
            self._channels[index] = open_channel(address, self._credentials)
        try:
            request = pb.ReportRequest(metrics=metrics)
            report = await SiblingStub(self._channels[index]).Report(request, timeout=ANSWER_S)
        except aio.AioRpcError as error:
            return Account(index, address, error=f"it does not answer its siblings: {error.code().name}{self._hint}")
        return Account(index, address, report)

    def _own(self, *, metrics: bool) -> pb.RouterReport:
        readiness = self._readiness()
        answer = pb.RouterReport(
            process=self._process,
            pid=os.getpid(),
            ready=readiness.ready,
            reason=readiness.reason or "",
            requests_inside=self._metrics.requests_inside,
            choices_waiting=self._metrics.choices_waiting,
            metrics=self._metrics.render_own() if metrics else b"",
        )
        if self._plan is not None:
            report(self._plan, answer)
        return answer


def _seen_by(accounts: Sequence[Account]) -> Seen:
    return together(seen_in(one.report) for one in accounts if one.report is not None)


def merge_expositions(texts: Mapping[str, str], label: str) -> str:
    """One exposition text (Prometheus text format 0.0.4) of several: each text's series get `label` with its key, and
    the series of one metric family stand together under one HELP and TYPE. Pure.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for value, text in texts.items():
        family, new = "", False
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                if new := family not in heads:
                    heads[family], samples[family] = [], []
            if line.startswith("#"):
                if new:
                    heads[family].append(line)
            elif line:
                samples[family].append(_with_label(line, f'{label}="{value}"'))
    return "".join(f"{line}\n" for name in heads for line in (*heads[name], *samples[name]))


def _with_label(sample: str, label: str) -> str:
    """A sample's line with one more label before its others. Names hold neither braces nor spaces."""
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, rest = sample.partition(" ")
    return f"{name}{{{label}}} {rest}"
