"""A process group of two ranks of different workers, made and given up at run time. Loads torch.

The group is made directly, on a prefixed store: no global group exists and none is split, so that workers come and go.
The store is each side's own, in its memory; what one puts in is told to the other over the connection that the two
workers have anyway (`Rendezvous`). So no port is open at which a stranger could take part in the meeting. What is open
is the backend's own data port, at which whoever reaches it may knock: the first message of each side is therefore a
proof that was told over that same connection, and a group whose other end does not show it is given up.

What travels is neither encrypted nor signed, as with every such library: `launch` refuses it beside TLS.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

GLOO, NCCL = "gloo", "nccl"
_RELAY_S = 0.001
_HERE = "here"
_MEET_S = 3.0
"""For Gloo to connect two ranks that are both there: it cannot be told to stop meanwhile. NCCL has all of the time-out:
one side waits for the other's first key while that one loads NCCL and its network.
"""
_POLL_S = 0.0001
_NCCL_SETTINGS = {
    # A peer that dies breaks a transfer, not this process: torch's watchdogs would end it. Groups that a worker's own
    # ranks have made before keep what they were made with.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class PairLost(RuntimeError):
    """The other rank of a pair has ended, does not answer, or is not who it should be."""


class Rendezvous:
    """One side's store. `say` is called, from a thread of its own, with every key that this side puts in."""

    def __init__(self, say: Callable[[str, bytes], None], *, timeout_s: float) -> None:
        self.store = HashStore()
        self._say = say
        self._known: set[str] = set()
        self._over = threading.Event()
        self._timeout_s = timeout_s
        self._other_is_there = threading.Event()
        self._thread = threading.Thread(target=self._relay, name="KV rendezvous", daemon=True)
        self._thread.start()

    def heard(self, key: str, value: bytes) -> None:
        """The other side has put in a key."""
        if key == _HERE:
            self._other_is_there.set()
            return
        self._known.add(key)
        store: Any = self.store
        store.set(key, value)

    def begin(self) -> None:
        """Returns when the other side is there as well: a backend that waits for it cannot be told to stop. `PairLost`
        where it does not come, or `end` was called.
        """
        self._say(_HERE, b"")
        if not self._other_is_there.wait(self._timeout_s) or self._over.is_set():
            raise PairLost("the other rank did not come")

    def end(self) -> None:
        """The two have met, or will not."""
        self._over.set()
        self._other_is_there.set()

    def _relay(self) -> None:
        while not self._over.wait(_RELAY_S):
            for key in self.store.list_keys():
                if key not in self._known:
                    self._known.add(key)
                    self._say(key, bytes(self.store.get(key)))


class PairGroup:
    """Two ranks, seen from one. Used by one thread. Every operation raises `PairLost`."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        name: str,
        *,
        sends: bool,
        backend: str,
        device: torch.device,
        host: str,
        proof: bytes,
        timeout_s: float,
    ) -> None:
        """Meets the other, and sees its proof; within `timeout_s` each. `device`: where messages lie; `host`: this
        rank's address (Gloo).
        """
        self._rank, self._other = (0, 1) if sends else (1, 0)
        self._timeout_s = timeout_s
        self._device = device
        self._polls = backend == NCCL
        self._group: Any = None
        rendezvous.begin()
        rendezvous.store.set_timeout(timedelta(seconds=timeout_s if self._polls else min(timeout_s, _MEET_S)))
        store = PrefixStore(name, rendezvous.store)
        try:
            self._group = _group(store, self._rank, backend, host, timeout_s)
            self._prove(proof)
        except RuntimeError as error:
            self.abort()
            raise PairLost(f"the other rank was not met: {error}") from error

    def send(self, data: torch.Tensor) -> Any:
        """Begins to send; `finish` ends it. `data` stays as it is until then."""
        return self._begun(lambda: self._group.send([data], self._other, 0))

    def receive(self, data: torch.Tensor) -> Any:
        """Begins to receive into `data`; `finish` ends it."""
        return self._begun(lambda: self._group.recv([data], self._other, 0))

    def finish(self, work: Any) -> None:
        """Returns when the message has arrived, or left."""
        try:
            if self._polls:
                deadline_s = time.monotonic() + self._timeout_s
                while not work.is_completed():
                    if time.monotonic() > deadline_s:
                        raise PairLost(f"a message was not through within {self._timeout_s:g} s")
                    time.sleep(_POLL_S)
            work.wait(timedelta(seconds=self._timeout_s))
            if self._polls:
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise error if isinstance(error, PairLost) else PairLost(str(error)) from error

    def abort(self) -> None:
        """Gives the group up; the other side's operations fail then, once no work of it is kept. Idempotent."""
        group, self._group = self._group, None
        if group is not None and self._polls:
            group.abort()  # Gloo's connections end with the object

    def _begun(self, begin: Callable[[], Any]) -> Any:
        try:
            return begin()
        except RuntimeError as error:
            raise PairLost(str(error)) from error

    def _prove(self, proof: bytes) -> None:
        """Each shows what only it and the other know, different from what it is shown."""
        mine, due = (hmac.digest(proof, b"%d" % rank, hashlib.sha256) for rank in (self._rank, self._other))
        shown = torch.tensor(list(mine), dtype=torch.uint8, device=self._device)
        seen = torch.empty_like(shown)
        first, then = (self.send, self.receive) if self._rank == 0 else (self.receive, self.send)
        for operation in (first, then):
            self.finish(operation(shown if operation == self.send else seen))
        if not hmac.compare_digest(bytes(seen.tolist()), due):
            raise PairLost("whoever answered is not the other rank")


def _group(store: Any, rank: int, backend: str, host: str, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    if backend == NCCL:
        os.environ.update(_NCCL_SETTINGS | os.environ)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [_gloo_device(host)]
    options._timeout = min(timeout, timedelta(seconds=_MEET_S))  # each message has its own
    options._threads = 1
    return gloo(store, rank, 2, options)


@lru_cache(maxsize=8)
def _gloo_device(host: str) -> Any:
    """One for all groups of the process: each has a thread that moves bytes."""
    device: Any = dist.ProcessGroupGloo
    return device.create_device(hostname=host)
