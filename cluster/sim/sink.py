"""The decode side of handoffs in virtual time: what `kvtransfer.sink` does for the puller with tasks and messages is
done here with events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ...kvtransfer.protocol.actions import (
    CancelPull,
    Confirm,
    Failed,
    KvReady,
    PullerAction,
    SendAbort,
    StartPull,
    WriterDone,
)
from ...kvtransfer.protocol.puller import HandoffPuller
from ...kvtransfer.ticket import RefusalReason, Ticket
from .links import Medium
from .pull import Pull
from .source import SimSource
from .timeline import Timeline


class SimSink:
    """One worker's, one life's."""

    def __init__(
        self,
        timeline: Timeline,
        puller: HandoffPuller,
        *,
        block_bytes: int,
        rpc_s: float,
        source: Callable[[str], SimSource | None],
        links: Callable[[str], Sequence[Medium]],
        on_ready: Callable[[str, Pull], None],
        on_writer_done: Callable[[str], None],
        on_failed: Callable[[str, RefusalReason], None],
    ) -> None:
        """`source`, `links`: of the worker of that id, while it lives, and what KV crosses from there; `on_…`: hear
        what becomes of a sequence, by its key.
        """
        self._timeline = timeline
        self._puller = puller
        self._block_bytes = block_bytes
        self._rpc_s = rpc_s
        self._source = source
        self._links = links
        self._on_ready = on_ready
        self._on_writer_done = on_writer_done
        self._on_failed = on_failed
        self._dead = False
        self._pulls: dict[str, Pull] = {}
        """The newest of each sequence that pulls, or has pulled, its KV."""

    def run(self, actions: Sequence[PullerAction]) -> None:
        """Does what the puller asks for."""
        for action in actions:
            match action:
                case StartPull():
                    self._start(action)
                case KvReady(key=key):
                    self._on_ready(key, self._pulls.pop(key))
                case WriterDone(key=key):
                    self._pulls.pop(key, None)
                    self._on_writer_done(key)
                case CancelPull(key=key):
                    self._pulls[key].stop(None)
                case Confirm(ticket=ticket):
                    self._timeline.do_after(self._rpc_s, partial(self._confirm, ticket))
                case SendAbort(ticket=ticket):
                    self._timeline.do_after(self._rpc_s, partial(self._send_abort, ticket))
                case Failed(key=key, reason=reason):
                    self._on_failed(key, reason)
                case _:
                    raise AssertionError(f"{action} has no effect here")

    def die(self) -> None:
        """Its worker is no more: nobody hears of it but those who are read."""
        self._dead = True
        for pull in self._pulls.values():
            pull.drop()
        self._pulls.clear()

    def _start(self, action: StartPull) -> None:
        pull = Pull(
            self._timeline,
            action,
            puller=self._puller,
            find=self._find,
            block_bytes=self._block_bytes,
            rpc_s=self._rpc_s,
            run=self.run,
        )
        before = self._pulls.get(action.key)
        if before is not None:
            pull.received_bytes = before.received_bytes
        self._pulls[action.key] = pull

    def _find(self, worker_id: str) -> tuple[SimSource | None, Sequence[Medium]]:
        source = self._source(worker_id)
        return source, () if source is None else self._links(worker_id)

    def _confirm(self, ticket: Ticket) -> None:
        source = self._source(ticket.prefill_worker)
        if source is not None:
            source.confirm(ticket)
        if not self._dead:
            self._puller.confirm_ended(ticket.decode_key, self._timeline.time_s)

    def _send_abort(self, ticket: Ticket) -> None:
        source = self._source(ticket.prefill_worker)
        if source is not None:
            source.abort_ticket(ticket)
