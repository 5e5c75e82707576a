"""`tandem bench transfer`: two real processes, tiny pulls; what was pulled is compared by the benchmark itself."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import torch
from tandem.cluster import cli
from tandem.cluster.bench import transfer_phases
from tandem.cluster.bench.transfer import TransferOptions, run_transfers, table
from tandem.cluster.bench.transfer_memory import large_pull, layout_of, plain_copy
from tandem.cluster.bench.transfer_phases import Watched
from tandem.cluster.types import SampledToken
from tandem.kernels import dispatch
from tandem.kvtransfer.ticket import Peer
from tandem.kvtransfer.transport import BlockFrame, EndFrame, PullRequest, WrittenBlocks
from tickets import ticket_of


def test_every_transport_of_host_memory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "transfer.json"
    command = ["bench", "transfer", "--block-kib", "4,16", "--blocks", "1,40", "--seconds", "0.01"]
    assert cli.run([*command, "--most-mib", "0.5", "--save-result", str(saved)]) == 0
    cells = json.loads(saved.read_text())["cells"]
    shapes = [(4096, 1), (4096, 40), (16384, 1)]
    wanted = [(name, *shape) for shape in shapes for name in ("grpc", "grpc-nosum", "mapped")]
    assert sorted((c["transport"], c["block_bytes"], c["blocks"]) for c in cells) == sorted(wanted)
    assert all(cell["pulls"] >= 3 and cell["bytes_per_s"] > 0 and cell["of_plain"] > 0 for cell in cells)
    assert all(0 < cell["copy_s"] < cell["pull_s"] for cell in cells)
    assert "of plain" in capsys.readouterr().out


def test_staged_memory_goes_over_grpc() -> None:
    options = TransferOptions(transports=("grpc",), memory="staged", block_kib=(16,), blocks=(300,), seconds=0.01)
    (cell,) = asyncio.run(run_transfers(options))
    assert (cell.transport, cell.memory, cell.blocks) == ("grpc", "staged", 300)
    assert "300" in table([cell])


def test_ranks_hand_it_on() -> None:
    options = TransferOptions(transports=("gloo",), block_kib=(16,), blocks=(40,), seconds=0.01)
    (cell,) = asyncio.run(run_transfers(options))
    assert (cell.transport, cell.memory, cell.blocks) == ("gloo", "host", 40)
    assert cell.bytes_per_s > 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("KV ")]


def test_copying_is_told_apart_from_asking() -> None:
    """Blocks that a device has copied bring their times, two copies at once; those that are given are copied until the
    next is wanted.
    """
    ticket = ticket_of(3)
    frame = BlockFrame(ticket=ticket, block_index=0, generation=1, payload=memoryview(b""), checksum=None)
    copies = [
        WrittenBlocks(ticket=ticket, first_block=1, block_ids=(1,), arrived_age_s=age_s, written_age_s=0.02)
        for age_s in (7.0, 6.0)
    ]

    end = EndFrame(
        ticket=ticket, num_tokens=2, first_token=SampledToken(1, 0.0, ()), prefill_end_age_s=0.0, total_bytes=0
    )

    class Slow(Watched):
        """A transport between whose frames 50 ms pass; who pulls takes 10 ms for a frame."""

        async def pull(self, *given: object, **more: object) -> AsyncGenerator[Any, None]:
            for came in (*copies, (frame,), end):
                clock[0] += 0.05
                yield came

    async def scene() -> float:
        watched = Watched(Slow(None))  # type: ignore[arg-type]
        request = PullRequest(ticket=ticket, first_block=0, into=(0, 1))
        async for _ in watched.pull(Peer("p", 1, ""), request, timeout_s=1):
            clock[0] += 0.01
        return watched.copy_s

    clock = [10.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer_phases.time, "perf_counter", lambda: clock[0])
        assert asyncio.run(scene()) == pytest.approx(6.98 + 0.06 + 0.01)


def test_a_large_pull_leaves_room_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for free_gib, wanted in ((70, 2048), (8, 512), (0, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free_gib: (free * 2**30, 80 * 2**30))
        assert large_pull(2 * 2**20) == wanted


def test_what_cannot_be_measured_is_refused() -> None:
    for fields, message in (
        ({"memory": "tape"}, "memory: 'tape' .*host, staged, cuda"),
        ({"transports": ("pigeon",)}, "transports: 'pigeon'"),
        ({"transports": ("cuda_ipc",)}, "'cuda_ipc' is not allowed with memory 'host'; allowed: grpc, "),
        ({"transports": ("nccl",)}, "with memory 'host'; allowed: grpc, grpc-nosum, mapped, gloo"),
        ({"transports": ("mapped",), "memory": "cuda"}, "allowed: grpc, grpc-nosum, cuda_ipc, nccl"),
        ({"transports": ("mapped",), "memory": "staged"}, "'mapped' is not allowed with memory 'staged'"),
        ({"blocks": ()}, "at least one of each"),
        ({"blocks": (0,)}, "blocks: .*1…65536"),
        ({"block_kib": (0.1,)}, "block_kib: "),
        ({"seconds": 0.0}, "seconds: 0 "),
        ({"most_mib": 0.1}, "most_mib: 0.1 "),
    ):
        with pytest.raises(ValueError, match=message):
            TransferOptions(**fields)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--transports", "pigeon"),
        ("--memory", "tape"),
        ("--block-kib", "big"),
        ("--blocks", "many"),
        ("--seconds", "0"),
        ("--most-mib", "0.1"),
    ],
)
def test_the_option_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "transfer", option, value]) == 2
    assert f"tandem: {option}: " in capsys.readouterr().err


def test_plain_copies_have_a_pace() -> None:
    assert layout_of(2 * 2**20).groups[0].num_layers == 64
    for transport in ("grpc", "mapped"):
        assert plain_copy(transport, "host", 4096, 64) > 0


@pytest.mark.skipif(dispatch.has_gpu_driver(), reason="a GPU is here")
def test_memory_of_a_gpu_wants_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "transfer", "--memory", "cuda"]) == 2
    assert "--memory: 'cuda' is not allowed; allowed: host, staged: no GPU" in capsys.readouterr().err
