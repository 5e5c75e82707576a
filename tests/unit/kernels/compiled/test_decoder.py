"""The compiled decoder against the torch model with the same weights, for every architecture; and that a token's logits
are the same to the bit however its sequence is cut, whatever is in the batch, and whoever computes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from decoder_cases import BLOCK_SIZE, CompiledSteps, TorchSteps, compiled
from tandem.cluster.engine.compiled import decoder_shape
from tandem.cluster.engine.hf_weights import DummyWeights
from tandem.cluster.engine.weights import build_model
from tandem.cluster.models.config import Architecture, ModelConfig
from tandem.kernels.compiled.decoder import CompiledModel
from tandem.kernels.compiled.decoder_weights import unsupported

VOCAB = 97
LLAMA = ModelConfig(
    architecture=Architecture.LLAMA,
    vocab_size=VOCAB,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=80,
    max_model_len=256,
)
OPT = dataclasses.replace(
    LLAMA,
    architecture=Architecture.OPT,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    norm="layer",
    activation="relu",
    gated_mlp=False,
    learned_positions=True,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)
CONFIGS = {
    "llama": LLAMA,
    "tied-long-head": dataclasses.replace(LLAMA, tie_word_embeddings=True, head_dim=64),
    "biases": dataclasses.replace(LLAMA, qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "window": dataclasses.replace(LLAMA, sliding_window=9),
    "odd-sizes": dataclasses.replace(LLAMA, hidden_size=51, intermediate_size=77, head_dim=18),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=16),
    "gelu": dataclasses.replace(LLAMA, activation="gelu", gated_mlp=False),
    "opt": OPT,
    "opt-post-norm-projected": dataclasses.replace(OPT, embed_dim=24, norm_before=False),
}
KINDS = ("float32", "bfloat16", "w8a8")


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make(config: ModelConfig, kind: str = "float32", threads: int = 1) -> CompiledModel:
    return compiled(config, DummyWeights(config), kind, threads)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_torch_model(name: str) -> None:
    """A ragged step: decode rows, a chunk behind a prefix, a whole prompt, and one that does not sample."""
    config = CONFIGS[name]
    ours = CompiledSteps(make(config))
    theirs = TorchSteps(build_model(config, DummyWeights(config), torch.float32))
    prompts = [prompt(n, seed=n) for n in (33, 6, 90, 30, 1, 12)]
    done = [32, 5, 70, 16, 0, 0]
    tables = [ours.table(len(p) + 1) for p in prompts]
    earlier = [(p[:s], 0, t, False) for p, s, t in zip(prompts, done, tables, strict=True) if s]
    rows = [(p[s:], s, t, i != 5) for i, (p, s, t) in enumerate(zip(prompts, done, tables, strict=True))]
    for step in (earlier, rows):
        actual, expected = ours.run(*step), theirs.run(*step)
        assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tied-long-head", "window", "opt"])
def test_the_same_to_the_bit(name: str, kind: str) -> None:
    """A prompt at once, in chunks, token by token, in a batch of 32, and by two threads."""
    model = make(CONFIGS[name], kind)
    team = make(CONFIGS[name], kind, threads=2)
    dtype = np.float32 if kind == "float32" else np.uint16
    tokens = prompt(75)
    steps = CompiledSteps(model, dtype, num_blocks=700)
    expected = steps.run((tokens, 0, steps.table(75), True))
    assert torch.isfinite(expected).all()
    for chunk in (1, 7, 64):
        table = steps.table(75)
        for start in range(0, 75, chunk):
            logits = steps.run((tokens[start : start + chunk], start, table, True))
        assert same(logits, expected)
    for runner in (steps, CompiledSteps(team, dtype, num_blocks=700)):
        batch = [(prompt(n % 9 + 1, seed=n), 0, runner.table(12), True) for n in range(31)]
        logits = runner.run(*batch[:16], (tokens, 0, runner.table(75), True), *batch[16:])
        assert same(logits[16:17], expected)
    team.close()


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_kinds_stay_near_float32(kind: str) -> None:
    config = CONFIGS["tied-long-head"]
    tokens = prompt(40)
    exact, narrow = CompiledSteps(make(config)), CompiledSteps(make(config, kind), np.uint16)
    expected = exact.run((tokens, 0, exact.table(40), True))
    logits = narrow.run((tokens, 0, narrow.table(40), True))
    assert 0 < (logits - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "opt-post-norm-projected"])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_make_the_same_model(name: str, kind: str) -> None:
    config = CONFIGS[name]
    model = make(config, kind)
    for array in model.arrays().values():
        array.flags.writeable = False
    again = CompiledModel.from_arrays(decoder_shape(config), kind, model.arrays())
    steps, others = CompiledSteps(model), CompiledSteps(again)
    table = steps.table(20)
    assert same(others.run((prompt(20), 0, table, True)), steps.run((prompt(20), 0, table, True)))
    arrays = model.arrays()
    del arrays["layers.1.up.data"]
    with pytest.raises(ValueError, match=r"layers\.1\.up"):
        CompiledModel.from_arrays(decoder_shape(config), kind, arrays)
    for wrong in ("attention_norm.weight", "qkv.data", "down.data"):
        arrays = model.arrays()
        arrays[f"layers.1.{wrong}"] = arrays[f"layers.1.{wrong}"][:-1]
        with pytest.raises(ValueError, match=rf"layers\.1\.{wrong.split('.')[0]}"):
            CompiledModel.from_arrays(decoder_shape(config), kind, arrays)


def test_tables_of_another_packing_are_refused() -> None:
    config = CONFIGS["opt-post-norm-projected"]
    model = make(config)
    assert {"embed.weight", "positions.weight"} & set(model.arrays())
    for name in {"embed.weight", "positions.weight"} & set(model.arrays()):
        for wrong in (model.arrays()[name][:, :-1], model.arrays()[name].astype(np.float16), np.float32(1)):
            with pytest.raises(ValueError, match=name):
                CompiledModel.from_arrays(decoder_shape(config), "float32", {**model.arrays(), name: wrong})


class Poisoned(DummyWeights):
    """One element of one tensor is not a number."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__(config)
        self._poisoned = name

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name).clone()
        if name == self._poisoned:
            tensor.view(-1)[7] = float("nan")
        return tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_what_is_not_a_number_stays_so(name: str, kind: str) -> None:
    """Wherever it comes into being: a logit that is no number fails its request, a plausible one would be an answer."""
    config = CONFIGS[name]
    dtype = np.float32 if kind == "float32" else np.uint16
    up = ["gate", "up"] if config.gated_mlp else ["up"]
    layer = ["attention_norm", "q", "k", "v", "attention_out", "mlp_norm", *up, "down"]
    for tensor in [*(f"layers.1.{part}.weight" for part in layer), "final_norm.weight"]:
        steps = CompiledSteps(compiled(config, Poisoned(config, tensor), kind), dtype)
        logits = steps.run((prompt(9), 0, steps.table(9), True), (prompt(1), 0, steps.table(1), True))
        assert torch.isnan(logits).all(-1).all(), tensor


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new_tokens", [1, 20])
def test_a_key_that_is_not_a_number_spoils_its_own_row_alone(kind: str, half: int, new_tokens: int) -> None:
    config = CONFIGS["tied-long-head"]
    steps = CompiledSteps(make(config, kind), np.float32 if kind == "float32" else np.uint16)
    bad, good = steps.table(120), steps.table(120)
    steps.run((prompt(90), 0, bad, False), (prompt(90), 0, good, False))
    steps.kv[bad[3], 1, half, 0, 2, 5] = np.nan if kind == "float32" else 0x7FC0
    logits = steps.run((prompt(new_tokens), 90, bad, True), (prompt(new_tokens), 90, good, True))
    assert torch.isnan(logits[0]).all()
    assert torch.isfinite(logits[1]).all()


def test_a_step_allocates_nothing_but_logits() -> None:
    model = make(LLAMA)
    steps = CompiledSteps(model)
    table = steps.table(40)
    steps.run((prompt(20), 0, table, True))
    before = {name: buffer.ctypes.data for name, buffer in model._buffers.items()}
    steps.run((prompt(20), 20, table, False))
    assert {name: buffer.ctypes.data for name, buffer in model._buffers.items()} == before


def test_buffers_grow_a_few_times_however_slowly_steps_do() -> None:
    model = make(LLAMA)
    steps = CompiledSteps(model)
    table, seen = steps.table(40), set()
    for length in range(1, 34):
        steps.run((prompt(length), 0, table, True))
        seen.add(model._buffers["x"].shape[0])
    assert seen == {1, 2, 4, 8, 16, 32, 64}


def test_a_shared_prefix_is_read_not_written() -> None:
    steps = CompiledSteps(make(LLAMA))
    prefix = steps.table(16)
    steps.run((prompt(16), 0, prefix, False))
    kept = steps.kv[prefix].copy()
    steps.run(*[(prompt(5, seed), 16, [*prefix, *steps.table(2 * BLOCK_SIZE)], True) for seed in (1, 2)])
    assert steps.kv[prefix].tobytes() == kept.tobytes()


def test_what_is_not_supported_is_said() -> None:
    shape = decoder_shape(LLAMA)
    assert unsupported(shape) is None
    for changes, reason in [
        ({"activation": "tanh"}, "activation 'tanh' is not one of silu, relu, gelu"),
        ({"norm": "batch"}, "norm 'batch' is not one of rms, layer"),
        ({"num_kv_heads": 4}, "6 heads are no multiple of 4 kv heads"),
        ({"head_dim": 10}, "4 rotary frequencies are not half of head_dim 10"),
    ]:
        changed = dataclasses.replace(shape, **changes)
        assert unsupported(changed) == reason
        with pytest.raises(ValueError, match="shape: "):
            CompiledModel.build(changed, "float32", lambda name: np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="kind: 'int4' is not one of float32, bfloat16, w8a8"):
        CompiledModel.build(shape, "int4", lambda name: np.zeros(1, np.float32))
