"""One pull in virtual time: what `SourceDriver.open_pull` and `SinkDriver._pull` do between them, run after run of the
blocks that the holder lets be read, over the links between the two workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ...kvtransfer.protocol.actions import PullerAction, StartPull
from ...kvtransfer.protocol.holder import HandoffHolder
from ...kvtransfer.protocol.puller import HandoffPuller
from ...kvtransfer.ticket import RefusalReason
from .engine import TOKEN
from .links import Flow, Medium
from .timeline import Timeline


class Reading(Protocol):
    """The worker that is read."""

    holder: HandoffHolder

    def open_pull(self, pull: Pull) -> int | RefusalReason:
        """Lets it read under an id, or says why not."""

    def close_pull(self, reader_id: int) -> None:
        """It reads no more."""


Find = Callable[[str], tuple[Reading | None, Sequence[Medium]]]
"""The worker of that id, None while it is gone, and what KV crosses on its way from there."""


class Pull:
    """Lives from `StartPull` to `pull_ended`."""

    def __init__(
        self,
        timeline: Timeline,
        action: StartPull,
        *,
        puller: HandoffPuller,
        find: Find,
        block_bytes: int,
        rpc_s: float,
        run: Callable[[Sequence[PullerAction]], object],
    ) -> None:
        """`run` carries out what the puller answers."""
        self.action = action
        self.prefill_key = action.ticket.prefill_key
        """What it reads."""
        self.index = action.first_block
        self.received_bytes = 0
        self.exposed_s = 0.0
        self.opened_s = 0.0
        self._timeline = timeline
        self._puller = puller
        self._find = find
        self._source: Reading | None = None
        self._links: Sequence[Medium] = ()
        self._block_bytes = block_bytes
        self._rpc_s = rpc_s
        self._run = run
        self._reader_id: int | None = None
        self._flow: Flow | None = None
        self._last_byte_s = 0.0
        self._ended = False
        timeline.do_after(action.delay_s + rpc_s, self._open)

    def go_on(self) -> None:
        """More may be readable."""
        if self._flow is not None or self._ended or self._reader_id is None or self._source is None:
            return
        view = self._source.holder.view(self._reader_id)
        if view.refused is not None:
            self.stop(view.refused)
        elif self.index < view.readable_blocks:
            blocks = view.readable_blocks - self.index
            self._flow = Flow(self._timeline, self._links, blocks * self._block_bytes, partial(self._arrive, blocks))
        elif view.first_token is not None:
            self.exposed_s = max(0.0, self._last_byte_s - view.prefill_end_s)
            self._timeline.do_after(self._rpc_s, partial(self._end, view.num_tokens))

    def stop(self, reason: RefusalReason | None) -> None:
        """It must not read another block (None: the puller wants no more of it): the puller hears why."""
        self._close()
        now_s = self._timeline.time_s
        self._run(self._puller.pull_ended(self.action.key, self.action.pull_index, reason, "", now_s))

    def source_lost(self) -> None:
        """The worker that is read is no more."""
        self._reader_id = None
        self.stop(RefusalReason.PEER_LOST)

    def drop(self) -> None:
        """The worker that reads is no more: nobody hears of it, but the one that was read."""
        self._close()

    def _open(self) -> None:
        if self._ended:
            return
        self.opened_s = self._timeline.time_s
        self._source, self._links = self._find(self.action.ticket.prefill_worker)
        opened = RefusalReason.PEER_LOST if self._source is None else self._source.open_pull(self)
        if isinstance(opened, RefusalReason):
            self.stop(opened)
        else:
            self._reader_id = opened
            self.go_on()

    def _arrive(self, blocks: int) -> None:
        self._flow = None
        if self._ended:
            return
        key, number, indices = self.action.key, self.action.pull_index, range(self.index, self.index + blocks)
        self._puller.blocks_written(key, number, indices)  # there are no frames to be checked (`blocks_arrived`)
        self.index += blocks
        self.received_bytes += blocks * self._block_bytes
        self._last_byte_s = self._timeline.time_s
        assert self._reader_id is not None
        assert self._source is not None
        self._source.holder.pull_progress(self._reader_id, self._last_byte_s)
        self.go_on()

    def _end(self, num_tokens: int) -> None:
        if self._ended:
            return
        self._close()
        ticket, now_s = self.action.ticket, self._timeline.time_s
        self._run(self._puller.end_arrived(self.action.key, self.action.pull_index, ticket, num_tokens, TOKEN))
        self._run(self._puller.pull_ended(self.action.key, self.action.pull_index, None, "", now_s))

    def _close(self) -> None:
        self._ended = True
        if self._flow is not None:
            self._flow.cancel()
            self._flow = None
        if self._reader_id is not None and self._source is not None:
            self._source.close_pull(self._reader_id)
            self._reader_id = None
