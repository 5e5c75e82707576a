"""Where scales of narrow KV memory come from: the file of `tandem calibrate`, and what checkpoints ship."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_names import hf_name
from safetensors.torch import save_file
from tandem.cluster.engine.hf_weights import DummyWeights
from tandem.cluster.engine.kv_scales import KVScales, checkpoint_scales
from tandem.cluster.engine.weights import load_model
from tandem.cluster.models.reference import ModelError, ModelFiles
from tandem.cluster.models.registry import CONFIGS

TINY = CONFIGS["tiny-llama"]
SHAPE = (TINY.num_layers, 2, TINY.num_kv_heads)
LAYERS = range(TINY.num_layers)


def some_scales() -> KVScales:
    largest = np.random.default_rng(1).lognormal(size=SHAPE).astype(np.float32)
    return KVScales(largest=largest, model="tiny", made_by="a test")


def with_scales(folder: Path, scales: dict[str, torch.Tensor]) -> ModelFiles:
    source = DummyWeights(TINY)
    tensors = {hf_name(name): source.read(name) for name in source.shapes()}
    save_file(tensors | scales, folder / "model.safetensors")
    return ModelFiles(name="tiny", kind="hf", path=folder, config=TINY)


def test_scales_take_the_largest_to_the_types_end() -> None:
    scales = some_scales()
    for dtype, end in (("int8", 127), ("float8_e4m3", 448)):
        found = scales.scales(dtype)
        assert found.dtype == np.float32
        assert found.shape == SHAPE
        np.testing.assert_allclose(found * end, scales.largest, rtol=1e-6)
    with pytest.raises(ValueError, match="dtype: 'int4' is not one of"):
        scales.scales("int4")


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-36])
def test_where_nothing_was_seen_the_scale_is_one(largest: float) -> None:
    some = some_scales().largest
    some[0, 1, 0] = largest
    for dtype in ("int8", "float8_e4m3"):
        found = KVScales(largest=some).scales(dtype)
        assert found[0, 1, 0] == 1
        assert (found[1:] == some_scales().scales(dtype)[1:]).all()


def test_a_file_gives_back_the_same_bits(tmp_path: Path) -> None:
    scales = some_scales()
    scales.largest[0, 0, 0] = 0
    scales.largest[0, 0, 1] = np.finfo(np.float32).max
    scales.save(tmp_path / "a.json")
    again = KVScales.load(tmp_path / "a.json", TINY)
    assert again.largest.dtype == np.float32
    assert (again.largest == scales.largest).all()
    assert (again.model, again.made_by, again.digest()) == ("tiny", "a test", scales.digest())
    other = scales.largest.copy()
    other[-1, -1, -1] += 1
    assert KVScales(largest=other).digest() != scales.digest()
    assert KVScales(largest=scales.largest.reshape(-1, 2, 1)).digest() != scales.digest()


def wrong(field: str, value: Any) -> bytes:
    data: dict[str, Any] = {
        "format": "tandem-kv-scales",
        "version": 1,
        "layers": [{"keys": [1.0] * SHAPE[2], "values": [1.0] * SHAPE[2]} for _ in LAYERS],
    }
    if field == "number":
        data["layers"][1]["values"][0] = value
    elif field == "layer":
        data["layers"][1] = value
    else:
        data[field] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", r"holds \[1\], allowed: a JSON object"),
        (b"{}", r"format and version are \[None, None\], allowed: 'tandem-kv-scales' and 1"),
        (wrong("version", 2), "version are .*2.*, allowed"),
        (wrong("model", 1), "model is 1, allowed: a string"),
        (wrong("layers", None), "layers: None, allowed: a list of 2"),
        (wrong("layers", []), "layers: 0 of them, allowed: a list of 2"),
        (wrong("layer", 7), "layer 1: keys is None, allowed: a list of 2 numbers"),
        (
            wrong("layer", {"keys": [1, 1], "values": [1, 1, 1]}),
            r"layer 1: values is \[1, 1, 1\], allowed: a list of 2",
        ),
        (wrong("number", -1), "layer 1: values has -1, allowed: numbers from 0"),
        (wrong("number", float("nan")), "layer 1: values has nan, allowed"),
        (wrong("number", float("inf")), "layer 1: values has inf, allowed"),
        (wrong("number", 3.41e38), r"layer 1: values has 3.41e\+38, allowed"),
        (wrong("number", 1e39), r"layer 1: values has 1e\+39, allowed"),
        (wrong("number", 10**1000), "layer 1: values has 1000"),
        (wrong("number", True), "layer 1: values has True, allowed"),
        (wrong("number", "1"), "layer 1: values has '1', allowed"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^kv_scales: .*a.json': .*{message}"):
        KVScales.load(path, TINY)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, Path("a\0b")):
        with pytest.raises(ValueError, match=r"^kv_scales: .* cannot be read"):
            KVScales.load(path, TINY)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.layers.{}.self_attn.k_scale", "model.layers.{}.self_attn.v_scale"),
        ("layers.{}.self_attn.attn.k_scale", "layers.{}.self_attn.attn.v_scale"),
        ("model.layers.{}.self_attn.k_proj.k_scale", "model.layers.{}.self_attn.v_proj.v_scale"),
        ("model.layers.{}.self_attn.k_proj.output_scale", "model.layers.{}.self_attn.v_proj.output_scale"),
        ("model.layers.{}.self_attn.qkv_proj.k_scale", "model.layers.{}.self_attn.qkv_proj.v_scale"),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (TINY.num_kv_heads, 1, 1)])
def test_scales_of_a_checkpoint(tmp_path: Path, key: str, value: str, shape: tuple[int, ...]) -> None:
    stored = {}
    for layer in LAYERS:
        stored[key.format(layer)] = torch.full(shape, 0.25 + layer, dtype=torch.bfloat16)
        stored[value.format(layer)] = torch.full(shape, 0.5 + layer)
    if shape[:1] == (TINY.num_kv_heads,):
        stored[key.format(0)][1] = 2.0
    stored["model.layers.0.self_attn.q_scale"] = torch.ones(1)  # of narrow queries: read past
    files = with_scales(tmp_path, stored)
    scales = checkpoint_scales(files)
    assert scales is not None
    expected = np.zeros(SHAPE)
    for layer in LAYERS:
        expected[layer] = [[0.25 + layer], [0.5 + layer]]
    if shape[:1] == (TINY.num_kv_heads,):
        expected[0, 0, 1] = 2.0
    assert (scales.scales("float8_e4m3") == expected).all()
    load_model(files, "float32")


def test_one_old_scale_is_for_both(tmp_path: Path) -> None:
    scales = checkpoint_scales(
        with_scales(tmp_path, {f"model.layers.{layer}.self_attn.kv_scale": torch.tensor(0.5) for layer in LAYERS})
    )
    assert scales is not None
    assert (scales.largest == 224).all()


def test_most_checkpoints_have_none(tmp_path: Path) -> None:
    assert checkpoint_scales(with_scales(tmp_path, {})) is None
    assert checkpoint_scales(ModelFiles(name="d", kind="dummy", path=None, config=TINY)) is None


NAME = "model.layers.{}.self_attn.{}_scale"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME.format(1, "v"): None}, "layer 1 has no scale for its values, others have"),
        ({NAME.format(2, "v"): torch.ones(1)}, "is of a layer beyond the model's 2"),
        ({NAME.format(0, "k"): torch.tensor(0.0)}, r"k_scale' of shape \(\) is \[0.0\], allowed: positive numbers"),
        ({NAME.format(0, "k"): torch.tensor(-1.0)}, "allowed: positive numbers"),
        ({NAME.format(0, "k"): torch.tensor(float("nan"))}, "allowed: positive numbers"),
        ({NAME.format(0, "k"): torch.tensor(3e38)}, "allowed: positive numbers"),
        ({NAME.format(0, "k"): torch.ones(3)}, r"of shape \(3,\) is .*, one or 2 of them"),
        ({NAME.format(0, "k"): torch.ones(1, dtype=torch.int8)}, "has type I8, allowed: F32"),
        ({"layers.0.self_attn.attn.k_scale": torch.ones(1)}, "are scales of the same KV"),
    ],
)
def test_wrong_scales_of_a_checkpoint(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    scales = {NAME.format(layer, side): torch.ones(1) for layer in LAYERS for side in "kv"} | changes
    with pytest.raises(ModelError, match=message):
        checkpoint_scales(with_scales(tmp_path, {name: found for name, found in scales.items() if found is not None}))
