"""The prefill side of handoffs in virtual time: what `kvtransfer.source` does for the holder with streams and tasks is
done here with calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...kvtransfer.protocol.actions import AbortPrefill, HolderAction, Refuse, ReleaseBlocks, Revoke, Serve, Wake
from ...kvtransfer.protocol.holder import HandoffHolder
from ...kvtransfer.ticket import RefusalReason, Ticket
from ..engine.scheduler import Scheduler
from .pull import Pull
from .timeline import Timeline

Over = Callable[[Callable[[Scheduler, str], object], str], None]


class SimSource:
    """One worker's, one life's. The `pull.Reading` of those who pull from it."""

    def __init__(self, timeline: Timeline, holder: HandoffHolder, over: Over) -> None:
        """`over`: a sequence's blocks may go; the engine shall do that with it between two steps."""
        self.holder = holder
        self._timeline = timeline
        self._over = over
        self._readers: dict[int, Pull] = {}
        """Pulls of others that read here."""

    def run(self, actions: Sequence[HolderAction]) -> int | RefusalReason | None:
        """Does what the holder asks for; returns what the last `Serve` or `Refuse` says."""
        answer: int | RefusalReason | None = None
        for action in actions:
            match action:
                case Serve(reader_id=reader_id):
                    answer = reader_id
                case Wake(key=key):
                    for pull in [pull for pull in self._readers.values() if pull.prefill_key == key]:
                        pull.go_on()
                case Revoke(reader_ids=reader_ids):
                    for reader_id in reader_ids:
                        self._readers[reader_id].stop(action.reason)
                case ReleaseBlocks(key=key):
                    self._over(Scheduler.release, key)
                case AbortPrefill(key=key):
                    self._over(Scheduler.abort, key)
                case Refuse(reason=reason):
                    answer = reason
        return answer

    def open_pull(self, pull: Pull) -> int | RefusalReason:
        """See `pull.Reading.open_pull`."""
        action, now_s = pull.action, self._timeline.time_s
        answer = self.run(self.holder.pull(action.ticket, action.first_block, action.pull_index, now_s))
        assert answer is not None
        if not isinstance(answer, RefusalReason):
            self._readers[answer] = pull
        return answer

    def close_pull(self, reader_id: int) -> None:
        """See `pull.Reading.close_pull`."""
        self._readers.pop(reader_id, None)
        self.run(self.holder.pull_ended(reader_id, self._timeline.time_s))

    def confirm(self, ticket: Ticket) -> None:
        """The reader has made its first step."""
        self.run(self.holder.confirm(ticket, self._timeline.time_s))

    def abort_ticket(self, ticket: Ticket) -> None:
        """Its reader is over, and no other will come."""
        self.run(self.holder.abort_ticket(ticket, self._timeline.time_s))

    def die(self) -> None:
        """Its worker is no more: whoever reads hears of it."""
        for pull in list(self._readers.values()):
            pull.source_lost()
        self._readers.clear()
