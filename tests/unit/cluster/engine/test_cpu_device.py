"""The CPU device on a tiny dummy model: steps, KV by bytes, errors, and the thread that computes."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from tandem.cluster.engine.compiled import CompiledForward
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.kv_memory import kv_layout
from tandem.cluster.engine.plan import SampleSpec, StepOutput, StepPlan, StepRow
from tandem.cluster.models.reference import ModelFiles, resolve_model
from tandem.cluster.types import SamplingParams
from tandem.kernels.compiled.compiling import told

BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return resolve_model("dummy:tiny-llama")


def make_device(files: ModelFiles, kernels: str, dtype: str = "float32", **changes: object) -> CpuDevice:
    options = {"dtype": dtype, "block_size": BLOCK_SIZE, "kv_cache_bytes": 2**20, "kernels": kernels, **changes}
    return CpuDevice(files, **options)


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    return request.param


def row(name: str, start: int, tokens: list[int], blocks: list[int], sample: bool = True) -> StepRow:
    return StepRow(name, start, tokens, blocks, SampleSpec(GREEDY, 0, tokens, []) if sample else None)


def step(device: CpuDevice, *rows: StepRow, plan_id: int = 0) -> StepOutput:
    device.launch(StepPlan(plan_id, rows))
    return device.collect()


def generate(device: CpuDevice, prompt: list[int], blocks: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    start = 0
    for _ in range(count):
        (out,) = step(device, row("s", start, tokens[start:], blocks)).rows
        start = len(tokens)
        tokens.append(out.tokens[0].token_id)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_facts(files: ModelFiles, kernels: str, dtype: str) -> None:
    device = make_device(files, kernels, dtype)
    layout = kv_layout(files.config, dtype, BLOCK_SIZE)
    assert device.name == "cpu"
    assert device.vocab_size == files.config.vocab_size
    assert device.kv.layout == layout
    assert device.kv.num_blocks == device.num_blocks == 2**20 // layout.block_bytes
    assert device.fingerprint == make_device(files, kernels, dtype).fingerprint
    assert device.fingerprint != make_device(files, kernels, {"float32": "bfloat16"}.get(dtype, "float32")).fingerprint


def test_a_start_says_that_it_compiles_only_where_it_does(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    make_device(files, "compiled").close()  # whatever was not compiled is now
    stages: list[str] = []
    make_device(files, "compiled", stage=lambda what, share: stages.append(what)).close()
    assert "kernels" in stages
    assert "compiling kernels" not in stages
    monkeypatch.setattr(CompiledForward, "_warm", lambda self: told())  # as one that was not kept
    make_device(files, "compiled", stage=lambda what, share: stages.append(what)).close()
    assert stages[-1] == "compiling kernels"


def test_outputs_follow_the_plan(files: ModelFiles, kernels: str) -> None:
    device = make_device(files, kernels)
    first = StepPlan(7, (row("a", 0, [1, 2, 3], [0]), row("b", 0, [4, 5], [1], sample=False)))
    second = StepPlan(8, (row("b", 2, [6], [1]),))
    device.launch(first)
    device.launch(second)
    output = device.collect()
    assert output.plan_id == 7
    assert [r.seq_id for r in output.rows] == ["a", "b"]
    assert [len(r.tokens) for r in output.rows] == [1, 0]
    assert output.duration_s > 0
    assert device.collect().plan_id == 8


def test_tokens_do_not_depend_on_chunks_blocks_or_neighbors(files: ModelFiles, kernels: str) -> None:
    device = make_device(files, kernels)
    prompt = list(range(10, 31))
    expected = generate(device, prompt, list(range(10)), 12)
    assert len(set(expected)) > 1
    assert generate(device, prompt, [40, 3, 17, 8, 30, 22, 11, 0, 5, 19], 12) == expected
    blocks = list(range(50, 60))
    tokens, start = list(prompt), 0
    while start < len(prompt):
        end = min(start + 5, len(prompt))
        (out, _) = step(
            device, row("s", start, prompt[start:end], blocks), row("n", 0, [start, 2, 3], [60], sample=False)
        ).rows
        start = end
    tokens.append(out.tokens[0].token_id)
    for _ in range(11):
        out, _ = step(device, row("s", len(tokens) - 1, tokens[-1:], blocks), row("n", 3, [9], [60])).rows
        tokens.append(out.tokens[0].token_id)
    assert tokens[len(prompt) :] == expected


def test_kv_moves_by_bytes(files: ModelFiles, kernels: str) -> None:
    """Prefill here, decode there: what the handoff does, without the wires."""
    source, target = make_device(files, kernels), make_device(files, kernels)
    prompt = list(range(5, 18))
    expected = generate(source, prompt, list(range(8)), 8)
    step(source, row("p", 0, prompt, [20, 21, 22, 23], sample=False))
    for here, there in zip([20, 21, 22, 23], [9, 3, 7, 1], strict=True):
        target.kv.write_block(there, source.kv.read_block(here))
    tokens = prompt + expected[:1]
    for _ in range(7):
        (out,) = step(target, row("d", len(tokens) - 1, tokens[-1:], [9, 3, 7, 1, 0, 2])).rows
        tokens.append(out.tokens[0].token_id)
    assert tokens[len(prompt) :] == expected


def test_kv_views(files: ModelFiles, kernels: str) -> None:
    kv = make_device(files, kernels, "bfloat16").kv
    payload = os.urandom(kv.layout.block_bytes)
    kv.write_block(5, payload)
    view = kv.read_block(5)
    assert view == payload
    assert view.readonly
    assert len(view) == kv.layout.block_bytes
    assert view.itemsize == 1
    kv.write_block(5, bytes(len(payload)))
    assert view == bytes(len(payload))  # no copy was made
    assert kv.read_block(4) == kv.read_block(6) == bytes(len(payload))
    with pytest.raises(ValueError, match=r"payload: 3 bytes are not one block"):
        kv.write_block(5, b"abc")
    for block_id in (-1, kv.num_blocks):
        with pytest.raises(ValueError, match=f"block_id: {block_id} is not in 0"):
            kv.read_block(block_id)


def test_layout_is_block_major(files: ModelFiles, kernels: str) -> None:
    """kv[block, layer, 2, kv_head, slot, head_dim], as `kvtransfer.layout` describes it."""
    device = make_device(files, kernels)
    step(device, row("s", 0, [3, 4], [2]))
    c = files.config
    block = torch.frombuffer(bytearray(device.kv.read_block(2)), dtype=torch.float32)
    block = block.view(c.num_layers, 2, c.num_kv_heads, BLOCK_SIZE, c.head_dim)
    assert block[:, :, :, :2].any(-1).all()
    assert not block[:, :, :, 2:].any()


def test_a_fresh_block_forgets_its_last_owner(files: ModelFiles, kernels: str) -> None:
    device = make_device(files, kernels)
    device.kv.write_block(0, b"\xff" * device.kv.layout.block_bytes)  # NaN in every slot
    (out,) = step(device, row("s", 0, [1], [0])).rows
    assert out.error == ""
    (out,) = step(device, row("s", 1, [2], [0])).rows
    assert out.error == ""


def test_a_row_that_is_not_a_number_fails_alone(files: ModelFiles, kernels: str) -> None:
    device = make_device(files, kernels)
    step(device, row("bad", 0, [1, 2, 3], [0]), row("good", 0, [1, 2, 3], [1]))
    device.kv.write_block(0, b"\xff" * device.kv.layout.block_bytes)
    bad, good = step(device, row("bad", 3, [4], [0]), row("good", 3, [4], [1])).rows
    assert bad.error
    assert bad.tokens == ()
    assert good.error == ""
    assert len(good.tokens) == 1


def test_malformed_plans_leave_nothing_behind(files: ModelFiles, kernels: str) -> None:
    device = make_device(files, kernels)
    with pytest.raises(ValueError, match="do not hold 5 tokens"):
        device.launch(StepPlan(0, (row("s", 0, [1] * 5, [0]),)))
    with pytest.raises(RuntimeError, match="no launched plan"):
        device.collect()
    assert not any(device.kv.read_block(0))


def test_close_is_idempotent(files: ModelFiles, kernels: str) -> None:
    device = make_device(files, kernels)
    device.close()
    device.close()
    with pytest.raises(RuntimeError, match="closed"):
        device.launch(StepPlan(0, (row("s", 0, [1], [0]),)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "threads: 0 is not 1 or more"),
        ({"cpus": (100000,)}, r"cpus: \(100000,\) are not all among"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes: 100 do not hold one block"),
        ({"dtype": "int4"}, "dtype"),
    ],
)
def test_bad_settings_are_named(files: ModelFiles, kernels: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_device(files, kernels, **changes)


def test_a_system_that_does_not_pin_serves_all_the_same(
    files: ModelFiles, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    step(make_device(files, kernels), row("s", 0, [1, 2], [0]))
    with pytest.raises(ValueError, match="this system does not pin threads"):
        make_device(files, kernels, cpus=(0,))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processor affinity here")
def test_only_the_computing_thread_is_pinned(files: ModelFiles, kernels: str) -> None:
    allowed = os.sched_getaffinity(0)
    chosen = max(allowed)
    device = make_device(files, kernels, cpus=(chosen,))
    seen: list[set[int]] = []

    def compute() -> None:
        step(device, row("s", 0, [1, 2], [0]))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert seen == [{chosen}]
    assert os.sched_getaffinity(0) == allowed


def test_torch_has_the_threads_of_the_config() -> None:
    """In a process of its own: torch's thread count is the whole test process's business."""
    script = """
import torch
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.plan import StepPlan, StepRow
from tandem.cluster.models.reference import resolve_model
device = CpuDevice(
    resolve_model("dummy:tiny-llama"), dtype="bfloat16", block_size=4, kv_cache_bytes=2**20, kernels="torch", threads=2
)
device.launch(StepPlan(0, (StepRow("s", 0, [1, 2], [0]),)))
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["2"]
