"""The shared KV memory: nobody but its owner writes, nobody takes another memory for it, and descriptors are passed on
to this user's processes only."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import socket
import struct
from collections.abc import Awaitable, Callable

import pytest
from tandem.cluster.engine.block_pool import BlockPool
from tandem.kvtransfer.layout import KVGroup, KVLayout
from tandem.kvtransfer.mapped import fd_passing, segment
from tandem.kvtransfer.mapped.fd_passing import SegmentServer, fetch, share
from tandem.kvtransfer.mapped.segment import KVSegment, MappedSegment, SegmentError
from tandem.kvtransfer.ticket import SegmentOffer

EPOCH = 2**64 - 3


def layout_of(block_size: int = 4) -> KVLayout:
    group = KVGroup(name="all", num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32")
    return KVLayout(block_size=block_size, groups=(group,))


LAYOUT = layout_of()


@pytest.fixture
def owned() -> KVSegment:
    made = KVSegment(LAYOUT, 10)
    made.publish(EPOCH)
    return made


def mapped(owned: KVSegment) -> MappedSegment:
    return MappedSegment(owned.fileno(), nonce=owned.nonce, epoch=EPOCH, layout=LAYOUT)


def test_what_the_owner_writes_is_read(owned: KVSegment) -> None:
    there = mapped(owned)
    size = LAYOUT.block_bytes
    assert not any(there.block(9))
    owned.blocks[9 * size : 10 * size] = b"\x07" * size
    owned.generations[9] = 2**64 - 1
    assert bytes(there.block(9)) == b"\x07" * size
    assert not any(there.block(8))
    assert there.generations([8, 9]) == [0, 2**64 - 1]
    for block_id in (-1, 10):
        with pytest.raises(SegmentError, match="block_id"):
            there.block(block_id)


def test_the_pool_raises_the_generation_where_readers_see_it(owned: KVSegment) -> None:
    there = mapped(owned)
    pool = BlockPool(10, 4, owned.generations)
    (first,) = pool.allocate(1, "a")
    assert (first.generation, there.generations([first.block_id])) == (1, [1])
    pool.release("a")
    assert there.generations([first.block_id]) == [1], "its content is still what it was"
    pool.allocate(10, "b")
    assert there.generations([first.block_id]) == [2]
    with pytest.raises(ValueError, match="generations"):
        BlockPool(10, 4, owned.generations)
    with pytest.raises(ValueError, match="generations"):
        BlockPool(9, 4, KVSegment(LAYOUT, 10).generations)


def test_committed_memory_is_there_before_anything_is_written() -> None:
    made = KVSegment(LAYOUT, 10_000)
    kept = os.fstat(made.fileno())
    assert kept.st_blocks * 512 < kept.st_size // 2, "nothing but the header"
    if made.commit():  # not on older kernels, nor where there is too little memory
        kept = os.fstat(made.fileno())
        assert kept.st_blocks * 512 >= kept.st_size
        assert not any(MappedSegment(made.fileno(), nonce=made.nonce, epoch=0, layout=LAYOUT).block(9_999))


def test_more_memory_than_is_left_is_not_taken_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "available_bytes", lambda: 10_000)
    made = KVSegment(LAYOUT, 10_000)
    assert not made.commit()
    kept = os.fstat(made.fileno())
    assert kept.st_blocks * 512 < kept.st_size // 2


def test_readers_cannot_write_and_nobody_can_resize(owned: KVSegment) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(owned.fileno(), mmap.PAGESIZE)
    with pytest.raises(TypeError):
        mapped(owned).block(0)[0] = 1
    for size in (0, 2**20):
        with pytest.raises(PermissionError):
            os.ftruncate(owned.fileno(), size)


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        ({"nonce": b"x" * 16}, "nonce"),
        ({"epoch": 1}, "epoch"),
        ({"layout": layout_of(8)}, "layout"),
    ],
)
def test_another_memory_is_not_taken_for_the_offered_one(
    owned: KVSegment, expected: dict[str, object], complaint: str
) -> None:
    wanted: dict[str, object] = {"nonce": owned.nonce, "epoch": EPOCH, "layout": LAYOUT}
    with pytest.raises(SegmentError, match=complaint):
        MappedSegment(owned.fileno(), **(wanted | expected))  # type: ignore[arg-type]


def forged(spoil: Callable[[bytearray], None], total_bytes: int = 2 * 4096 + 10 * LAYOUT.block_bytes) -> int:
    """A sealed memfd with the header of a segment, spoiled."""
    import fcntl

    honest = KVSegment(LAYOUT, 10)
    honest.nonce = b"n" * 16
    honest.publish(EPOCH)
    whole = -(-total_bytes // 4096) * 4096
    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, whole)
    with mmap.mmap(honest.fileno(), 4096, prot=mmap.PROT_READ) as there, mmap.mmap(fd, whole) as memory:
        header = bytearray(there[:4096])
        spoil(header)
        memory[: min(4096, whole)] = bytes(header)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


HEADER = struct.Struct("<8sIIQ16s16sQQQQQ")
NUM_BLOCKS_AT = 56


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda header: header.__setitem__(0, 0), "version"),
        (lambda header: header.__setitem__(8, 9), "version"),
        (lambda header: struct.pack_into("<Q", header, NUM_BLOCKS_AT, 2**40), "sizes"),
        (lambda header: struct.pack_into("<Q", header, NUM_BLOCKS_AT, 2**64 - 1), "sizes"),
        (lambda header: struct.pack_into("<Q", header, NUM_BLOCKS_AT + 24, 0), "sizes"),
    ],
)
def test_headers_that_do_not_fit_are_refused(spoil: Callable[[bytearray], None], complaint: str) -> None:
    fd = forged(spoil)
    with pytest.raises(SegmentError, match=complaint):
        segment.take(fd, nonce=b"n" * 16, epoch=EPOCH, layout=LAYOUT)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_that_could_shrink_under_a_reader_is_refused() -> None:
    with open("/dev/zero", "rb") as unsealed, pytest.raises(SegmentError):
        MappedSegment(unsealed.fileno(), nonce=b"n" * 16, epoch=EPOCH, layout=LAYOUT)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, 2**16)
    with pytest.raises(SegmentError, match="sealed"):
        segment.take(fd, nonce=b"n" * 16, epoch=EPOCH, layout=LAYOUT)


def test_without_memfd_there_is_memory_that_nobody_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    made = KVSegment(LAYOUT, 3)
    made.blocks[:4] = b"abcd"
    made.generations[2] = 5
    assert (bytes(made.blocks[:4]), made.generations[2], made.shareable) == (b"abcd", 5, False)
    with pytest.raises(SegmentError, match="not shared"):
        made.fileno()
    assert asyncio.run(share(made)) is None
    made.close()


def test_a_segment_that_is_forgotten_leaves_no_descriptor() -> None:
    gc.collect()
    before = memories()
    for close in (True, False) * 20:
        made = KVSegment(LAYOUT, 3)
        if close:
            made.close()
            made.close()
            assert not made.shareable
    del made
    gc.collect()
    assert not memories() - before


def memories() -> set[tuple[str, int]]:
    """Shared memories that this process has open, each as descriptor and inode. Sockets that nobody closed are told by
    their ResourceWarning; other descriptors are those of whatever else runs in this process.
    """
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was open while the folder was read
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
                found.add((fd, os.stat(f"/proc/self/fd/{fd}").st_ino))
    return found


def play(owned: KVSegment, scene: Callable[[SegmentServer], Awaitable[None]], **options: int) -> None:
    async def run() -> None:
        server = SegmentServer(owned, **options)
        await server.start()
        try:
            await scene(server)
        finally:
            await server.stop()
            await server.stop()

    gc.collect()
    before = memories()
    asyncio.run(run())
    gc.collect()
    assert not memories() - before


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0.001)


def test_the_descriptor_arrives_and_both_ends_notice_the_other_go(owned: KVSegment) -> None:
    async def scene(server: SegmentServer) -> None:
        connection, fd, _ = await fetch(server.offer, timeout_s=10)
        there = segment.take(fd, nonce=server.offer.nonce, epoch=EPOCH, layout=LAYOUT)
        assert not any(there.block(0))
        assert server.readers == 1
        connection.close()
        await until(lambda: server.readers == 0)
        connection, fd, _ = await fetch(server.offer, timeout_s=10)
        os.close(fd)
        await server.stop()
        assert await asyncio.get_running_loop().sock_recv(connection, 1) == b""
        connection.close()
        del there

    play(owned, scene)


def test_readers_are_bounded(owned: KVSegment) -> None:
    async def scene(server: SegmentServer) -> None:
        connection, fd, _ = await fetch(server.offer, timeout_s=10)
        os.close(fd)
        with pytest.raises(SegmentError, match="turned this reader away"):
            await fetch(server.offer, timeout_s=10)
        connection.close()
        await until(lambda: server.readers == 0)
        connection, fd, _ = await fetch(server.offer, timeout_s=10)
        os.close(fd)
        connection.close()

    play(owned, scene, max_readers=1)


def test_another_users_process_gets_nothing(owned: KVSegment, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(server: SegmentServer) -> None:
        mine = os.geteuid()
        monkeypatch.setattr(fd_passing.os, "geteuid", lambda: mine + 1)
        with pytest.raises(SegmentError, match=f"runs as user {mine}"):
            await fetch(server.offer, timeout_s=10)
        with socket.socket(socket.AF_UNIX) as stranger:  # one that does not ask who is there
            stranger.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(stranger, b"\0" + server.offer.socket_name.encode())
            assert await asyncio.wait_for(loop.sock_recv(stranger, 1), 10) == b""
        assert server.readers == 0

    play(owned, scene)


def test_an_owner_that_says_nothing_or_nonsense_is_given_up(owned: KVSegment) -> None:
    async def scene(server: SegmentServer) -> None:
        nobody = SegmentOffer(socket_name="tandem-kv-nobody", nonce=b"n" * 16)
        with pytest.raises(SegmentError, match="cannot be reached"):
            await fetch(nobody, timeout_s=10)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(b"\0tandem-kv-test-silent")
            silent.listen(4)
            silent.setblocking(False)
            offer = SegmentOffer(socket_name="tandem-kv-test-silent", nonce=b"n" * 16)
            with pytest.raises(SegmentError, match=r"within 0\.05 s"):
                await fetch(offer, timeout_s=0.05)
            (await loop.sock_accept(silent))[0].close()
            asking = asyncio.create_task(fetch(offer, timeout_s=10))
            owner, _ = await loop.sock_accept(silent)
            with owner:
                three = [os.memfd_create(name) for name in "abc"]
                socket.send_fds(owner, [fd_passing.GREETING], three)
                for fd in three:
                    os.close(fd)
                with pytest.raises(SegmentError, match="not a KV segment's socket"):
                    await asking
            asking = asyncio.create_task(fetch(offer, timeout_s=10))
            owner, _ = await loop.sock_accept(silent)
            with owner:
                await loop.sock_sendall(owner, b"HTTP/1.1 400")
                with pytest.raises(SegmentError, match="not a KV segment's socket"):
                    await asking

    play(owned, scene)
