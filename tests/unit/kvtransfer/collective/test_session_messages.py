"""What the ends of a session say to each other, and what a worker says to its ranks, as bytes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import pytest
from ends import OPEN, READ, split
from hypothesis import given
from hypothesis import strategies as st
from tandem.kvtransfer.collective import commands, messages
from tandem.kvtransfer.collective.commands import Begin, Join, Receive
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason

FIELDS = st.none() | st.booleans() | st.integers(-(2**31), 2**32) | st.text(max_size=4) | st.binary(max_size=20)


@given(st.binary(max_size=64) | st.lists(FIELDS, max_size=8).map(msgpack.packb))
def test_any_bytes_are_refused_or_a_message(data: bytes) -> None:
    for decode, encode in ((messages.decode, messages.encode), (messages.decode_offer, messages.encode_offer)):
        with suppress(HandoffRefused):
            found: Any = decode(data)
            assert found is None or encode(decode(encode(found))) == encode(found)


@pytest.mark.parametrize("message", [OPEN, READ, messages.Opened(secret=b"y" * 16), messages.Go(batch=3)])
def test_a_message_that_was_cut_short_or_goes_on_is_refused(message: messages.Message) -> None:
    whole = messages.encode(message)
    for data in (*(whole[:length] for length in range(len(whole))), whole + b"\x00"):
        with pytest.raises(HandoffRefused):
            messages.decode(data)


def test_messages_and_commands_come_as_they_were_said() -> None:
    refusal = HandoffRefused(RefusalReason.LIMIT, "full")
    for message in (OPEN, READ, messages.Opened(secret=b"y" * 16), messages.Go(batch=3)):
        assert messages.decode(messages.encode(message)) == message
    no = messages.decode(messages.encode(messages.No(batch=3, refusal=refusal)))
    assert isinstance(no, messages.No)
    assert (no.batch, str(no.refusal)) == (3, str(refusal))
    key = messages.PairKey(pair=2, key="a/b", value=b"\x00\xff")
    assert messages.decode(messages.encode(key)) == key
    join = Join(session=b"s", pair=1, sends=True, source=split(), target=split(32, 2, 2), group="g", proof=b"p")
    receive = Receive(session=b"s", pair=1, batch=2, first_token=0, end_token=9, block_ids=(4, 5), cleared_from=None)
    for command in (join, receive, Begin(backend="gloo", host="h", timeout_s=0.5)):
        assert commands.decode(commands.encode(command)) == command
    with pytest.raises(ValueError, match="not a KV command"):
        commands.decode(b"\x00")
