"""`tandem bench transfer`: two real processes, tiny pulls; what was pulled is compared by the benchmark itself."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from tandem.cluster import cli
from tandem.cluster.bench.transfer import TransferOptions, run_transfers, table
from tandem.cluster.bench.transfer_memory import layout_of, plain_copy
from tandem.kernels import dispatch


def test_every_transport_of_host_memory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "transfer.json"
    command = ["bench", "transfer", "--block-kib", "4,16", "--blocks", "1,40", "--seconds", "0.01"]
    assert cli.run([*command, "--most-mib", "0.5", "--save-result", str(saved)]) == 0
    cells = json.loads(saved.read_text())["cells"]
    shapes = [(4096, 1), (4096, 40), (16384, 1)]
    wanted = [(name, *shape) for shape in shapes for name in ("grpc", "grpc-nosum", "mapped")]
    assert sorted((c["transport"], c["block_bytes"], c["blocks"]) for c in cells) == sorted(wanted)
    assert all(cell["pulls"] >= 3 and cell["bytes_per_s"] > 0 and cell["of_plain"] > 0 for cell in cells)
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


def test_what_cannot_be_measured_is_refused() -> None:
    for fields, message in (
        ({"memory": "tape"}, "memory: 'tape' .*host, staged, cuda"),
        ({"transports": ("pigeon",)}, "transports: 'pigeon'"),
        ({"transports": ("cuda_ipc",)}, "'cuda_ipc' is not allowed with memory 'host'; allowed: mapped"),
        ({"transports": ("mapped",), "memory": "cuda"}, "allowed: cuda_ipc"),
        ({"transports": ("mapped",), "memory": "staged"}, "'mapped' is not allowed with memory 'staged'"),
        ({"blocks": ()}, "at least one of each"),
        ({"blocks": (0,)}, "blocks: .*1…65536"),
        ({"block_kib": (0.1,)}, "block_kib: "),
        ({"seconds": 0.0}, "seconds: 0 "),
        ({"most_mib": 0.1}, "most_mib: 0.1 "),
    ):
        with pytest.raises(ValueError, match=message):
            TransferOptions(**fields)


def test_plain_copies_have_a_pace() -> None:
    assert layout_of(2 * 2**20).groups[0].num_layers == 64
    for transport in ("grpc", "mapped"):
        assert plain_copy(transport, "host", 4096, 64) > 0


@pytest.mark.skipif(dispatch.has_gpu_driver(), reason="a GPU is here")
def test_memory_of_a_gpu_wants_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "transfer", "--memory", "cuda"]) == 2
    assert "memory: 'cuda' is not allowed; allowed: host, staged: no GPU" in capsys.readouterr().err
