"""What a worker tells its ranks about KV that travels between them and another worker's, and what they answer. As
msgpack where the rank is another process of the worker: one installation, so nothing here has versions.

A *session* joins a holder and a reader for as long as both live; a *pair* is a route between two ranks of it, a *batch*
is counted by the reader. Commands of one pair are carried out in order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import msgpack

from ..layout import KVLayout, KVSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """The first command: how this rank speaks to others."""

    backend: str
    """`gloo` or `nccl`."""
    host: str
    """Address under which ranks of other workers reach this one."""
    timeout_s: float
    """For meeting, and for each message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Meet the other rank of a pair. Answered by `Joined`."""

    session: bytes
    pair: int
    sends: bool
    """Whether this rank is the holder's."""
    source: KVSplit
    target: KVSplit
    group: str
    """Name of the process group, the same on both sides."""
    proof: bytes
    """What both show each other first: it was told over the authenticated connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What the two ranks of a pair tell each other to meet: a key of their store. A command and an answer."""

    session: bytes
    pair: int
    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Copy a batch out of the holder's blocks. Answered by `Done`."""

    session: bytes
    pair: int
    batch: int
    first_token: int
    end_token: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send what was staged. Answered by `Done`."""

    session: bytes
    pair: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Forget what was staged. Not answered."""

    session: bytes
    pair: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """Receive a batch, then write it, unless it names no blocks. Answered by `Done`."""

    session: bytes
    pair: int
    batch: int
    first_token: int
    end_token: int
    block_ids: tuple[int, ...]
    cleared_from: int | None
    """The slots from here on of the last block are cleared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Write nothing of a batch from now on, though it is received. Answered by `Forgotten`, when no write is under
    way.
    """

    session: bytes
    pair: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The session is over. Answered by `Left`."""

    session: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The two ranks of a pair have met."""

    session: bytes
    pair: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The last command about this batch was carried out."""

    session: bytes
    pair: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """Nothing of this batch will be written any more."""

    session: bytes
    pair: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Nothing of this session will be written any more."""

    session: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The pair is broken: nothing more comes of it."""

    session: bytes
    pair: int
    message: str


Command = Join | Key | Stage | Send | Discard | Receive | Forget | Leave
Answer = Key | Joined | Done | Forgotten | Left | Failed
_KINDS: tuple[type, ...] = (
    Begin,
    Join,
    Key,
    Stage,
    Send,
    Discard,
    Receive,
    Forget,
    Leave,
    Joined,
    Done,
    Forgotten,
    Left,
    Failed,
)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}


def encode(message: Begin | Command | Answer) -> bytes:
    """The inverse of `decode`."""
    values = [getattr(message, field.name) for field in fields(message)]
    packed: bytes = msgpack.packb([_NUMBERS[type(message)], *values], default=_plain)
    return packed


def decode(data: bytes) -> Any:
    """A `Begin`, `Command` or `Answer`. ValueError for anything else."""
    try:
        number, *values = msgpack.unpackb(data, use_list=False)
        kind = _KINDS[number]
        return kind(**{f.name: _split(v) for f, v in zip(fields(kind), values, strict=True)})
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise ValueError(f"not a KV command: {error!r}") from error


def _plain(value: object) -> object:
    if isinstance(value, KVSplit):
        packed = [value.layout.to_bytes(), value.tensor_parallel, value.pipeline_stages]
        return msgpack.ExtType(1, msgpack.packb(packed))
    raise TypeError(f"{value!r} is not part of a KV command")


def _split(value: object) -> object:
    if isinstance(value, msgpack.ExtType):
        layout, tensor_parallel, pipeline_stages = msgpack.unpackb(value.data)
        return KVSplit(
            layout=KVLayout.from_bytes(layout), tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages
        )
    return value
