"""KV between two processes that share this GPU: CUDA IPC against a device-to-device copy, gRPC with pinned staging
against a TCP connection on loopback. As `tandem bench transfer --memory cuda`; without a GPU (a dry run) a tiny pull of
staged host memory.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Bounds, Line, Tell
from tandem.cluster.bench.transfer import TransferCell, TransferOptions, run_transfers
from tandem.kvtransfer.freed_memory import keep_freed_memory

TITLE = "KV between two processes on one GPU"
HEADS = (
    "transport",
    "block KiB",
    "blocks",
    "MiB",
    "ms",
    "GB/s",
    "plain GB/s",
    "of plain",
    "copying ms",
    "of plain",
    "reader CPU ms",
    "holder CPU ms",
)


def lines(device: torch.device, bounds: Bounds) -> Iterator[Callable[[Tell], None]]:
    """A holder process for each size of blocks: Llama-3.1-8B's first."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    keep_freed_memory()
    on_gpu = device.type == "cuda"
    for block_kib in (2048.0, 64.0, 512.0) if on_gpu else (4.0,):
        yield partial(_pulls, on_gpu, block_kib)


def _pulls(on_gpu: bool, block_kib: float, tell: Tell) -> None:
    options = TransferOptions(
        transports=("cuda_ipc", "grpc", "grpc-nosum") if on_gpu else ("grpc",),
        memory="cuda" if on_gpu else "staged",
        block_kib=(block_kib,),
        blocks=(16, 128, 512) if on_gpu else (4,),
        most_mib=256,
        seconds=0.3 if on_gpu else 0.01,
    )

    def measured(cell: TransferCell) -> None:
        cells = (cell.transport, f"{cell.block_bytes / 1024:g}", *cell.figures())
        tell(Line(title=TITLE, heads=HEADS, cells=cells))

    asyncio.run(run_transfers(options, measured))
