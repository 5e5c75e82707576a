"""Blocks of a rank that nobody can map, over the link that its leader has anyway."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest
from tandem.cluster.engine.devices.kv_memory import HostKVStore, kv_layout
from tandem.cluster.engine.parallel import link_kv
from tandem.cluster.engine.parallel.kv import RankedKVStore
from tandem.cluster.engine.parallel.link_kv import BlockServer, LinkBlocks
from tandem.cluster.engine.parallel.messages import RankLost
from tandem.cluster.models.registry import CONFIGS
from tandem.kvtransfer.layout import KVSplit

LAYOUT = kv_layout(CONFIGS["tiny-llama"], "float32", 4)
SPLIT = KVSplit(layout=LAYOUT, tensor_parallel=2, pipeline_stages=1)
BLOCKS = 9


class Links:
    """What `LinkBlocks` uses of `Followers`: one follower, which answers in a thread of its own."""

    def __init__(self) -> None:
        self.on_blocks: dict[int, Callable[[bytes], None]] = {}
        self.on_kv_lost: list[Callable[[str], None]] = []
        self.requests = 0
        self.store = HostKVStore(SPLIT.rank_layout(1), BLOCKS)
        self.server = BlockServer(self.store, lambda answer: self.on_blocks[1](answer))
        self.lost: RankLost | None = None
        threading.Thread(target=self.server.serve, daemon=True).start()

    def say_blocks(self, rank: int, request: bytes) -> None:
        self.requests += 1
        if self.lost is None:
            self.server.hear(request)

    def lose(self, rank: int, why: str) -> NoReturn:
        self.lost = self.lost or RankLost(f"rank {rank}: {why}")
        raise self.lost

    def check(self) -> None:
        if self.lost is not None:
            raise self.lost


@pytest.fixture
def links() -> Iterator[Links]:
    links = Links()
    yield links
    links.store.close()


def blocks_of(links: Links) -> LinkBlocks:
    return LinkBlocks(links, 1, SPLIT.rank_layout(1).block_bytes)  # type: ignore[arg-type]


def whole(number: int) -> bytes:
    return bytes((number + i) % 251 for i in range(LAYOUT.block_bytes))


@pytest.mark.parametrize("per_message", [1, 2, 100])
def test_whole_blocks_are_written_and_read(links: Links, monkeypatch: pytest.MonkeyPatch, per_message: int) -> None:
    """Any number of blocks a message; more reads are begun than may be without an answer."""
    size = SPLIT.rank_layout(1).block_bytes
    monkeypatch.setattr(link_kv, "MESSAGE_BYTES", per_message * size)
    monkeypatch.setattr(link_kv, "MAX_REQUESTS", 2)
    own = HostKVStore(SPLIT.rank_layout(0), BLOCKS)
    store = RankedKVStore(SPLIT, BLOCKS, {1: blocks_of(links)}, own=own)
    store.write_blocks(range(BLOCKS), [whole(number) for number in range(BLOCKS)])
    begun = [store.begin_read([first, first + 1]) for first in range(0, BLOCKS - 1, 2)]
    assert bytes(store.read_block(8)) == whole(8)
    for first, read in zip(range(0, BLOCKS - 1, 2), begun, strict=True):
        assert read is not None
        assert [bytes(view) for view in read.views()] == [whole(first), whole(first + 1)]
        read.end()
    store.close()
    own.close()


def test_a_lost_rank_is_an_error(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_kv, "BLOCK_S", 0.05)
    blocks = blocks_of(links)
    links.lost = RankLost("rank 1 has ended")
    with pytest.raises(RankLost, match="rank 1 has ended"):
        blocks.take(blocks.ask([0]))


def test_nobody_waits_for_a_rank_that_is_lost_meanwhile(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor until BLOCK_S is over: who waits may be the worker's event loop, which has the loss to tell."""

    why: list[str] = []

    def lost_right_after() -> None:
        links.lost = RankLost("rank 1 has ended")
        for on_lost in links.on_kv_lost:
            on_lost("rank 1 has ended")

    def lose(rank: int, reason: str) -> NoReturn:
        why.append(reason)
        Links.lose(links, rank, reason)

    monkeypatch.setattr(link_kv, "BLOCK_S", 0.05)
    monkeypatch.setattr(links.server, "hear", lambda request: None)
    monkeypatch.setattr(links, "check", lost_right_after)
    monkeypatch.setattr(links, "lose", lose)
    blocks = blocks_of(links)
    with pytest.raises(RankLost, match="rank 1 has ended"):
        blocks.take(blocks.ask([0]))
    assert why == ["rank 1 has ended"], "nobody waited for an answer"


def test_nobody_waits_for_a_rank_once_its_worker_closes(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who waits already nor who asks afterwards, though no rank was lost."""
    asked = threading.Event()
    monkeypatch.setattr(links.server, "hear", lambda request: asked.set())
    monkeypatch.setattr(links, "check", lambda: None)
    blocks = blocks_of(links)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: blocks.take(blocks.ask([0])))
        assert asked.wait(10)
        for on_lost in links.on_kv_lost:
            on_lost("the worker is closing")
        with pytest.raises(RankLost, match="rank 1: the worker is closing"):
            reading.result()
    with pytest.raises(RankLost, match="rank 1: the worker is closing"):
        blocks.take(blocks.ask([0]))


def test_an_answer_that_comes_too_late_is_nobody_elses(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_kv, "BLOCK_S", 0.05)
    late: list[bytes] = []
    monkeypatch.setattr(links.server, "hear", late.append)
    blocks = blocks_of(links)
    with pytest.raises(RankLost, match=r"rank 1: no answer about its KV for 0.05 s"):
        blocks.take(blocks.ask([0]))
    links.on_blocks[1](links.server._answer(memoryview(late[0])))
    with pytest.raises(RankLost, match=r"rank 1: no answer"):
        blocks.take(blocks.ask([1]))


def test_an_answer_of_another_size_is_an_error(links: Links) -> None:
    blocks = LinkBlocks(links, 1, 7)  # type: ignore[arg-type]
    with pytest.raises(RankLost, match="bytes of KV are not 1 blocks of 7"):
        blocks.take(blocks.ask([0]))


@pytest.mark.parametrize("request_", [b"\x03\x01\x00\x00\x00" + bytes(8), b"\x02\x01\x00\x00\x00" + bytes(9)])
def test_what_is_no_request_is_refused(links: Links, request_: bytes) -> None:
    with pytest.raises(ValueError, match=r"operation \d with \d bytes for 1 blocks"):
        links.server._answer(memoryview(request_))
