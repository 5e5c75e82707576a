"""Workers of several GPUs, each rank a process, against one of one: same weights, same plans, same numbers.

On a machine without GPUs the ranks compute on CPU tensors, kernels interpreted, and speak through Gloo.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from interpreted_rank import interpreted
from tandem.cluster.engine.devices.base import Device
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.devices.cuda_ranks import RankedCudaDevice
from tandem.cluster.engine.fingerprint import fingerprint
from tandem.cluster.engine.gpu import inputs
from tandem.cluster.engine.gpu.part import DeviceRanks
from tandem.cluster.engine.narrow_kv import NarrowKV
from tandem.cluster.engine.parallel.messages import GpuSetup, RankLost
from tandem.cluster.engine.parallel.rank_process import RankProcess
from tandem.cluster.engine.plan import DRAWN, StepOutput, StepPlan, StepRow
from tandem.cluster.models.config import ModelConfig
from test_cuda_device import BLOCK_SIZE, LIKELY, LLAMA, SEEDED, assert_alike, drawn, files_of, row, step

TOLERANCE = 1e-5
"""Of logprobs, fp32: ranks sum a product in another order than one rank does."""
TWO_LAYERS = replace(LLAMA, num_layers=2, vocab_size=301)
"""A vocabulary that two ranks cannot halve."""
GPU = GpuSetup(device="cpu", kv_cache_bytes=2**18, max_batched_tokens=32, max_running=4, max_model_len=64)
Computed = tuple[list[StepOutput], list[np.ndarray]]


@pytest.fixture(scope="module", autouse=True)
def one_multiprocessor(where: str) -> Iterator[None]:
    """As `few_multiprocessors`, for all of the module's tests."""
    if where != "cpu":
        pytest.skip("a rank has a GPU of its own: tests/gpu has these tests, for two GPUs and more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "multiprocessors", lambda device: 2)
        yield


@contextmanager
def ranked(
    tensor: int, stages: int, config: ModelConfig = TWO_LAYERS, kernels: str = "auto", gpu: GpuSetup = GPU
) -> Iterator[RankedCudaDevice]:
    device = RankedCudaDevice(
        files_of(config),
        gpu,
        tensor_parallel=tensor,
        pipeline_stages=stages,
        dtype="float32",
        block_size=BLOCK_SIZE,
        kernels=kernels,
        recruit=interpreted,
    )
    try:
        yield device
    finally:
        device.close()


def of_one_rank(config: ModelConfig, count: int, gpu: GpuSetup = GPU) -> Computed:
    device = CudaDevice(files_of(config), dtype="float32", block_size=BLOCK_SIZE, **gpu.arguments())
    found = compute(device, count)
    device.close()
    return found


@pytest.fixture(scope="module")
def alone(one_multiprocessor: None) -> Computed:
    return of_one_rank(TWO_LAYERS, len(plans()))


def compute(device: Device, count: int) -> Computed:
    """The first plans, and the KV that they leave."""
    outputs = [step(device, *rows, plan_id=number) for number, rows in enumerate(plans()[:count])]
    (group,) = device.kv.layout.groups
    held = np.int8 if group.dtype == "int8" else np.float32
    return outputs, [np.frombuffer(device.kv.read_block(block), held).copy() for block in (7, 3, 1, 5)]


def plans() -> list[list[StepRow]]:
    """A prompt, a chunk that samples nothing, a decode row beside the chunk's rest, a padded decode step."""
    return [
        [row("a", 0, range(10, 16), [7, 3], LIKELY)],
        [row("b", 0, range(40, 46), [1, 5, 2], None)],
        [row("a", 6, [99], [7, 3], SEEDED, output=[99]), row("b", 6, [60, 61, 62], [1, 5, 2], LIKELY)],
        [row(name, at, [at], blocks, LIKELY) for name, at, blocks in (("a", 7, [7, 3]), ("b", 9, [1, 5, 2]))],
    ]


def assert_one_ranks_numbers(device: Device, expected: Computed, count: int = 4) -> None:
    outputs, blocks = compute(device, count)
    for ours, theirs in zip(outputs, expected[0], strict=True):
        assert_alike(ours, theirs, TOLERANCE)
    for mine, other in zip(blocks, expected[1], strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_two_tensor_parallel_ranks_compute_one_ranks_numbers(alone: Computed) -> None:
    with ranked(2, 1) as device:
        assert_one_ranks_numbers(device, alone)
        assert (device.plans_ahead, device.looks_ahead) == (2, True)
        from_what_is_being_drawn(device)
        written_blocks_are_read(device)
    with pytest.raises(RuntimeError, match="after shutdown"):  # the thread that reads other ranks' KV has ended
        device.kv.fetch_blocks([20]).send(None)


def test_two_stages_compute_one_ranks_numbers_two_plans_at_a_time(
    alone: Computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ranked(1, 2) as device:
        assert_one_ranks_numbers(device, alone)
        assert (device.plans_ahead, device.looks_ahead) == (2, False)
        device.launch(StepPlan(0, (row("c", 0, [5], [11], LIKELY),)))
        device.launch(StepPlan(1, tuple(plans()[0])))
        device.collect()
        assert_alike(replace(device.collect(), plan_id=0), alone[0][0], TOLERANCE)
        written_blocks_are_read(device)
        with pytest.raises(ValueError, match="row 'e': block_ids are not all in"):
            device.launch(StepPlan(2, (row("e", 0, [1], [9999]),)))
        lost, told = threading.Event(), list[object]()
        monkeypatch.setattr(device._ranks, "abort", lambda: told.append("what waits on the device is given up"))
        device.watch(lambda error: (told.append(error), lost.set()))
        os.kill(device.pids[0], signal.SIGKILL)
        assert lost.wait(30)
        assert isinstance(told[0], RankLost), "first, for giving up may take long"
        with pytest.raises(RankLost):
            step(device, row("e", 0, [1], [11]))


def test_a_rank_that_is_lost_while_they_meet_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[RankProcess] = []
    given_up = threading.Event()

    def recruit(num_ranks: int) -> list[RankProcess]:
        processes.extend(interpreted(num_ranks))
        return processes

    def meet(ranks: DeviceRanks) -> None:
        processes[0].kill()
        assert given_up.wait(30)
        raise RankLost("NCCL communicator was aborted")

    monkeypatch.setattr(DeviceRanks, "meet", meet)
    monkeypatch.setattr(DeviceRanks, "abort", lambda ranks: given_up.set())
    with pytest.raises(RankLost, match=r"^rank 1 \(pid"):
        RankedCudaDevice(
            files_of(TWO_LAYERS),
            GPU,
            tensor_parallel=2,
            pipeline_stages=1,
            dtype="float32",
            block_size=BLOCK_SIZE,
            recruit=recruit,
        )


def test_ranks_that_compute_by_torch_have_one_ranks_numbers(alone: Computed) -> None:
    with ranked(2, 1, kernels="torch") as device:
        assert device.picked.kernels == "torch"
        outputs, _ = compute(device, len(plans()))
        for ours, theirs in zip(outputs, alone[0], strict=True):
            assert_alike(ours, theirs, 2e-4)


def test_two_stages_of_two_ranks_that_have_the_same_kv_head_compute_one_ranks_numbers() -> None:
    config = replace(TWO_LAYERS, num_kv_heads=1)
    with ranked(2, 2, config) as device:
        assert_one_ranks_numbers(device, of_one_rank(config, 1), 1)


@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2)])
def test_ranks_store_narrow_kv_by_the_scales_of_their_own_heads_and_layers(tensor: int, stages: int) -> None:
    """Scales that no two heads and layers share: by another's, numbers would be stored twice as large or half."""
    heads = TWO_LAYERS.num_kv_heads
    scales = 0.01 * 2.0 ** np.arange(-2 * heads, 2 * heads).reshape(2, heads, 2).swapaxes(1, 2)
    narrow = NarrowKV.by("int8", scales.astype(np.float32))
    gpu = replace(GPU, narrow_kv=narrow)
    expected = of_one_rank(TWO_LAYERS, len(plans()), gpu)
    with ranked(tensor, stages, gpu=gpu) as device:
        assert device.fingerprint == fingerprint(files_of(TWO_LAYERS), "float32", None, narrow)
        outputs, blocks = compute(device, len(plans()))
    for ours, theirs in zip(outputs, expected[0], strict=True):
        assert_alike(ours, theirs, 1e-3)
    for mine, other in zip(blocks, expected[1], strict=True):
        apart = np.abs(mine.astype(np.int32) - other)
        assert apart.max() <= 1  # sums in another order may round to the next integer
        assert (apart > 0).mean() < 0.01
        assert np.unique(other).size > 50


def from_what_is_being_drawn(device: Device) -> None:
    """A row whose token the other rank, too, takes from the plan that is under way; then the same one told."""
    device.launch(StepPlan(0, (row("f", 0, [9], [12], SEEDED),)))
    device.launch(StepPlan(1, (row("f", 1, [DRAWN], [12], SEEDED, output=[0]),)))
    first, second = drawn(device.collect())[0], drawn(device.collect())[0]
    assert first[0] in range(151, 301), "the other rank has its embedding"
    assert second == drawn(step(device, row("f", 1, first, [12], SEEDED, output=first)))[0]


def written_blocks_are_read(device: Device) -> None:
    payload = np.random.default_rng(0).bytes(device.kv.layout.block_bytes)
    device.kv.write_blocks([20, 21], [payload, payload[::-1]])
    assert [bytes(block) for block in device.kv.read_blocks([21, 20])] == [payload[::-1], payload]
