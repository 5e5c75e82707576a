"""A follower as its worker's event loop reaches it about KV between workers: commands over the link that it has anyway
(`messages.Kind.KV`), so that nothing more must be watched. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ....kvtransfer.collective.commands import (
    Answer,
    Begin,
    Command,
    Failed,
    Forget,
    Forgotten,
    Leave,
    Left,
    decode,
    encode,
)
from ....kvtransfer.collective.ports import RankPort
from .followers import Followers
from .messages import RankLost


class FollowerPort(RankPort):
    """See the module. Of a follower that has ended, sessions hear that it meets nobody and writes nothing any more; its
    worker, which ends with it, is told elsewhere.
    """

    def __init__(self, followers: Followers, rank: int, host: str | None) -> None:
        """`host`: the follower's address where it is on another node than the leader."""
        self._followers = followers
        self._rank = rank
        self._host = host
        self._hear: Callable[[Answer], None] = lambda answer: None

    def start(self, begin: Begin, hear: Callable[[Answer], None], on_lost: Callable[[str], None]) -> None:
        self._hear = hear
        self._followers.on_kv_lost.append(on_lost)
        self._followers.on_kv[self._rank] = lambda answer: hear(decode(answer))
        mine = begin if self._host is None else replace(begin, host=self._host)
        self._followers.say_kv(self._rank, encode(mine))

    def say(self, command: Command) -> None:
        self._followers.say_kv(self._rank, encode(command))
        try:
            self._followers.check()
        except RankLost as lost:
            self._hear(_instead(command, str(lost)))

    def close(self) -> None:
        """Its process ends with the worker."""


def _instead(command: Command, why: str) -> Answer:
    """What a follower that has ended would say."""
    match command:
        case Leave(session=session):
            return Left(session=session)
        case Forget(session=session, pair=pair, batch=batch):
            return Forgotten(session=session, pair=pair, batch=batch)
        case _:
            return Failed(session=command.session, pair=command.pair, message=why)


def follower_ports(followers: Followers, hosts: Sequence[str | None]) -> list[RankPort]:
    """Of ranks 1 … n - 1. `hosts`: as for `FollowerPort`, of each."""
    return [FollowerPort(followers, rank, host) for rank, host in enumerate(hosts, 1)]
