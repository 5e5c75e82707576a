"""Measured once, kept on disk; what is wrong with the disk costs a measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import triton
from tandem.kernels.gpu.gemm import CUTS, Cut
from tandem.kernels.gpu.tuning import Tuner, bucket, tuning_folder
from tandem.kernels.gpu.w8a8 import w8a8_linear

SHAPE = bucket(5, 64, 128)


class Machine:
    """Times that are told, and how often each cut ran."""

    def __init__(self, times_s: dict[Cut, float], broken: tuple[Cut, ...] = ()) -> None:
        self.times_s = times_s
        self.broken = broken
        self.ran: list[Cut] = []

    def run(self, cut: Cut) -> None:
        self.ran.append(cut)
        if cut in self.broken:
            raise triton.runtime.errors.OutOfResources(300_000, 166_912, "shared memory")

    def measure(self, run) -> float:
        run()
        return self.times_s.get(self.ran[-1], 1.0)


def test_the_quickest_is_measured_once_and_read_afterwards(tmp_path: Path) -> None:
    machine = Machine({CUTS[2]: 0.5})
    tuner = Tuner(tmp_path / "new", machine.measure)
    assert [tuner.best("w8a8", SHAPE, CUTS, machine.run) for _ in range(3)] == [CUTS[2]] * 3
    assert machine.ran == list(CUTS)
    later = Machine({CUTS[0]: 0.1})
    assert Tuner(tmp_path / "new", later.measure).best("w8a8", SHAPE, CUTS, later.run) == CUTS[2]
    assert later.ran == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w8a8-m8-n64-k128.json"]
    other = Machine({CUTS[1]: 0.1})
    assert Tuner(tmp_path / "new", other.measure).best("w4a16", SHAPE, CUTS, other.run) == CUTS[1]


def test_cuts_that_the_device_refuses_are_left_out(tmp_path: Path) -> None:
    machine = Machine({CUTS[0]: 0.1, CUTS[3]: 0.5}, broken=(CUTS[0],))
    assert Tuner(tmp_path, machine.measure).best("k", SHAPE, CUTS, machine.run) == CUTS[3]
    none = Machine({}, broken=CUTS)
    assert Tuner(tmp_path, none.measure).best("other", SHAPE, CUTS, none.run) == CUTS[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b'{"rows": 16}',
        b'{"rows": "16", "columns": 32, "inner": 256, "splits": 1, "warps": 4, "stages": 4}',
        b'{"rows": 16, "columns": 32, "inner": 256, "splits": -1, "warps": 4, "stages": 4}',
        b'{"rows": 1024, "columns": 1024, "inner": 256, "splits": 1, "warps": 4, "stages": 4}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_costs_time_and_is_mended(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w8a8-m8-n64-k128.json"
    path.write_bytes(content)
    machine = Machine({CUTS[1]: 0.5})
    assert Tuner(tmp_path, machine.measure).best("w8a8", SHAPE, CUTS, machine.run) == CUTS[1]
    assert json.loads(path.read_text())["columns"] == CUTS[1].columns
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    machine = Machine({CUTS[1]: 0.5})
    tuner = Tuner(tmp_path / "file" / "below", machine.measure)
    assert tuner.best("w8a8", SHAPE, CUTS, machine.run) == CUTS[1]


def test_shapes_share_results_up_to_a_power_of_two_of_rows() -> None:
    assert bucket(5, 64, 128) == bucket(8, 64, 128) != bucket(9, 64, 128)
    assert bucket(1, 64, 128) != bucket(1, 128, 64)


def test_devices_and_versions_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    assert tuning_folder("NVIDIA H100 80GB HBM3", "3.6.0") == tmp_path / "tuning" / "NVIDIA-H100-80GB-HBM3-triton-3.6.0"
    assert tuning_folder("../..", "3.9") == tmp_path / "tuning" / "unnamed-triton-3.9"


def test_a_product_asks_its_tuner(tmp_path: Path, device: torch.device) -> None:
    x = torch.ones(1, 128, dtype=torch.int8, device=device)
    scales = torch.ones(8, device=device)
    seen: list[tuple[str, str]] = []

    class Asked(Tuner):
        def best(self, kernel, shape, candidates, run):
            seen.append((kernel, shape))
            run(CUTS[1])
            return CUTS[1]

    y = w8a8_linear(x, scales[:1], x.expand(8, -1), scales, tuner=Asked(tmp_path))
    assert y.unique().tolist() == [128]
    assert seen == [("w8a8", "m1-n8-k128")]
