"""What `tandem calibrate` measures, against transformers' own keys and values and torch's own narrow numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tandem.cluster.engine import calibrate
from tandem.cluster.engine.calibrate import Text, given_texts, measure, narrowed, own_texts
from tandem.cluster.engine.devices.base import Device
from tandem.cluster.engine.devices.cpu import CpuDevice
from tandem.cluster.engine.devices.kv_memory import kv_layout
from tandem.cluster.engine.kv_scales import LARGEST_STORED
from tandem.cluster.engine.plan import StepOutput, StepPlan
from tandem.cluster.models.hf_config import load_hf_config
from tandem.cluster.models.reference import ModelFiles, resolve_model

BLOCK_SIZE = 4
VOCAB = 97
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
    ),
}


class Watched(Device):
    """Another device, its KV full of NaN before anything is computed; keeps the plans."""

    def __init__(self, files: ModelFiles, texts: tuple[Text, ...], dtype: str = "float32") -> None:
        block_bytes = kv_layout(files.config, dtype, BLOCK_SIZE).block_bytes
        blocks = calibrate.blocks_needed(texts, BLOCK_SIZE)
        self.device = CpuDevice(
            files, dtype=dtype, kernels="torch", block_size=BLOCK_SIZE, kv_cache_bytes=blocks * block_bytes
        )
        self.kv, self.plans = self.device.kv, list[StepPlan]()
        for block in range(blocks):
            self.kv.write_block(block, b"\xff" * block_bytes)

    def launch(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self.device.launch(plan)

    def collect(self) -> StepOutput:
        return self.device.collect()

    def close(self) -> None:
        self.device.close()

    def texts(self) -> list[tuple[int, ...]]:
        """What was computed, sequence by sequence."""
        found: dict[str, list[int]] = {}
        for plan in self.plans:
            for row in plan.rows:
                known = found.setdefault(row.seq_id, [])
                assert row.start == len(known)
                known += row.token_ids
        return [tuple(ids) for ids in found.values()]


def kv_of(oracle: transformers.PreTrainedModel, ids: tuple[int, ...]) -> NDArray[np.float32]:
    """[L, 2, K, T, D]: keys after rotary, and values."""
    with torch.inference_mode():
        cache = oracle(torch.tensor([ids]), use_cache=True).past_key_values
    return np.stack([np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in cache.layers])


@pytest.mark.parametrize("name", CONFIGS)
def test_magnitudes_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ROUND_TEXTS", 2)
    monkeypatch.setattr(calibrate, "STEP_TOKENS", 7)
    torch.manual_seed(0)
    oracle = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    oracle.save_pretrained(tmp_path)
    files = ModelFiles(name=name, kind="hf", path=tmp_path, config=load_hf_config(tmp_path))
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in (9, 21, 1, 16, 5)]
    texts = given_texts(files.config, prompts, 1000)
    device = Watched(files, texts)
    seen = measure(device, texts, rotary=name == "llama")
    found = [kv_of(oracle, text.token_ids) for text in texts]
    expected = np.max([np.abs(kv).max(axis=(3, 4)) for kv in found], axis=0)
    if name == "llama":  # a pair's length is what rotary, at one position or another, makes of one of the two
        pairs = [np.stack(np.split(kv[:, 0].astype(np.float64), 2, axis=-1)) for kv in found]
        expected[:, 0] = np.max([np.sqrt((pair**2).sum(axis=0)).max(axis=(2, 3)) for pair in pairs], axis=0)
    np.testing.assert_allclose(seen.largest, expected, rtol=1e-4)
    assert seen.tokens == 52
    device.close()


def test_rounding_errors_are_of_what_was_written() -> None:
    files = resolve_model("dummy:tiny-llama")
    texts = (Text((5, 6, 7), 6), Text((8,), 9))
    device = Watched(files, texts, "bfloat16")
    seen = measure(device, texts, rotary=True)
    kv = [np.concatenate(list(calibrate._blocks(device.kv, [one])), axis=3) for one in sequences(texts)]
    numbers = torch.from_numpy(np.concatenate(kv, axis=3))
    assert numbers.shape[3] == 19
    for dtype, end in LARGEST_STORED.items():
        scales = torch.from_numpy(seen.largest / np.float32(end))[..., None, None]
        stored = numbers / scales
        stored = stored.round() if dtype == "int8" else stored.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        lost = (stored * scales - numbers).double().pow(2).sum((3, 4)) / numbers.double().pow(2).sum((3, 4))
        np.testing.assert_allclose(seen.errors[dtype], lost.sqrt().numpy(), rtol=1e-5)
        assert 0.003 < seen.errors[dtype].min() < seen.errors[dtype].max() < 0.05
    device.close()


def sequences(texts: tuple[Text, ...]) -> list[calibrate._Sequence]:
    """Where they lie, one after another."""
    found, free = [], 0
    for number, text in enumerate(texts):
        blocks = range(free, free := free + -(-text.length // BLOCK_SIZE))
        found.append(calibrate._Sequence(number, text, blocks, text.length))
    return found


def test_a_model_writes_texts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ROUND_TEXTS", 3)
    monkeypatch.setattr(calibrate, "TEXT_TOKENS", 11)
    files = resolve_model("dummy:tiny-llama")
    texts = own_texts(files.config, 50, seed=3)
    assert [text.length for text in texts] == [11, 11, 11, 11, 6]
    assert [text.token_ids[0] for text in texts[::2]] == [files.config.bos_token_id] * 3
    assert texts == own_texts(files.config, 50, seed=3)
    shares: list[float] = []
    device = Watched(files, texts)
    seen = measure(device, texts, rotary=True, seed=3, on_progress=shares.append)
    written = device.texts()
    assert [len(ids) for ids in written] == [text.length for text in texts]
    assert len(set(written)) == len(texts), "each its own draws"
    assert {plan.rows[0].sample.params.temperature for plan in device.plans if plan.rows[0].sample} == {1.0}
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    again = given_texts(files.config, written, 1000)
    read = Watched(files, again)
    np.testing.assert_allclose(measure(read, again, rotary=True).largest, seen.largest, rtol=1e-5)
    other = Watched(files, texts)
    measure(other, texts, rotary=True, seed=4)
    assert other.texts() != written
    for one in (device, read, other):
        one.close()


def test_a_model_without_a_first_token_begins_anywhere() -> None:
    config = dataclasses.replace(resolve_model("dummy:tiny-llama").config, bos_token_id=None)
    starts = {text.token_ids[0] for text in own_texts(config, 20 * calibrate.TEXT_TOKENS, seed=0)}
    assert len(starts) > 10


def test_prompts_are_cut_to_the_context_and_the_tokens_asked_for() -> None:
    config = dataclasses.replace(resolve_model("dummy:tiny-llama").config, max_model_len=8)
    texts = given_texts(config, [[1] * 3, [], [2] * 20, [3] * 5, [4]], 13)
    assert [text.token_ids for text in texts] == [(1,) * 3, (2,) * 8, (3,) * 2]
    with pytest.raises(ValueError, match="prompts: no token in them"):
        given_texts(config, [[]], 10)
    with pytest.raises(ValueError, match=r"prompts: a token of .* is not in the model's vocabulary of 512"):
        given_texts(config, [[1, 512]], 10)


@pytest.mark.parametrize("dtype", LARGEST_STORED)
def test_narrow_numbers_are_those_of_torch(dtype: str) -> None:
    draw = np.random.default_rng(0)
    values = (draw.normal(size=20_000) * np.exp2(draw.integers(-12, 10, 20_000))).astype(np.float32)
    eighths = np.arange(-3600, 3601, dtype=np.float32) / 8  # ties of both types among them
    values = np.concatenate([values, eighths, eighths / 1024, np.array([0, 448, -448, 449, 1e9], dtype=np.float32)])
    for scale in (1.0, 0.5, 0.0625):
        scaled = torch.from_numpy(values / np.float32(scale))
        end = LARGEST_STORED[dtype]
        bounded = scaled.clamp(-end, end)
        stored = bounded.round() if dtype == "int8" else bounded.to(torch.float8_e4m3fn).float()
        found = narrowed(values, np.full(1, scale, dtype=np.float32), dtype)
        assert found.dtype == np.float32
        assert np.array_equal(found, stored.numpy() * np.float32(scale))


def test_what_is_not_finite_is_refused() -> None:
    files = resolve_model("dummy:tiny-llama")
    texts = (Text((1, 2, 3)),)

    class Broken(Watched):
        def collect(self) -> StepOutput:
            output = super().collect()
            self.kv.array[0, 1, 1, 0, 2] = np.inf  # type: ignore[attr-defined]
            return output

    device = Broken(files, texts)
    with pytest.raises(RuntimeError, match="values of layer 1, KV head 0 are not finite"):
        measure(device, texts, rotary=True)
    device.close()
