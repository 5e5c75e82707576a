"""What every gRPC channel and server of the cluster has in common: protocol version, options, deadlines, ids.

Deadlines bound the answer to one unary call between members; they are not a request's own time, which travels in the
messages (`Sequence.timeout_s`), because the clocks of two machines differ.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import NoReturn

import grpc
from grpc import aio

from .auth import OPEN, MemberCredentials

PROTOCOL_VERSION = 3
"""Raised with every incompatible change of `tandem.internal.v1` or of the KV frames; members refuse another one."""

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_CONCURRENT_CALLS = 4096
"""Calls, streams included, that a member's server holds at once; more are refused with RESOURCE_EXHAUSTED."""
CONTROL_TIMEOUT_S = 5.0
"""Deadline of a control call (reserve, submit, abort, status) between members."""
HEARTBEAT_TIMEOUT_S = 1.0
SMALL_WAIT_S = 0.001
"""See `NextFrame`."""

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a FIN (power, network) is noticed in seconds, not after TCP's quarter of an hour.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that comes back on the same port must be found again at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy from the environment has no business between two members of one cluster.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two processes must never share a port by accident and split each other's requests.
    ("grpc.so_reuseport", 0),
)


def open_channel(address: str, credentials: MemberCredentials = OPEN) -> aio.Channel:
    """An asyncio channel to a member at `host:port`, which is shown that we belong to its cluster."""
    return credentials.channel(address, CHANNEL_OPTIONS)


def make_server(credentials: MemberCredentials = OPEN) -> aio.Server:
    """An asyncio server for calls between members, without a port yet (`credentials.listen`); refuses strangers."""
    return credentials.server(SERVER_OPTIONS, MAX_CONCURRENT_CALLS)


def new_epoch() -> int:
    """A random 63-bit number for one life of a process; compared for equality only, never ordered."""
    return secrets.randbits(63) | 1


class NextFrame:
    """The timer of what nobody waits for: a frame takes as much of both loops as many messages in it, so what comes
    within `SMALL_WAIT_S` of one is kept for the next.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        """`leave` is called when the next frame is due."""
        self._leave = leave
        self._timer: asyncio.TimerHandle | None = None

    def waits(self, left_s: float) -> bool:
        """Whether what came now may wait, as a frame left at `left_s` on the monotonic clock; then the timer runs."""
        return self.waits_until(left_s + SMALL_WAIT_S)

    def waits_until(self, due_s: float) -> bool:
        """Whether that is yet to come, on the monotonic clock; then the timer runs, to then or sooner."""
        wait_s = due_s - time.monotonic()
        if wait_s > 0 and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._leave)
        return wait_s > 0

    def cancel(self) -> None:
        """A frame leaves, or none will; idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Refusal(Exception):
    """A member's refusal of one call, before any effect. Becomes a gRPC status at the servicer.

    RESOURCE_EXHAUSTED: a bounded queue is full, try elsewhere or later. FAILED_PRECONDITION: not this worker (role,
    epoch, draining, not attached). INVALID_ARGUMENT: wrong everywhere.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


async def abort_with(context: aio.ServicerContext, refusal: Refusal) -> NoReturn:
    """Ends the current call with the refusal's status."""
    await context.abort(refusal.code, refusal.message)
    raise AssertionError("context.abort returned")
