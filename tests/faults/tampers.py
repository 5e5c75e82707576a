"""What can happen to a KV message on its way, one function a fault; `Change` applies one to some messages of a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NoReturn

from kv_proxy import Cut, EndOfStream, Lost, Message, Tamper, What
from tandem.cluster.types import BlockRef, SampledToken
from tandem.kvtransfer import wire
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.ticket import HandoffRefused, Hello, RefusalReason, Ticket
from tandem.kvtransfer.transport import BlockFrame, EndFrame, RefFrame

How = Callable[[bytes], list[bytes]]


class Change(Tamper):
    """Changes messages of one kind: `times` of them from number `first` on, or all from there (None)."""

    def __init__(self, what: What, how: How, *, first: int = 0, times: int | None = 1) -> None:
        self._what, self._how = what, how
        self._numbers: Iterable[int] = range(first, first + times) if times is not None else _From(first)

    def change(self, message: Message) -> list[bytes]:
        hit = message.what is self._what and message.number in self._numbers
        return self._how(message.data) if hit else [message.data]


class _From:
    def __init__(self, first: int) -> None:
        self._first = first

    def __contains__(self, number: int) -> bool:
        return number >= self._first

    def __iter__(self) -> NoReturn:
        raise TypeError("endless")


class Swap(Tamper):
    """The second block comes after the third, or after the end."""

    def __init__(self) -> None:
        self._kept: bytes | None = None
        self._done = False

    def change(self, message: Message) -> list[bytes]:
        if message.what not in (What.BLOCK, What.END):
            return [message.data]
        if message.what is What.BLOCK and message.number == 1 and not self._done:
            self._kept, self._done = message.data, True
            return []
        kept, self._kept = self._kept, None
        return [message.data] if kept is None else [message.data, kept]


# Any message


def cut(data: bytes) -> list[bytes]:
    raise Cut


def end_stream(data: bytes) -> list[bytes]:
    raise EndOfStream


def lose(data: bytes) -> list[bytes]:
    raise Lost


def drop(data: bytes) -> list[bytes]:
    return []


def repeat(data: bytes) -> list[bytes]:
    return [data, data]


def truncate(data: bytes) -> list[bytes]:
    return [data[:-5]]


def flip_last_bit(data: bytes) -> list[bytes]:
    """The last bit of a message: of the payload, where it has one."""
    return [data[:-1] + bytes([data[-1] ^ 1])]


def flip_header_bit(data: bytes) -> list[bytes]:
    return [data[:20] + bytes([data[20] ^ 16]) + data[21:]]


# Frames


def _block(data: bytes) -> BlockFrame | RefFrame:
    """The one block of a message: its bytes, or where they are in mapped memory."""
    (frame,) = wire.decode_frames(data)
    assert isinstance(frame, BlockFrame | RefFrame)
    return frame


def message_of(frame: BlockFrame | RefFrame) -> bytes:
    """A message of one block."""
    if isinstance(frame, RefFrame):
        return wire.encode_refs(frame.ticket, frame.block_index, [BlockRef(frame.block_id, frame.generation)])
    return wire.encode_blocks([frame])


def _end(data: bytes) -> EndFrame:
    (frame,) = wire.decode_frames(data)
    assert isinstance(frame, EndFrame)
    return frame


def other_generation(data: bytes) -> list[bytes]:
    frame = _block(data)
    return [message_of(replace(frame, generation=frame.generation + 1))]


def says_wrong_generation(data: bytes) -> list[bytes]:
    """The holder's own words for a block that was handed out anew."""
    return [wire.encode_refused(HandoffRefused(RefusalReason.WRONG_GENERATION, "block 3 was handed out anew"))]


def other_request(data: bytes) -> list[bytes]:
    """A frame under another request's ticket, its checksum as it was."""
    frame = _block(data)
    return [message_of(replace(frame, ticket=replace(frame.ticket, request_id="other")))]


def other_request_sealed(data: bytes) -> list[bytes]:
    """Other bytes, as another request's own pull would carry them, under a checksum that holds."""
    frame = _block(data)
    assert isinstance(frame, BlockFrame)
    ticket, payload = replace(frame.ticket, request_id="other"), bytes(len(frame.payload))
    checksum = wire.block_checksum(ticket, frame.block_index, frame.generation, payload)
    return [message_of(replace(frame, ticket=ticket, payload=memoryview(payload), checksum=checksum))]


def without_checksum(data: bytes) -> list[bytes]:
    frame = _block(data)
    assert isinstance(frame, BlockFrame)
    return [message_of(replace(frame, checksum=None))]


def outside_of_memory(data: bytes) -> list[bytes]:
    """A reference to a block that the holder does not have."""
    frame = _block(data)
    assert isinstance(frame, RefFrame)
    return [message_of(replace(frame, block_id=2**20))]


def end_too_early(data: bytes) -> list[bytes]:
    """The end in the place of a block."""
    frame = _block(data)
    end = EndFrame(
        ticket=frame.ticket,
        num_tokens=frame.ticket.num_tokens,
        first_token=SampledToken(7),
        prefill_end_age_s=0.0,
        total_bytes=0,
    )
    return [wire.encode_end(end)]


def end_of_fewer_tokens(data: bytes) -> list[bytes]:
    frame = _end(data)
    return [wire.encode_end(replace(frame, num_tokens=frame.num_tokens - 1))]


def end_of_another(data: bytes) -> list[bytes]:
    frame = _end(data)
    return [wire.encode_end(replace(frame, ticket=replace(frame.ticket, request_id="other")))]


# Tickets


def of_ticket(change: Callable[[Ticket], Ticket]) -> How:
    """Changes the ticket of a pull."""

    def how(data: bytes) -> list[bytes]:
        request = wire.decode_pull(data)
        return [wire.encode_pull(replace(request, ticket=change(request.ticket)))]

    return how


def confirm_other_epoch(data: bytes) -> list[bytes]:
    ticket = wire.decode_ticket(data)
    return [wire.encode_ticket(replace(ticket, epoch=ticket.epoch ^ 2))]


# Hello


def of_hello(change: Callable[[Hello], Hello]) -> How:
    """Changes what one worker says of itself."""
    return lambda data: [wire.encode_hello(change(wire.decode_hello(data)))]


def other_head_dim(hello: Hello) -> Hello:
    layout = KVLayout.from_bytes(hello.layout)
    groups = tuple(replace(group, head_dim=2 * group.head_dim) for group in layout.groups)
    return replace(hello, layout=replace(layout, groups=groups).to_bytes())
