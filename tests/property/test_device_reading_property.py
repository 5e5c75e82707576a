"""Pulls out of device memory, whatever the sizes of blocks on both sides: every token that is wanted is copied once,
from where it lies to where it belongs, and a block counts when the last of its tokens is there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import cast
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.kvtransfer.cuda_ipc import blocks as blocks_module
from tandem.kvtransfer.cuda_ipc.blocks import DeviceBlocks
from tandem.kvtransfer.cuda_ipc.memory import DeviceCopy, PeerMemory
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped.segment import MappedSegment
from tandem.kvtransfer.transport import PullRequest, RefFrame, WrittenBlocks
from tickets import ticket_of

GROUP = KVGroup(name="all", num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32")
NUM_BLOCKS = 200


class Done(DeviceCopy):
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """It is."""


class Peer(PeerMemory):
    """Notes which (block, slot) of theirs came into which of mine."""

    def __init__(self, theirs: int, mine: int) -> None:
        self._sizes = theirs, mine
        self.came: dict[tuple[int, int], tuple[int, int]] = {}
        self.again = 0

    def begin_copy(
        self, source_ids: Sequence[int], target_ids: Sequence[int], *, first_token: int, num_tokens: int
    ) -> DeviceCopy:
        theirs, mine = self._sizes
        for token in range(first_token, first_token + num_tokens):
            goal = (target_ids[token // mine], token % mine)
            self.again += goal in self.came
            self.came[goal] = (source_ids[token // theirs], token % theirs)
        return Done()

    def close(self) -> None:
        """Nothing is mapped."""


class Generations:
    """Of blocks that are never handed out anew."""

    num_blocks = NUM_BLOCKS

    def generations(self, block_ids: Sequence[int]) -> list[int]:
        return [0] * len(block_ids)


@settings(max_examples=200, deadline=None)
@given(
    theirs=st.integers(1, 9),
    mine=st.integers(1, 9),
    num_tokens=st.integers(1, 60),
    data=st.data(),
)
def test_every_wanted_token_is_copied_once_to_its_place(
    theirs: int, mine: int, num_tokens: int, data: st.DataObject
) -> None:
    my_blocks, their_blocks = -(-num_tokens // mine), -(-num_tokens // theirs)
    first_block = data.draw(st.integers(0, my_blocks), label="first_block")
    cuts = data.draw(st.lists(st.integers(0, their_blocks), max_size=4), label="cuts")
    at_a_time = data.draw(st.integers(1, 20), label="blocks of a copy")
    ids = data.draw(st.permutations(range(100)), label="ids")[: max(my_blocks, their_blocks)]
    source, target = [100 + i for i in ids[:their_blocks]], ids[:my_blocks]
    ticket = ticket_of(num_tokens)
    peer = Peer(theirs, mine)
    blocks = DeviceBlocks(
        KVLayout(block_size=mine, groups=(GROUP,)),
        KVLayout(block_size=theirs, groups=(GROUP,)),
        cast(MappedSegment, Generations()),
        peer,
    )
    reading = blocks.open(PullRequest(ticket=ticket, first_block=first_block, into=tuple(target[first_block:])))
    refs = [
        RefFrame(ticket=ticket, block_index=index, block_id=source[index], generation=0)
        for index in range(reading.first_block, their_blocks)
    ]

    async def pull() -> None:
        told = first_block
        edges = sorted({0, len(refs), *(min(cut, len(refs)) for cut in cuts)})
        for begin, end in itertools.pairwise(edges):
            async for written in reading.take(refs[begin:end]):
                assert isinstance(written, WrittenBlocks)
                assert written.first_block == told
                assert list(written.block_ids) == target[told : told + len(written.block_ids)]
                told += len(written.block_ids)
                whole = [(target[t // mine], t % mine) for t in range(first_block * mine, min(num_tokens, told * mine))]
                assert all(place in peer.came for place in whole), "a block was told before its last token"
        assert told == max(first_block, my_blocks)

    with mock.patch.object(blocks_module, "COPY_BYTES", at_a_time * blocks.theirs.block_bytes):
        asyncio.run(pull())
    wanted = {
        (target[token // mine], token % mine): (source[token // theirs], token % theirs)
        for token in range(first_block * mine, num_tokens)
    }
    assert {place: peer.came[place] for place in wanted} == wanted
    beyond = set(peer.came) - set(wanted)
    assert all(theirs == mine and place[0] == target[-1] for place in beyond), "only the last block is copied whole"
    assert not peer.again
