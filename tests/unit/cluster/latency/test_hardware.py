"""Hardware files: those of the package, and what is refused in others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tandem.cluster.latency.hardware import FOLDER, DeviceKind, known_hardware, load_hardware


def changed(folder: Path, change: dict) -> str:
    """The A100's file with some values replaced (None: left out)."""
    values = yaml.safe_load((FOLDER / "a100-80g.yaml").read_text())
    for dotted, value in change.items():
        *sections, last = dotted.split(".")
        section = values
        for name in sections:
            section = section[name]
        if value is None:
            del section[last]
        else:
            section[last] = value
    path = folder / "device.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_package_brings_the_devices_it_promises() -> None:
    assert known_hardware() == ["a100-80g", "cpu-avx2", "cpu-zen4", "h100", "h200", "l4"]


@pytest.mark.parametrize("name", ["a100-80g", "cpu-avx2", "cpu-zen4", "h100", "h200", "l4"])
def test_a_device_says_what_it_is(name: str) -> None:
    device = load_hardware(name)
    assert device.name == name
    assert device.kind is (DeviceKind.CPU if name.startswith("cpu") else DeviceKind.GPU)
    assert device.peaks("bfloat16").flops_s >= device.peaks("float32").flops_s
    inside, between = device.link(inside_node=True), device.link(inside_node=False)
    assert inside.transfer_time_s(2**20) < between.transfer_time_s(2**20)


@pytest.mark.parametrize("name", ["a100-80g", "h100"])
def test_fitted_devices_say_how_far_the_fit_can_be_trusted(name: str) -> None:
    held_out = load_hardware(name).held_out
    for operator in ("gemm", "prefill_attention", "decode_attention", "all_reduce"):
        assert held_out[operator].median <= 0.15
    assert load_hardware("h200").held_out == {}, "nothing was measured on it"


def test_the_h200_is_an_h100_with_other_memory() -> None:
    h100, h200 = load_hardware("h100"), load_hardware("h200")
    assert (h200.terms, h200.peak_tflops) == (h100.terms, h100.peak_tflops)
    assert h200.memory_bandwidth_gb_s > h100.memory_bandwidth_gb_s
    assert load_hardware("l4").terms.gemm == load_hardware("a100-80g").terms.gemm


def test_a_file_of_the_user_is_read(tmp_path: Path) -> None:
    for size in (40, 48):  # of the same path: files are read anew
        device = load_hardware(changed(tmp_path, {"name": "mine", "memory_bytes": f"{size}GiB"}))
        assert (device.name, device.memory_bytes) == ("mine", size * 2**30)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"memory_bandwith_gb_s": 1}, r"memory_bandwith_gb_s.*did you mean memory_bandwidth_gb_s"),
        ({"memory_bandwidth_gb_s": 0}, r"memory_bandwidth_gb_s: 0 is not allowed; allowed: above 0"),
        ({"memory_bandwidth_gb_s": None}, r"memory_bandwidth_gb_s: is missing"),
        ({"memory_bytes": "many"}, r"memory_bytes: 'many' .*size like 512MiB"),
        ({"kind": "tpu"}, r"kind: 'tpu' is not allowed; allowed: one of gpu, cpu"),
        ({"peak_tflops": {}}, r"peak_tflops: \{\} is not allowed; allowed: at least one dtype"),
        ({"peak_tflops.bfloat16": -1}, r"peak_tflops.bfloat16: -1"),
        ({"devices_per_node": 0}, r"devices_per_node: 0 is not allowed; allowed: at least 1"),
        (
            {"terms.gemm.compute_share": 3.0},
            r"terms.gemm.compute_share: 3.0 is not allowed; allowed: above 0, at most 2",
        ),
        ({"terms.gemm.overlap_power": 0.5}, r"terms.gemm.overlap_power: 0.5 is not allowed; allowed: at least 1"),
        ({"terms.gemm.launch_ms": 1}, r"terms.gemm.launch_ms.*did you mean launch_us"),
        ({"terms.decode_attention": None}, r"terms.decode_attention: is missing"),
        ({"intra_node.latency_us": "fast"}, r"intra_node.latency_us: 'fast'"),
        ({"held_out": {"gemm": {"median": 0.1, "p90": 0.2, "points": 0}}}, r"held_out.gemm.points: 0"),
    ],
)
def test_what_a_file_cannot_say_is_named(tmp_path: Path, change: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load_hardware(changed(tmp_path, change))


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"hardware: 'a100' is not allowed; allowed: did you mean a100-80g\?"):
        load_hardware("a100")


def test_a_dtype_without_a_peak_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: 'fp8' is not allowed; .*a100-80g has a peak for: float32, bfloat16"):
        load_hardware("a100-80g").peaks("fp8")
    cpu = load_hardware("cpu-avx2")
    assert cpu.peaks("float16") == cpu.peaks("bfloat16")


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="name: is missing"):
        load_hardware(str(tmp_path / "empty.yaml"))
    with pytest.raises(ValueError, match=r"hardware: .*missing.yaml.*a readable YAML file"):
        load_hardware(str(tmp_path / "missing.yaml"))
