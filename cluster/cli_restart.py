"""`tandem restart`: drains a worker and waits for its next life; one after another where several are named.

The call goes to the worker itself (`Drain`, with `exit`): it refuses new work, routers hear of it at once, what it runs
is finished or, when the time is up, resumed elsewhere; then its process ends, and whoever watches over it starts the
next one. The worker's address comes from the router's `/ready`, the cluster's secret from the file that a running
`tandem serve` keeps for its owner, else from the environment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from .auth import MemberCredentials
from .cli_status import fetch, processes
from .config import SecurityConfig
from .launch import runtime_file
from .proto import tandem_internal_v1_pb2 as pb
from .proto.tandem_internal_v1_pb2_grpc import WorkerStub
from .rpc import CHANNEL_OPTIONS, CONTROL_TIMEOUT_S
from .tls import ClientTLS

START_S = 120.0
"""What a worker gets, beyond the time it may drain, until its next life is ready."""
_LOOK_S = 0.2

Answer = Mapping[str, Any]


def restart(
    url: str,
    names: Sequence[str],
    *,
    every: bool,
    timeout_s: float,
    say: Callable[[str], None],
    api_key: str | None = None,
    tls: ClientTLS | None = None,
) -> int:
    """Restarts the named workers, or all of them, one after another; returns the exit code. Each is back and ready
    before the next one is asked. Raises ValueError for a name that is not there, OSError where nobody answers.
    """
    if not 0 <= timeout_s <= 86400:
        raise ValueError(f"timeout: {timeout_s:g} is not allowed; allowed: 0 to 86400 seconds")
    if bool(names) == every:
        raise ValueError("worker: name the workers to restart, or --all, not both")

    def look() -> Answer:
        return fetch(url, api_key=api_key, tls=tls)

    for name in chosen(look(), names):
        before = worker_of(look(), name)
        if before is None:
            raise OSError(f"{name} is gone")
        began_s = time.monotonic()
        asyncio.run(ask_to_leave(str(before["address"]), url, timeout_s))
        say(f"{name} drains, for up to {timeout_s:g} s, and restarts")
        after = _wait_for_next_life(look, name, str(before["epoch"]), began_s + timeout_s + START_S)
        took_s = time.monotonic() - began_s
        if after is None:
            say(f"{name} is not back after {took_s:.0f} s; whoever started it should have started it again")
            return 1
        several = "processes" if after.get("other_ranks") else "pid"
        say(f"{name} is back after {took_s:.1f} s ({several} {processes(after)}, epoch {str(after['epoch'])[:8]})")
    return 0


def chosen(answer: Answer, names: Sequence[str]) -> list[str]:
    """The workers to restart, in the router's order if none is named. ValueError for one that it does not know, OSError
    where it tells of none.
    """
    if "workers" not in answer:
        raise OSError("the router names its workers only to those who show a key: TANDEM_API_KEY")
    known = [str(worker["worker_id"]) for worker in answer.get("workers") or ()]
    for name in names:
        if name not in known:
            raise ValueError(f"worker: {name!r} is not allowed; allowed: {', '.join(known) or 'none, no worker is up'}")
    if not known:
        raise OSError("no worker is up")
    return list(dict.fromkeys(names)) or known


def worker_of(answer: Answer, name: str) -> Answer | None:
    """What the router says of one worker."""
    return next((worker for worker in answer.get("workers") or () if worker["worker_id"] == name), None)


async def ask_to_leave(address: str, url: str, timeout_s: float) -> None:
    """Calls the worker; returns when it has begun to drain. Raises OSError with what it answered."""
    running = runtime_file.find(url)
    credentials = MemberCredentials.load(SecurityConfig() if running is None else running.security)
    async with credentials.channel(address, CHANNEL_OPTIONS) as channel:
        request = pb.DrainRequest(exit=True, timeout_s=timeout_s)
        try:
            await WorkerStub(channel).Drain(request, timeout=CONTROL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise OSError(f"the worker at {address} did not take it: {error.code().name}: {error.details()}") from None


def _wait_for_next_life(look: Callable[[], Answer], name: str, epoch: str, deadline_s: float) -> Answer | None:
    while time.monotonic() < deadline_s:
        worker = worker_of(look(), name)
        if worker is not None and worker["epoch"] != epoch and worker["state"] == "ready":
            return worker
        time.sleep(_LOOK_S)
    return None
