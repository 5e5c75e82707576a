"""The CUDA device against the CPU device's torch operations, on tiny models: same weights, same plans, same tokens.

Interpreted kernels take seconds for what a GPU does in a millisecond: prompts are a few tokens, blocks of four.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import pytest
import torch
from tandem.cluster.engine.devices import cuda
from tandem.cluster.engine.devices.base import Device
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.cuda import CudaDevice
from tandem.cluster.engine.gpu.part import Aborts, Part, whole
from tandem.cluster.engine.plan import DRAWN, SampleSpec, StepOutput, StepPlan, StepRow
from tandem.cluster.latency.memory import DoesNotFit
from tandem.cluster.models.config import ModelConfig
from tandem.cluster.models.reference import ModelFiles
from tandem.cluster.models.registry import CONFIGS
from tandem.cluster.types import SampledToken, SamplingParams
from tandem.kernels.picked import Picked

BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=2**63 + 5)
LIKELY = SamplingParams(temperature=0.0, top_logprobs=5)
LLAMA = dataclasses.replace(CONFIGS["tiny-llama"], num_layers=1, vocab_size=300, max_model_len=64)
pytestmark = pytest.mark.usefixtures("few_multiprocessors")


def files_of(config: ModelConfig) -> ModelFiles:
    return ModelFiles(name="tiny", kind="dummy", path=None, config=config)


def cuda_device(where: str, config: ModelConfig = LLAMA, **changes: object) -> CudaDevice:
    options = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "kv_cache_bytes": 2**17,
        "max_batched_tokens": 32,
        "max_running": 4,
        "max_model_len": 64,
        **changes,
    }
    return CudaDevice(files_of(config), device=where, **options)


def cpu_device(config: ModelConfig = LLAMA, dtype: str = "float32") -> CpuDevice:
    options = {"dtype": dtype, "block_size": BLOCK_SIZE, "kv_cache_bytes": 2**17, "kernels": "torch"}
    return CpuDevice(files_of(config), **options)


def row(
    name: str,
    start: int,
    tokens: Iterable[int],
    blocks: Sequence[int],
    sample: SamplingParams | None = GREEDY,
    *,
    output: Sequence[int] = (),
) -> StepRow:
    tokens = list(tokens)
    spec = None if sample is None else SampleSpec(sample, len(output), tokens, list(output))
    return StepRow(name, start, tokens, blocks, spec)


def step(device: Device, *rows: StepRow, plan_id: int = 0) -> StepOutput:
    plan = StepPlan(plan_id, rows)
    device.launch(plan)
    output = device.collect()
    output.check_answers(plan)
    return output


def settle(where: str) -> None:
    """What this thread queued is done: the engine's stream does not wait for it."""
    if where == "cuda":
        torch.cuda.synchronize()


def drawn(output: StepOutput) -> list[list[int]]:
    return [[token.token_id for token in result.tokens] for result in output.rows]


def assert_alike(ours: StepOutput, theirs: StepOutput, tolerance: float) -> None:
    """The drawn tokens and the logprobs of the likeliest ones."""
    assert drawn(ours) == drawn(theirs)
    for mine, other in zip(ours.rows, theirs.rows, strict=True):
        for token, expected in zip(mine.tokens, other.tokens, strict=True):
            close(token, expected, tolerance)


def close(token: SampledToken, expected: SampledToken, tolerance: float) -> None:
    assert (token.logprob is None) == (expected.logprob is None)
    if token.logprob is not None and expected.logprob is not None:
        assert token.logprob == pytest.approx(expected.logprob, abs=tolerance)
    assert len(token.top) == len(expected.top)
    values = [value for _, value in token.top]
    assert values == pytest.approx([value for _, value in expected.top], abs=tolerance)


def test_chunks_mixed_steps_and_padded_decode_draw_the_cpus_tokens(where: str, kernels: str) -> None:
    ours, theirs = cuda_device(where, kernels=kernels), cpu_device()
    assert ours.picked.kernels == kernels
    assert bool(ours._num_graphs) == (kernels == "triton"), "what waits for the device is not captured"
    penalized = dataclasses.replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.4, logit_bias=((7, 3.0),))
    plans = [
        [row("a", 0, range(10, 16), [7, 3], LIKELY)],
        [row("b", 0, range(40, 46), [1, 5, 2], None)],  # a chunk
        [row("a", 6, [99], [7, 3], SEEDED, output=[99]), row("b", 6, [60, 61, 62], [1, 5, 2], LIKELY)],
        [
            row("a", 7, [98], [7, 3], penalized, output=[99, 98]),
            row("b", 9, [97], [1, 5, 2], SEEDED, output=[97]),
            row("c", 8, [5], [1, 5, 9]),  # behind a prefix that another sequence computed
        ],
        [row("a", 8, [96], [7, 3, 4], None), row("d", 0, [3], [8], LIKELY)],
    ]
    for number, rows in enumerate(plans):
        assert_alike(step(ours, *rows, plan_id=number), step(theirs, *rows, plan_id=number), 2e-4)


def test_a_row_goes_on_from_the_token_that_is_being_drawn(where: str, kernels: str) -> None:
    device = cuda_device(where, kernels=kernels)
    prompt = row("a", 0, range(10, 13), [7, 3])
    expected = drawn(step(device, prompt))[0]
    for at in range(3, 5):
        expected += drawn(step(device, row("a", at, expected[-1:], [7, 3], SEEDED, output=expected)))[0]
    again: list[int] = []
    device.launch(StepPlan(0, (row("b", 0, [1], [13], None), prompt._replace(block_ids=[11, 12]))))
    for plan_id, at in enumerate(range(3, 5), 1):
        waiting = row("a", at, [DRAWN], [11, 12], SEEDED, output=[0] * plan_id)
        device.launch(StepPlan(plan_id, (row("b", plan_id, [4], [13]), waiting)))
        again += drawn(device.collect())[1]
    again += drawn(device.collect())[1]
    assert again == expected


def test_nothing_is_written_but_the_rows_own_slots(where: str, kernels: str) -> None:
    """Not by padding rows either: three rows are computed as four."""
    device = cuda_device(where, kernels=kernels)
    memory = device.kv.tensor  # [N, L, 2, K, S, D]
    memory.fill_(0.25)
    settle(where)
    step(device, row("a", 4, [1], [6, 2]), row("b", 5, [2], [6, 4]), row("c", 7, [3], [6, 1]))
    step(device, row("d", 0, [1, 2, 3, 4, 5], [9, 3]))
    written = (memory != 0.25).any(dim=(1, 2, 3, 5))
    expected = torch.zeros_like(written)
    for block, slot in ((2, 0), (4, 1), (1, 3), *((9, slot) for slot in range(4)), (3, 0)):
        expected[block, slot] = True
    assert torch.equal(written, expected)


def test_a_row_whose_logits_are_no_numbers_fails_alone(where: str, kernels: str) -> None:
    """Nor do others see slots that nobody has written, of a block of theirs or behind the end of their table."""
    device = cuda_device(where, kernels=kernels)
    device.kv.tensor[[0, 6, 7]] = math.nan
    settle(where)
    output = step(device, row("bad", 9, [1], [2, 6, 3]), row("good", 0, [2], [7], LIKELY))
    assert output.rows[0] == ("bad", (), "logits: NaN in the row")
    assert len(output.rows[1].tokens) == 1
    assert not output.rows[1].error


def test_a_wait_for_a_step_ends_when_something_else_comes(where: str) -> None:
    device, wake = cuda_device(where), threading.Event()
    assert not device.wait(wake)
    device.launch(StepPlan(0, (row("a", 0, [1, 2], [1]),)))
    assert device.wait(wake)
    endless = SimpleNamespace(ended=lambda: False)
    step = device._under_way[0]  # type: ignore[attr-defined]
    step.clock, clock = endless, step.clock
    wake.set()
    assert not device.wait(wake)
    step.clock = clock
    assert device.wait(wake)
    assert len(device.collect().rows) == 1


def test_malformed_rows_are_named(where: str) -> None:
    device = cuda_device(where)
    last = device.num_blocks - 1
    for wrong, message in (
        (row("r", 0, [300], [1]), "row 'r': token_ids are not all in 0…299"),
        (row("r", 0, [-2], [1]), "row 'r': token_ids are not all in 0…299"),
        (row("r", 0, [DRAWN], [1]), "row 'r': its token is to be drawn by the plan before, which has not it"),
        (row("r", 3, [1, 2], [1]), "row 'r': 1 blocks of 4 do not hold 5 tokens"),
        (row("r", 3, [1, 2], [1, last + 1]), f"row 'r': block_ids are not all in 0…{last}"),
        (row("r", 3, [1, 2], [-1, 1]), f"row 'r': block_ids are not all in 0…{last}"),
        (row("r", 64, [1], list(range(17))), "row 'r': positions 64…64 are empty or not in 0…63"),
    ):
        with pytest.raises(ValueError, match=message):
            device.launch(StepPlan(0, (row("fine", 0, [1], [0]), wrong)))
    with pytest.raises(RuntimeError, match="no launched plan"):
        device.collect()
    assert drawn(step(device, row("r", 0, [1, 2], [1]))) == drawn(step(cpu_device(), row("r", 0, [1, 2], [1])))


FAMILIES = {
    "opt": dataclasses.replace(CONFIGS["tiny-opt"], num_layers=1, vocab_size=300, max_model_len=64),
    "qwen3, biases, own head": dataclasses.replace(
        LLAMA, qk_norm=True, qkv_bias=True, tie_word_embeddings=False, num_kv_heads=4
    ),
    "window": dataclasses.replace(LLAMA, sliding_window=3, num_layers=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(where: str, family: str, kernels: str) -> None:
    config = FAMILIES[family]
    ours, theirs = cuda_device(where, config, kernels=kernels), cpu_device(config)
    prompt = row("a", 0, range(5, 11), [3, 1], LIKELY)
    assert_alike(step(ours, prompt), step(theirs, prompt), 2e-4)
    later = row("a", 6, [17], [3, 1], LIKELY, output=[17])
    assert_alike(step(ours, later), step(theirs, later), 2e-4)


def test_torch_computes_heads_that_triton_cannot(where: str) -> None:
    config = dataclasses.replace(LLAMA, head_dim=258, num_heads=2, num_kv_heads=1)
    ours, theirs = cuda_device(where, config, kv_cache_bytes=2**18), cpu_device(config)
    reason = "Triton kernels cannot run here: head_dim 258 is more than 256; decode steps are not captured"
    assert ours.picked == Picked("torch", reason)
    prompt = row("a", 0, range(5, 11), [3, 1], LIKELY)
    assert_alike(step(ours, prompt), step(theirs, prompt), 2e-4)
    with pytest.raises(ValueError, match="kernels: 'triton' is not allowed: head_dim 258 is more than 256"):
        cuda_device(where, config, kernels="triton")


@pytest.mark.parametrize(
    ("kernels", "quantization", "tolerance"),
    [
        *((kernels, None, 0.03) for kernels in ("triton", "torch", "reference")),
        ("auto", "w8a8", 0.06),
        ("auto", "w4a16", 0.5),
    ],
)
def test_narrow_weights(where: str, kernels: str, quantization: str | None, tolerance: float) -> None:
    """Against 16-bit weights on a processor: by how much a logprob may differ."""
    ours = cuda_device(where, dtype="bfloat16", kernels=kernels, quantization=quantization)
    prompt = row("a", 0, range(5, 11), [3, 1], SamplingParams(temperature=0.0, top_logprobs=20))
    (mine,), (expected,) = (step(device, prompt).rows for device in (ours, cpu_device(dtype="bfloat16")))
    theirs = dict(expected.tokens[0].top)
    shared = [(value, theirs[token_id]) for token_id, value in mine.tokens[0].top if token_id in theirs]
    assert len(shared) >= 10
    assert max(abs(a - b) for a, b in shared) < tolerance


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype: 'float16' is not allowed; allowed: one of bfloat16, float32"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes: 100 do not hold one block"),
        ({"kernels": "compiled"}, "kernels: 'compiled' is not allowed on a GPU; allowed: one of auto, triton"),
        ({"kernels": "reference", "kv_cache_bytes": 0}, "kv_cache_bytes: 0 is not allowed with"),
        (
            {"kernels": "torch", "quantization": "w8a8"},
            "quantization: 'w8a8' is not allowed: it needs Triton kernels, and kernels is 'torch'",
        ),
        ({"quantization": "w4a16"}, "quantization: 'w4a16' is not allowed with dtype float32; allowed: bfloat16"),
    ],
)
def test_what_cannot_be_had_is_said(where: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda_device(where, **changes)


def test_a_model_that_no_kernel_computes_is_refused(where: str) -> None:
    with pytest.raises(ValueError, match=r"device: 'cuda' is not allowed for this model: .*OPT-350m"):
        cuda_device(where, dataclasses.replace(FAMILIES["opt"], norm_before=False))


class Graphed(Part):
    """A rank whose group ends only when no graph is left that captured any of it, as NCCL's do."""

    def __init__(self) -> None:
        super().__init__(whole(LLAMA).shard)
        self.graphs_are_gone = threading.Event()
        self.ended = False
        self._aborts = Aborts()

    def give_up(self) -> None:
        self._aborts.begin([SimpleNamespace(abort=lambda: self.graphs_are_gone.wait(20))])

    def close(self) -> None:
        self.ended = self._aborts.wait(10)


def test_graphs_are_destroyed_while_ranks_are_given_up(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Graphed()
    device = cuda_device(where, kernels="torch", part=part)
    monkeypatch.setattr(device._graphs, "close", part.graphs_are_gone.set)
    device.close()
    assert part.ended


@pytest.mark.parametrize(
    ("name", "while_what", "helps"),
    [
        ("check_model", "", ""),
        ("build_on", "loading weights", "a quantization"),
        ("DeviceKVStore", "taking KV memory", "fewer kv_cache_bytes"),
        ("warm_up_plans", "computing a step", "fewer max_batched_tokens"),
        ("DecodeGraphs.capture", "capturing decode steps", "enforce_eager: true"),
    ],
)
def test_a_model_that_does_not_fit_says_what_helps(
    where: str, monkeypatch: pytest.MonkeyPatch, name: str, while_what: str, helps: str
) -> None:
    error: Exception = torch.OutOfMemoryError("CUDA out of memory")
    if name == "check_model":
        error = DoesNotFit("tiny does not fit: the GPU's memory ran out : by the sum. More room: ")
        monkeypatch.setattr(cuda, "build_on", lambda *_, **__: pytest.fail("weights are read"))

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"tandem.cluster.engine.devices.cuda.{name}", fails)
    if name == "warm_up_plans":  # asked for on GPUs only
        monkeypatch.setattr(CudaDevice, "_warm_up", fails)
    with pytest.raises(DoesNotFit, match=f"^tiny does not fit: the GPU's memory ran out {while_what}.* room: {helps}"):
        cuda_device(where)
