"""How many bytes a second each transport moves: KV of one process pulled by another, over and over, nothing beside it.

Everything is real but the engines: source, server, segment; transport, checks, writes into the reader's memory. What
was pulled first is compared byte by byte. A pull's time is from its request to its last written block; how much of it
went into copying blocks to where they belong stands apart from asking for them and waiting (`transfer_phases`). Beside
each rate stand the processor time of both processes and what a plain copy reaches in the same medium
(`transfer_memory`).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...kvtransfer.collective.transport import CollectiveKVTransport
from ...kvtransfer.cuda_ipc.blocks import DeviceMapper
from ...kvtransfer.grpc_transport import GrpcKVTransport
from ...kvtransfer.layout import KVLayout
from ...kvtransfer.mapped.blocks import HostMapper
from ...kvtransfer.mapped.transport import MappedKVTransport
from ...kvtransfer.store import KVStore
from ...kvtransfer.ticket import PROTOCOL_VERSION, HandoffRefused, Hello, Peer, RefusalReason, Ticket
from ...kvtransfer.transport import KVTransport
from ..config import COLLECTIVE_TRANSPORTS
from .handoff_traffic import CALL_S, pull_once
from .transfer_holder import FINGERPRINT, WORKER_ID, HolderSpec, block_content, join_rank
from .transfer_memory import MEMORIES, large_pull, layout_of, make_store, plain_copy
from .transfer_phases import Watched

TRANSPORTS = ("grpc", "grpc-nosum", "mapped", "cuda_ipc", "gloo", "nccl")
"""`grpc-nosum`: without the checksum."""
_TRANSPORTS_OF = {
    "host": ("grpc", "grpc-nosum", "mapped", "gloo"),
    "staged": ("grpc", "grpc-nosum"),
    "cuda": ("grpc", "grpc-nosum", "cuda_ipc", "nccl"),
}
START_S = 300.0
MOST_COMPARED = 1024
"""Blocks of a pull, evenly spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """What to measure."""

    transports: tuple[str, ...] = ("grpc", "grpc-nosum", "mapped")
    memory: str = "host"
    block_kib: tuple[float, ...] = (64, 512, 2048)
    blocks: tuple[int, ...] = (16, 128, 512)
    """Of one pull."""
    most_mib: float = 512
    """Of one pull; larger ones are left out."""
    seconds: float = 1.0
    """Of each cell, and three pulls at least."""

    def __post_init__(self) -> None:
        if self.memory not in MEMORIES:
            raise ValueError(f"memory: {self.memory!r} is not allowed; allowed: {', '.join(MEMORIES)}")
        for name in self.transports:
            if name not in TRANSPORTS:
                raise ValueError(f"transports: {name!r} is not allowed; allowed: {', '.join(TRANSPORTS)}")
            if name not in _TRANSPORTS_OF[self.memory]:
                allowed = ", ".join(_TRANSPORTS_OF[self.memory])
                raise ValueError(f"transports: {name!r} is not allowed with memory {self.memory!r}; allowed: {allowed}")
        if not self.transports or not self.block_kib or not self.blocks:
            raise ValueError("transports, block_kib and blocks: at least one of each")
        for block_kib in self.block_kib:
            layout_of(round(block_kib * 1024))
        if min(self.blocks) < 1 or max(self.blocks) > 2**16:
            raise ValueError(f"blocks: {list(self.blocks)} is not allowed; allowed: 1…65536 each")
        if not 0 < self.seconds <= 60:
            raise ValueError(f"seconds: {self.seconds:g} is not allowed; allowed: above 0 to 60")
        if not self.shapes():
            raise ValueError(f"most_mib: {self.most_mib:g} is less than every pull that is asked for")

    @property
    def num_cells(self) -> int:
        """That will be measured."""
        return len(self.shapes()) * len(self.transports) + self.transports.count("cuda_ipc")

    def shapes(self) -> list[tuple[int, int]]:
        """(bytes of a block, blocks of a pull), those that are not too large."""
        most = self.most_mib * 2**20
        sizes = [round(kib * 1024) for kib in self.block_kib]
        return [(size, count) for size in sizes for count in self.blocks if size * count <= most]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCell:
    """One transport at one shape."""

    transport: str
    memory: str
    block_bytes: int
    blocks: int
    pulls: int
    pull_s: float
    """Median."""
    best_s: float
    copy_s: float
    """Of a pull, in which blocks were copied into the reader's memory: median."""
    reader_cpu_s: float
    """Processor time of a pull, all threads: mean."""
    holder_cpu_s: float
    plain_bytes_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """By the median pull."""
        return self.block_bytes * self.blocks / self.pull_s

    @property
    def copied_bytes_per_s(self) -> float:
        """While blocks were copied, by the median."""
        return self.block_bytes * self.blocks / max(self.copy_s, 1e-9)

    def figures(self) -> tuple[str, ...]:
        """For people, from the number of blocks on (`HEADS`)."""
        return (
            f"{self.blocks}",
            f"{self.block_bytes * self.blocks / 2**20:g}",
            f"{self.pull_s * 1e3:.2f}",
            f"{self.bytes_per_s / 1e9:.2f}",
            f"{self.plain_bytes_per_s / 1e9:.2f}",
            f"{self.bytes_per_s / self.plain_bytes_per_s:.0%}",
            f"{self.copy_s * 1e3:.2f}",
            f"{self.copied_bytes_per_s / self.plain_bytes_per_s:.0%}",
            f"{self.reader_cpu_s * 1e3:.2f}",
            f"{self.holder_cpu_s * 1e3:.2f}",
        )

    def row(self) -> dict[str, Any]:
        """For JSON."""
        plain = self.plain_bytes_per_s
        shares = {"of_plain": self.bytes_per_s / plain, "copy_of_plain": self.copied_bytes_per_s / plain}
        return asdict(self) | {"bytes_per_s": self.bytes_per_s} | shares


class _Holder:
    """The other process."""

    def __init__(self, process: asyncio.subprocess.Process, facts: dict[str, Any]) -> None:
        self._process = process
        self.peer = Peer(WORKER_ID, facts["epoch"], facts["address"])
        self._attempts = 0

    @property
    def cpu_s(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def ticket(self, blocks: int, block_size: int, *, first: bool = False) -> Ticket:
        """Of a new attempt at KV of so many blocks; `first`: which the holder does not have yet."""
        if first:
            await _ask(self._process, str(blocks))
        self._attempts += 1
        return Ticket(
            request_id=f"{blocks}",
            choice=0,
            prefill_attempt=1,
            decode_attempt=self._attempts,
            prefill_worker=WORKER_ID,
            epoch=self.peer.epoch,
            num_tokens=blocks * block_size,
            fingerprint=FINGERPRINT,
        )


async def _ask(process: asyncio.subprocess.Process, line: str) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line.encode() + b"\n")
    await process.stdin.drain()
    answer = await asyncio.wait_for(process.stdout.readline(), START_S)
    if not answer:
        raise RuntimeError("the holder's process has ended")
    facts: dict[str, Any] = json.loads(answer)
    return facts


@asynccontextmanager
async def _holder(spec: HolderSpec) -> AsyncIterator[_Holder]:
    command = (sys.executable, "-P", "-m", "tandem.cluster.bench.transfer_holder")
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=paths)
    try:
        yield _Holder(process, await _ask(process, json.dumps(asdict(spec))))
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


async def run_transfers(
    options: TransferOptions, on_cell: Callable[[TransferCell], None] = lambda cell: None
) -> list[TransferCell]:
    """Measures every transport at every shape; `on_cell` hears of each as it is done. Of the largest blocks CUDA IPC
    also pulls some GiB: what is less is copied before its calls are paid for. `HandoffRefused` says what a transport
    cannot do here.
    """
    cells = []
    sizes = dict.fromkeys(size for size, _ in options.shapes())
    for block_bytes in sizes:
        counts = [count for size, count in options.shapes() if size == block_bytes]
        large = large_pull(block_bytes) if "cuda_ipc" in options.transports and block_bytes == max(sizes) else 0
        layout = layout_of(block_bytes)
        store = make_store(options.memory, layout, max([*counts, large]))
        spec = HolderSpec(
            memory=options.memory,
            block_bytes=block_bytes,
            blocks=max([*counts, large]),
            ranks=next((name for name in options.transports if name in COLLECTIVE_TRANSPORTS), None),
        )
        async with _holder(spec) as holder:
            known: set[int] = set()
            for name in options.transports:
                async with _transport(name, layout, store) as transport:
                    for count in dict.fromkeys((*counts, large) if large and name == "cuda_ipc" else counts):
                        cell = await _measure(options, name, transport, store, holder, count, first=count not in known)
                        known.add(count)
                        cells.append(cell)
                        on_cell(cell)
    return cells


@asynccontextmanager
async def _transport(name: str, layout: KVLayout, store: KVStore) -> AsyncIterator[KVTransport]:
    control = GrpcKVTransport(block_bytes=layout.block_bytes)
    ranks = await join_rank(store, name) if name in COLLECTIVE_TRANSPORTS else None
    transport = CollectiveKVTransport(control, ranks) if ranks is not None else _without_ranks(name, control, store)
    try:
        yield transport
    finally:
        await transport.close()
        if ranks is not None:
            await ranks.close()  # a thread that were inside of a backend at the end would take the process with it


def _without_ranks(name: str, control: GrpcKVTransport, store: KVStore) -> KVTransport:
    layout = store.layout
    if name in ("grpc", "grpc-nosum"):
        return control
    if name == "mapped":
        return MappedKVTransport(control, layout, mapper=HostMapper(layout, store.host_blocks), required=True)
    if store.device_memory is None:
        raise HandoffRefused(RefusalReason.TRANSPORT_MISMATCH, "this GPU's memory cannot be shared")
    return MappedKVTransport(control, layout, mapper=DeviceMapper(layout, store.device_memory), required=True)


async def _measure(
    options: TransferOptions,
    name: str,
    transport: KVTransport,
    store: KVStore,
    holder: _Holder,
    blocks: int,
    *,
    first: bool,
) -> TransferCell:
    layout = store.layout
    mine = Hello(
        protocol_version=PROTOCOL_VERSION,
        worker_id="reader",
        epoch=1,
        fingerprint=FINGERPRINT,
        layout=layout.to_bytes(),
    )
    await transport.hello(holder.peer, mine, timeout_s=CALL_S)

    async def pull(*, new: bool = False) -> tuple[float, float]:
        """Seconds, and those in which blocks were copied."""
        ticket = await holder.ticket(blocks, layout.block_size, first=new)
        watched = Watched(transport)
        begin_s = time.perf_counter()
        await pull_once(watched, holder.peer, ticket, store, range(blocks), checksum=name == "grpc")
        return time.perf_counter() - begin_s, watched.copy_s

    compared = range(0, blocks, -(-blocks // MOST_COMPARED))
    for block_id in compared:
        store.write_block(block_id, bytes(layout.block_bytes))
    await pull(new=first)
    for block_id in compared:
        if bytes(store.read_block(block_id)) != block_content(block_id, layout.block_bytes):
            raise RuntimeError(f"{name}: block {block_id} came with other bytes")
    await pull()
    plain = plain_copy(name, options.memory, layout.block_bytes, blocks)
    taken: list[tuple[float, float]] = []
    until_s = time.perf_counter() + options.seconds
    reader_s, holder_s = time.process_time(), holder.cpu_s
    while len(taken) < 3 or time.perf_counter() < until_s:
        taken.append(await pull())
    return TransferCell(
        transport=name,
        memory=options.memory,
        block_bytes=layout.block_bytes,
        blocks=blocks,
        pulls=len(taken),
        pull_s=statistics.median(pull_s for pull_s, _ in taken),
        best_s=min(taken)[0],
        copy_s=statistics.median(copy_s for _, copy_s in taken),
        reader_cpu_s=(time.process_time() - reader_s) / len(taken),
        holder_cpu_s=(holder.cpu_s - holder_s) / len(taken),
        plain_bytes_per_s=plain,
    )


HEADS = (
    "transport",
    "memory",
    "block",
    "blocks",
    "MiB",
    "ms",
    "GB/s",
    "plain GB/s",
    "of plain",
    "copying ms",
    "of plain",
    "CPU ms: reader",
    "holder",
)


def table(cells: list[TransferCell]) -> str:
    """Aligned columns."""
    lines: list[tuple[str, ...]] = [HEADS]
    for cell in cells:
        lines.append(
            (
                cell.transport,
                cell.memory,
                f"{cell.block_bytes / 1024:g} KiB",
                *cell.figures(),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
