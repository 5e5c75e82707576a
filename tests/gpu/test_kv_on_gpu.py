"""KV in a GPU's memory: through staging, out of another process's memory, and after that process was killed. The
protocol around it is tested without a GPU (tests/integration/test_kv_cuda_ipc.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
pytest.importorskip("msgpack")
pytest.importorskip("xxhash")
sys.path.insert(0, str(Path(__file__).parent))  # modules that these tests share

from kv_owner import EPOCH, content, layout_of
from tandem.cluster.engine.gpu.kv_store import DeviceKVStore
from tandem.kvtransfer.cuda_ipc.blocks import DeviceMapper
from tandem.kvtransfer.layout import KVLayout
from tandem.kvtransfer.mapped.blocks import MappedBlocks
from tandem.kvtransfer.mapped.fd_passing import fetch
from tandem.kvtransfer.ticket import HandoffRefused, RefusalReason, SegmentOffer, Ticket
from tandem.kvtransfer.transport import PullRequest, RefFrame, WrittenBlocks

NUM_BLOCKS = 24
IDS = [5, 4, 17, 18, 19, 0, 23]


@contextmanager
def owner(block_size: int = 16) -> Iterator[tuple[subprocess.Popen[str], SegmentOffer]]:
    """Another process with KV on this GPU."""
    command = [sys.executable, str(Path(__file__).with_name("kv_owner.py")), str(block_size), str(NUM_BLOCKS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said: dict[str, Any] = json.loads(process.stdout.readline())
            if "error" in said:
                pytest.skip(said["error"])
            yield process, SegmentOffer(socket_name=said["socket_name"], nonce=bytes.fromhex(said["nonce"]))
        finally:
            process.kill()


@pytest.fixture
def store() -> Iterator[DeviceKVStore]:
    made = DeviceKVStore(layout_of(16), NUM_BLOCKS, device="cuda")
    yield made
    made.close()


@asynccontextmanager
async def mapped(mine: DeviceKVStore, offer: SegmentOffer, theirs: KVLayout) -> AsyncIterator[MappedBlocks]:
    assert mine.device_memory is not None
    connection, fd, device_fd = await fetch(offer, timeout_s=20)
    mapper = DeviceMapper(mine.layout, mine.device_memory)
    blocks = mapper.map(fd, device_fd, offer, epoch=EPOCH, layout=theirs.to_bytes())
    try:
        yield blocks
    finally:
        blocks.close()
        connection.close()


async def pulled(blocks: MappedBlocks, mine: DeviceKVStore, theirs: KVLayout, num_tokens: int) -> list[int]:
    """Copies the KV that lies in `IDS` into this store's first blocks; the blocks of each step."""
    ticket = Ticket(
        request_id="r",
        choice=0,
        prefill_attempt=1,
        decode_attempt=1,
        prefill_worker="p",
        epoch=EPOCH,
        num_tokens=num_tokens,
        fingerprint="fp",
    )
    into = tuple(range(mine.layout.blocks_for(num_tokens)))
    reading = blocks.open(PullRequest(ticket=ticket, first_block=0, into=into))
    refs = [
        RefFrame(ticket=ticket, block_index=index, block_id=block_id, generation=1)
        for index, block_id in enumerate(IDS[: theirs.blocks_for(num_tokens)])
    ]
    steps = []
    for part in (refs[:2], refs[2:]):
        async for written in reading.take(part):
            assert isinstance(written, WrittenBlocks)
            steps.append(len(written.block_ids))
    assert sum(steps) == len(into)
    return steps


@pytest.mark.parametrize("copy_alone_bytes", [0, 2**30], ids=["copy engine", "kernels"])
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_staged_is_what_is_there(copy_alone_bytes: int, shared: bool) -> None:
    layout = layout_of(16)
    store = DeviceKVStore(
        layout,
        NUM_BLOCKS,
        device="cuda",
        staging_bytes=3 * layout.block_bytes,
        copy_alone_bytes=copy_alone_bytes,
        shared=shared,
    )
    try:
        assert not store.tensor.any()
        wanted = {block_id: random.Random(block_id).randbytes(layout.block_bytes) for block_id in IDS}
        store.write_blocks(IDS, [wanted[block_id] for block_id in IDS])
        for start in range(0, len(IDS), 3):
            part = IDS[start : start + 3]
            begun = store.begin_read(part)
            assert [bytes(view) for view in store.read_blocks(part)] == [wanted[block_id] for block_id in part]
            assert begun is not None
            assert [bytes(view) for view in begun.views()] == [wanted[block_id] for block_id in part]
            begun.end()
        rest = [block_id for block_id in range(NUM_BLOCKS) if block_id not in IDS]
        assert not store.tensor[rest].any()
    finally:
        store.close()


@pytest.mark.alone
def test_a_closed_store_gives_its_memory_back() -> None:
    torch.cuda.synchronize()
    torch.zeros(1, device="cuda")
    before, _ = torch.cuda.mem_get_info()
    layout = layout_of(16)
    store = DeviceKVStore(layout, 2**30 // layout.block_bytes, device="cuda")
    held, _ = torch.cuda.mem_get_info()
    assert before - held >= 2**30
    store.close()
    store.close()
    after, _ = torch.cuda.mem_get_info()
    assert after >= before - 256 * 2**20


def test_blocks_come_out_of_another_processs_memory(store: DeviceKVStore) -> None:
    async def scene(offer: SegmentOffer) -> None:
        async with mapped(store, offer, store.layout) as blocks:
            await pulled(blocks, store, store.layout, 100)
            for index, block_id in enumerate(IDS):
                assert bytes(store.read_block(index)) == content(block_id, store.layout)

    with owner() as (_, offer):
        asyncio.run(scene(offer))


@pytest.mark.parametrize("block_size", [32, 8])
def test_blocks_of_another_size_come_out_as_the_readers(store: DeviceKVStore, block_size: int) -> None:
    theirs = layout_of(block_size)
    tokens = min(100, len(IDS) * block_size)

    async def scene(offer: SegmentOffer) -> None:
        async with mapped(store, offer, theirs) as blocks:
            await pulled(blocks, store, theirs, tokens)

    with owner(block_size) as (_, offer):
        asyncio.run(scene(offer))
    held = torch.stack(
        [torch.frombuffer(bytearray(content(block_id, theirs)), dtype=torch.int16) for block_id in IDS]
    ).view(len(IDS), 4, 2, 8, block_size, 64)
    mine = store.tensor.view(torch.int16).cpu()
    for token in range(tokens):
        wanted = held[token // block_size, :, :, :, token % block_size]
        assert torch.equal(mine[token // 16, :, :, :, token % 16], wanted), token


def test_a_block_that_was_handed_out_anew_is_noticed(store: DeviceKVStore) -> None:
    async def scene(process: subprocess.Popen[str], offer: SegmentOffer) -> None:
        async with mapped(store, offer, store.layout) as blocks:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{IDS[3]}\n")
            process.stdin.flush()
            process.stdout.readline()
            with pytest.raises(HandoffRefused) as refused:
                await pulled(blocks, store, store.layout, 100)
            assert refused.value.reason is RefusalReason.WRONG_GENERATION

    with owner() as (process, offer):
        asyncio.run(scene(process, offer))


def test_the_owners_death_costs_its_mapping_and_not_this_process(store: DeviceKVStore) -> None:
    async def scene(process: subprocess.Popen[str], offer: SegmentOffer) -> None:
        async with mapped(store, offer, store.layout) as blocks:
            await pulled(blocks, store, store.layout, 100)
            process.send_signal(signal.SIGKILL)
            process.wait(20)
            # The memory lives as long as it is mapped; a device that says otherwise fails the pull and no more.
            with contextlib.suppress(HandoffRefused):
                await pulled(blocks, store, store.layout, 100)
            blocks.close()
            with pytest.raises(HandoffRefused, match="closed its memory"):
                await pulled(blocks, store, store.layout, 100)

    with owner() as (process, offer):
        asyncio.run(scene(process, offer))
    store.write_block(3, content(1, store.layout))
    assert bytes(store.read_block(3)) == content(1, store.layout)
    assert float(torch.ones(1000, device="cuda").sum()) == 1000
    with owner() as (_, offer):  # its next life is mapped anew

        async def again() -> None:
            async with mapped(store, offer, store.layout) as blocks:
                await pulled(blocks, store, store.layout, 100)

        asyncio.run(again())
    assert bytes(store.read_block(0)) == content(IDS[0], store.layout)
