"""KV in one byte a number, on tiny models: what is stored, what is drawn of it, and how another worker goes on with it.

Beside the same device with KV as wide as its numbers; scales are those that `tandem calibrate` would find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tandem.cluster.config import EngineConfig
from tandem.cluster.engine.devices import cuda
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.devices.kv_memory import kv_layout
from tandem.cluster.engine.gpu.kv_peers import GpuPeer
from tandem.cluster.engine.kv_scales import KVScales
from tandem.cluster.engine.narrow_kv import NarrowKV
from tandem.cluster.engine.plan import StepOutput
from tandem.cluster.launch.compose import build_device
from tandem.cluster.models.config import ModelConfig
from tandem.kernels import dispatch
from tandem.kernels.kv_write import narrowed
from test_cuda_device import LIKELY, LLAMA, SEEDED, assert_alike, cuda_device, drawn, files_of, row, settle, step

NARROW = ("int8", "float8_e4m3")
TWO_LAYERS = dataclasses.replace(LLAMA, num_layers=2)
PROMPT, BLOCKS = range(10, 23), [7, 3, 1, 9]
APART = {"int8": 0.06, "float8_e4m3": 0.25}
"""By how much a logprob of the tiny models may differ from that of wide KV: twice what was seen."""
pytestmark = pytest.mark.usefixtures("few_multiprocessors")


def run(device: CudaDevice, blocks: Sequence[int] = BLOCKS, steps: int = 3) -> list[StepOutput]:
    """The prompt in two chunks, the second beside a decode row, then decode steps; of one sequence."""
    prompt = list(PROMPT)
    outputs = [
        step(device, row("a", 0, prompt[:8], blocks, None)),
        step(device, row("b", 0, [5], [12], LIKELY), row("a", 8, prompt[8:], blocks, LIKELY)),
    ]
    return outputs + decode(device, outputs[1], blocks, steps)


def decode(device: CudaDevice, last: StepOutput, blocks: Sequence[int], steps: int) -> list[StepOutput]:
    outputs, so_far = [], [drawn(last)[-1][0]]
    for index in range(steps):
        wanted = SEEDED if index % 2 else LIKELY
        outputs.append(step(device, row("a", len(PROMPT) + index, so_far[-1:], blocks, wanted, output=so_far)))
        so_far.append(drawn(outputs[-1])[0][0])
    return outputs


def calibrated(where: str, config: ModelConfig, dtype: str) -> tuple[NarrowKV, CudaDevice, list[StepOutput]]:
    """The scales of what `run` writes, and the device of wide KV that ran it, with its outputs."""
    plain = cuda_device(where, config, kernels="torch")
    outputs = run(plain)
    largest = plain.kv.tensor.float().abs().amax(dim=(0, 4, 5)).cpu().numpy()
    return NarrowKV.by(dtype, KVScales(largest=largest).scales(dtype)), plain, outputs


@pytest.mark.parametrize("dtype", NARROW)
def test_keys_and_values_are_stored_by_their_heads_scales(where: str, kernels: str, dtype: str) -> None:
    """Of one layer, whose keys and values hang on nothing that was stored."""
    scales = np.array([[[0.004, 0.03], [0.01, 0.0005]]], np.float32)  # some numbers are beyond what can be stored
    config = dataclasses.replace(LLAMA, num_kv_heads=2)
    plain, device = (
        cuda_device(where, config, kernels=kernels, narrow_kv=narrow) for narrow in (None, NarrowKV.by(dtype, scales))
    )
    assert device.kv.layout.groups[0].dtype == dtype
    assert (device.kv.layout.block_bytes * 4, plain.num_blocks * 4) == (plain.kv.layout.block_bytes, device.num_blocks)
    run(device, steps=0)
    run(plain, steps=0)
    stored = device.kv.tensor.dtype
    spread = torch.from_numpy(scales).to(plain.kv.tensor.device)[:, :, :, None, None]
    expected = narrowed(plain.kv.tensor[:, 0], spread[0], stored)
    found = device.kv.tensor[: plain.num_blocks, 0].view(expected.dtype)
    assert torch.equal(found, expected)
    beyond = narrowed(torch.tensor(1e9), torch.tensor(1.0), stored)
    assert (found == beyond).any()
    assert found.unique().numel() > 100


@pytest.mark.parametrize(("option", "stored"), [("auto", torch.float32), ("int8", torch.int8)])
def test_an_engines_configuration_makes_such_a_device(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, stored: torch.dtype
) -> None:
    monkeypatch.setattr(dispatch, "gpu_facts", lambda device=None: dispatch.interpreter())
    monkeypatch.setattr(cuda, "CudaDevice", lambda files, **given: CudaDevice(files, **{**given, "device": where}))
    path = None if option == "auto" else tmp_path / "scales.json"
    if path is not None:
        KVScales(largest=np.full((1, 2, LLAMA.num_kv_heads), 4, np.float32)).save(path)
    config = EngineConfig(
        device="cuda",
        dtype="float32",
        block_size=4,
        kv_cache_bytes=2**17,
        max_running=4,
        kv_cache_dtype=option,
        kv_scales=path and str(path),
    )
    device = build_device(config, files_of(LLAMA), None)
    assert device.kv.tensor.dtype == stored  # type: ignore[attr-defined]
    assert device.num_blocks == 2**17 // kv_layout(LLAMA, config.kv_dtype, 4).block_bytes  # type: ignore[attr-defined]
    assert len(drawn(step(device, row("a", 0, PROMPT, BLOCKS)))[0]) == 1


@pytest.mark.parametrize("dtype", NARROW)
def test_tokens_are_those_of_wide_kv_whoever_computes(where: str, dtype: str) -> None:
    narrow, plain, expected = calibrated(where, TWO_LAYERS, dtype)
    ours = {
        kernels: run(cuda_device(where, TWO_LAYERS, kernels=kernels, narrow_kv=narrow))
        for kernels in ("triton", "torch", "reference")
    }
    apart: list[float] = []
    for mine, torchs, formulas, wide in zip(*ours.values(), expected, strict=True):
        assert_alike(mine, formulas, 2e-4)
        assert_alike(torchs, formulas, 2e-4)
        assert drawn(mine) == drawn(wide)
        for narrow_row, wide_row in zip(mine.rows, wide.rows, strict=True):
            known = {i: value for token in wide_row.tokens for i, value in token.top}
            apart += [abs(value - known[i]) for token in narrow_row.tokens for i, value in token.top if i in known]
    assert 1e-6 < max(apart) < APART[dtype]
    plain.close()


@pytest.mark.parametrize("dtype", NARROW)
def test_another_worker_goes_on_with_narrow_blocks(where: str, kernels: str, dtype: str) -> None:
    narrow, *_ = calibrated(where, TWO_LAYERS, dtype)
    alone, other = (cuda_device(where, TWO_LAYERS, kernels=kernels, narrow_kv=narrow) for _ in range(2))
    prompt, *rest = run(alone)[1:]
    fresh = [2, 15, 4, 8]
    held = (len(PROMPT) + 3) // 4
    # What the first worker decoded since is in the last of these; the other writes it anew.
    other.kv.write_blocks(fresh[:held], [bytes(block) for block in alone.kv.read_blocks(BLOCKS[:held])])
    assert [dataclasses.replace(output, duration_s=0) for output in decode(other, prompt, fresh, 3)] == [
        dataclasses.replace(output, duration_s=0) for output in rest
    ]
    assert other.fingerprint == alone.fingerprint


@pytest.mark.parametrize("dtype", NARROW)
def test_blocks_of_another_size_keep_their_numbers(where: str, dtype: str) -> None:
    narrow, *_ = calibrated(where, TWO_LAYERS, dtype)
    alone, other = (cuda_device(where, TWO_LAYERS, narrow_kv=narrow, block_size=size) for size in (4, 8))
    prompt, *rest = run(alone)[1:]
    GpuPeer(other.kv, alone.kv.tensor, None).begin_copy(BLOCKS, [5, 2], first_token=0, num_tokens=len(PROMPT)).wait()
    for mine, expected in zip(decode(other, prompt, [5, 2], 3), rest, strict=True):
        assert_alike(mine, expected, 1e-5)


def test_kv_that_is_held_otherwise_is_another_fingerprint(where: str) -> None:
    ones = np.ones((1, 2, LLAMA.num_kv_heads), np.float32)
    held = (None, *(NarrowKV.by(dtype, scales) for dtype in NARROW for scales in (ones, 2 * ones)))
    devices = [cuda_device(where, narrow_kv=narrow, kernels="torch") for narrow in held]
    assert len({device.fingerprint for device in devices}) == len(held)
    assert len({device.kv.layout.identity() for device in devices}) == 3


def test_a_row_that_reads_what_is_no_number_fails_alone(where: str, kernels: str) -> None:
    """Nor do others see slots that nobody has written."""
    ones = NarrowKV.by("float8_e4m3", np.ones((1, 2, LLAMA.num_kv_heads), np.float32))
    device = cuda_device(where, kernels=kernels, narrow_kv=ones)
    device.kv.tensor.view(torch.uint8)[[0, 6, 7]] = 0x7F
    settle(where)
    output = step(device, row("bad", 9, [1], [2, 6, 3]), row("good", 0, [2], [7], LIKELY))
    assert output.rows[0] == ("bad", (), "logits: NaN in the row")
    assert len(output.rows[1].tokens) == 1


def test_narrow_kv_beside_narrow_weights(where: str) -> None:
    narrow, *_ = calibrated(where, LLAMA, "float8_e4m3")
    common = {"dtype": "bfloat16", "quantization": "w8a8"}
    wide, ours = (run(cuda_device(where, narrow_kv=held, **common), steps=1)[1] for held in (None, narrow))
    known = dict(wide.rows[1].tokens[0].top)
    shared = [abs(value - known[i]) for i, value in ours.rows[1].tokens[0].top if i in known]
    assert len(shared) >= 3
    assert max(shared) < APART["float8_e4m3"]
