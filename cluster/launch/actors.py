"""What runs inside a Ray actor's process: one member of the cluster, and the little that the driver may ask of it.

1. Ray makes the actor, or makes it again after its process died: `__init__` sets the thread counts, before anything
   imports torch, and starts the member in a thread, so that the actor answers from the first moment. A member that is
   started anew draws a new epoch; Tandem's own fences do the rest.
2. The driver polls `state` for progress, addresses and health.
3. `drain` lets running requests finish; `stop` ends the member. Both may be called again.
4. A worker that is asked to leave (its own `Drain` call) drains, stops and ends the process; Ray starts the next one.

Data never passes here: requests, tokens and KV go over gRPC between the members.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import RouterConfig, WorkerConfig, from_dict
from .process_setup import ignore_interrupts, set_threads
from .rank_actors import Booked, RankActors
from .stages import Stages
from .state import MemberState, Phase

if TYPE_CHECKING:
    from .members import RouterMember, WorkerMember

logger = logging.getLogger(__name__)

HEARD_S = 3.0
"""How long a member that leaves waits for the driver's next two looks, so that it is not taken for one that died."""
WHY_HEARD_S = 1.0
"""How long a worker that failed waits for the driver's next look, so that it can say why."""
_ANSWER_S = 0.05
"""For the answer to leave."""


class MemberActor:
    """One member, started in a thread of this process. `kind` is `worker` or `router`; `config` is `to_dict`'s;
    `booked`: where the ranks of a worker of several are to stand.

    Called by Ray only. The methods run on Ray's threads (max_concurrency > 1), so that `state` answers during `drain`.
    """

    def __init__(
        self, kind: str, config: Mapping[str, Any], start_timeout_s: float, booked: Booked | None = None
    ) -> None:
        ignore_interrupts()
        self._kind = kind
        self._config = config
        self._booked = booked
        self._ranks: RankActors | None = None
        self._start_timeout_s = start_timeout_s
        self._stages = Stages()
        self._stages.enter("imports")
        self._lock = threading.Lock()
        self._state = MemberState(phase=Phase.STARTING, stage="imports", pid=os.getpid(), host=_node_ip())
        self._member: RouterMember | WorkerMember | None = None
        self._stopping = False
        self._told = False
        self._heard = threading.Event()
        """The driver knows that this member leaves."""
        self._heard_why = threading.Event()
        """The driver has asked, and is being told, what this member failed of."""
        set_threads(int(config["engine"]["threads"]) if kind == "worker" else 1)
        self._starter = threading.Thread(target=self._start, name="member-start", daemon=True)
        self._starter.start()

    def state(self) -> MemberState:
        """How far the start is, and once it is ready, whether the member is healthy. Does not block for long."""
        with self._lock:
            state, member = self._state, self._member
        if state.error is not None:
            self._heard_why.set()
        if member is not None and state.phase is Phase.READY:
            return state.change(
                healthy=member.healthy(), not_serving=member.why_not_serving(), warning=member.warning()
            )
        if state.phase is Phase.LEAVING:
            if self._told:  # the driver asks one question at a time: it has the answer to the one before
                self._heard.set()
            self._told = True
        return state

    def drain(self, timeout_s: float) -> bool:
        """Takes no new work and waits for what runs; False if some was left after `timeout_s`."""
        with self._lock:
            member = self._member
            if member is None or self._state.phase is not Phase.READY:
                return True
            self._state = self._state.change(phase=Phase.DRAINING, stage="draining")
        return member.drain(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Ends the member, also one that is still starting; idempotent. Waits at most `timeout_s` for a start."""
        with self._lock:
            self._stopping = True
            member = self._member
        if member is not None:
            member.stop()
        self._starter.join(timeout_s)
        with self._lock:
            self._state = self._state.change(phase=Phase.STOPPED, stage="stopped", healthy=False)

    def _start(self) -> None:
        try:
            addresses, epoch = self._start_member()
        except Exception as error:  # Whatever it was, the driver must hear of it: it decides whether to try again.
            self._set(phase=Phase.FAILED, stage="failed", error=_one_line(error))
            return
        self._set(
            phase=Phase.READY,
            stage="ready",
            fraction=None,
            addresses=addresses,
            epoch=epoch,
            rank_pids=() if self._ranks is None else self._ranks.pids,
            healthy=True,
            started_s=self._stages.end(),
        )

    def _start_member(self) -> tuple[dict[str, str], int]:
        from .members import RouterMember, WorkerMember

        if self._kind == "router":
            router = RouterMember(from_dict(RouterConfig, self._config), progress=self._progress)
            self._adopt(router)
            router.start(self._start_timeout_s)
            addresses = {
                "http": router.http_address,
                "grpc": router.grpc_address,
                "registry": router.registry_address,
            }
            return addresses, 0
        config = from_dict(WorkerConfig, self._config)
        if self._booked is not None and config.engine.num_processes > 1:
            self._ranks = RankActors(self._booked, config)
        worker = WorkerMember(
            config,
            progress=self._progress,
            on_failure=self._fail,
            on_leave=self._leave,
            recruit=None if self._ranks is None else self._ranks.recruit,
        )
        self._adopt(worker)
        worker.start(self._start_timeout_s)
        return {"grpc": worker.address, "kv": worker.kv_address}, worker.epoch

    def _fail(self, error: BaseException) -> None:
        """On the member's loop: a worker whose engine died serves nothing more. Its streams have ended; its process
        does as soon as the driver knows why, and Ray starts a new one.
        """
        logger.critical("the engine died: %s", _one_line(error))
        with self._lock:
            self._state = self._state.change(error=_one_line(error), healthy=False)
        threading.Thread(target=self._end_process, name="member-failed", daemon=True).start()

    def _end_process(self) -> None:
        self._heard_why.wait(WHY_HEARD_S)
        time.sleep(_ANSWER_S)
        os._exit(1)

    def _leave(self, timeout_s: float) -> None:
        """On the member's loop: begins what `_drain_and_end` does."""
        with self._lock:
            if self._state.phase is not Phase.READY:
                return
            self._state = self._state.change(phase=Phase.LEAVING, stage="leaving")
        threading.Thread(target=self._drain_and_end, args=(timeout_s,), name="member-leave", daemon=True).start()

    def _drain_and_end(self, timeout_s: float) -> None:
        member, code = self._member, 1
        assert member is not None
        try:
            member.drain(timeout_s)
            member.stop()
            self._heard.wait(HEARD_S)
            code = 0
        finally:
            # Not ray.actor.exit_actor: after that Ray takes the actor for finished, whatever max_restarts says.
            if not self._stopping:
                os._exit(code)

    def _adopt(self, member: RouterMember | WorkerMember) -> None:
        with self._lock:
            if self._stopping:
                raise RuntimeError("stopped before it had started")
            self._member = member

    def _progress(self, stage: str, fraction: float | None) -> None:
        with self._lock:
            self._stages.enter(stage)
        self._set(stage=stage, fraction=fraction)

    def _set(self, **changes: Any) -> None:
        with self._lock:
            if self._state.phase is Phase.STARTING:
                self._state = self._state.change(**changes)


def _node_ip() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {text}"
