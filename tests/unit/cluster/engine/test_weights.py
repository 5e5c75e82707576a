"""Loading: what is wrong with files is named, nothing is held twice, equal weights have equal fingerprints."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf as ggml
import numpy as np
import pytest
import torch
from llama_names import hf_name
from safetensors.torch import load_file, save_file
from tandem.cluster.engine.fingerprint import fingerprint, weights_stamp
from tandem.cluster.engine.gguf_weights import GgufWeights
from tandem.cluster.engine.hf_weights import INDEX_NAME, DummyWeights, HfWeights
from tandem.cluster.engine.weight_source import check_shapes, expected_shapes
from tandem.cluster.engine.weights import build_model, load_model
from tandem.cluster.models.config import Architecture, ModelConfig
from tandem.cluster.models.reference import ModelError, ModelFiles
from tandem.cluster.models.registry import CONFIGS

TINY = CONFIGS["tiny-llama"]
GGUF_NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "attention_out": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def dummy_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    source = DummyWeights(config)
    return {name: source.read(name) for name in source.shapes()}


def gguf_name(name: str) -> str:
    *prefix, part, kind = name.split(".")
    return f"blk.{prefix[1]}.{GGUF_NAMES[part]}.{kind}" if prefix else f"{GGUF_NAMES[part]}.{kind}"


def write_hf(folder: Path, config: ModelConfig, **changes: torch.Tensor | None) -> ModelFiles:
    """A folder of `config` with dummy weights; `changes` replace, add or (None) drop tensors by their stored name."""
    tensors = {hf_name(name): tensor for name, tensor in dummy_tensors(config).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return ModelFiles(name="test", kind="hf", path=folder, config=config)


def write_gguf(path: Path, config: ModelConfig, extra: str | None = None) -> ModelFiles:
    """As llama.cpp's converter writes it: queries and keys of `llama` in interleaved rotary order."""
    writer = ggml.GGUFWriter(path, config.architecture.value)
    for name, tensor in dummy_tensors(config).items():
        values, part = tensor.numpy(), name.split(".")[-2]
        if config.architecture is Architecture.LLAMA and part in ("q", "k"):
            heads = config.num_heads if part == "q" else config.num_kv_heads
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(values.swapaxes(1, 2).reshape(tensor.shape))
        writer.add_tensor(gguf_name(name), values)
    if extra is not None:
        writer.add_tensor(extra, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(name="test", kind="gguf", path=path, config=config)


def test_three_kinds_give_the_same_tensors(tmp_path: Path) -> None:
    sources = [
        DummyWeights(TINY),
        HfWeights(write_hf(tmp_path, TINY).path, TINY),
        GgufWeights(write_gguf(tmp_path / "a.gguf", TINY).path, TINY),
    ]
    for source in sources:
        check_shapes(TINY, source)
        for name, tensor in dummy_tensors(TINY).items():
            assert torch.equal(source.read(name), tensor), name
        source.release()
    for source in sources[1:]:  # stretches of rows, after a release
        whole = source.read("embed.weight").clone()
        assert torch.equal(source.read("embed.weight", slice(100, 130)), whole[100:130])


@pytest.mark.parametrize("quantization", [ggml.GGMLQuantizationType.F16, ggml.GGMLQuantizationType.Q8_0])
def test_gguf_types_dequantize_by_stretches(tmp_path: Path, quantization: ggml.GGMLQuantizationType) -> None:
    path = tmp_path / "q.gguf"
    values = torch.randn(512, 64).numpy()
    writer = ggml.GGUFWriter(path, "llama")
    stored = ggml.quants.quantize(values, quantization)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufWeights(path, TINY)
    expected = torch.from_numpy(ggml.dequantize(stored, quantization).astype(np.float32))
    assert torch.equal(source.read("embed.weight"), expected)
    assert torch.equal(source.read("embed.weight", slice(7, 50)), expected[7:50])


def test_missing_tensor(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    files = write_hf(tmp_path, TINY, **{name: None})
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight' .* missing; expected shape \(160, 64\)"):
        load_model(files, "float32")


def test_misshaped_tensor(tmp_path: Path) -> None:
    files = write_hf(tmp_path, TINY, **{"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 64)})
    with pytest.raises(ModelError, match=r"k_proj.weight' .* has shape \(16, 64\), expected \(32, 64\)"):
        load_model(files, "float32")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.0.weight", "visual.proj.weight"])
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"tensor '{name}' is not known"):
        load_model(write_hf(tmp_path, TINY, **{name: torch.zeros(2)}), "float32")


def test_known_tensor_without_a_place(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ModelError, match=rf"{name}' .* of shape \(64,\) has no place in a llama model"):
        load_model(write_hf(tmp_path, TINY, **{name: torch.zeros(64)}), "float32")


def test_layers_beyond_the_config(tmp_path: Path) -> None:
    files = write_hf(tmp_path, TINY)
    files = dataclasses.replace(files, config=dataclasses.replace(TINY, num_layers=1))
    with pytest.raises(ModelError, match=r"model\.layers\.1\..* has no place"):
        load_model(files, "float32")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    files = write_hf(tmp_path, TINY, **{"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"'model.norm.weight' has type I8, allowed: F32"):
        load_model(files, "float32")


def test_unknown_gguf_tensor(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'blk.0.ffn_gate_inp.weight' is not known"):
        load_model(write_gguf(tmp_path / "x.gguf", TINY, "blk.0.ffn_gate_inp.weight"), "float32")


def test_broken_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 50)
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_model(ModelFiles(name="x", kind="hf", path=tmp_path, config=TINY), "float32")


def test_unknown_dtype() -> None:
    with pytest.raises(ModelError, match=r"dtype: 'float16' is not one of \['bfloat16', 'float32'\]"):
        load_model(ModelFiles(name="x", kind="dummy", path=None, config=TINY), "float16")


def test_shards(tmp_path: Path) -> None:
    files = write_hf(tmp_path, TINY)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in halves.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in halves.items() for name in held}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    source = HfWeights(files.path, TINY)
    for name, tensor in dummy_tensors(TINY).items():
        assert torch.equal(source.read(name), tensor), name
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks weights: b\.safetensors"):
        HfWeights(files.path, TINY)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(ModelError, match="outside of its folder"):
        HfWeights(files.path, TINY)


def test_tied_embedding_under_either_name(tmp_path: Path) -> None:
    embed = dummy_tensors(TINY)["embed.weight"]
    files = write_hf(tmp_path, TINY, **{"model.embed_tokens.weight": None, "lm_head.weight": embed})
    model = load_model(files, "float32")
    assert torch.equal(model.embed(torch.arange(5)), embed[:5])


@pytest.mark.parametrize("config", [TINY, CONFIGS["tiny-opt"], dataclasses.replace(TINY, tie_word_embeddings=False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_bytes_are_one_copy(config: ModelConfig, dtype: str) -> None:
    shares: list[float] = []
    model = load_model(ModelFiles(name="x", kind="dummy", path=None, config=config), dtype, shares.append)
    norms = sum(torch.Size(s).numel() for n, s in expected_shapes(config).items() if "norm" in n)
    elements = sum(torch.Size(s).numel() for s in expected_shapes(config).values()) - norms
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert elements * size <= model.resident_bytes() <= elements * size * 1.02  # biases stay float32
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


class Hoarder(DummyWeights):
    """Breaks the memory rule: keeps everything it ever handed out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.kept: list[torch.Tensor] = []

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        self.kept.append(super().read(name, rows))
        return self.kept[-1]


MEMORY_CONFIG = dataclasses.replace(
    TINY,
    vocab_size=16384,
    hidden_size=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=2048,
)
"""25 million elements: 50 MB in 16 bits, 4.2 million (17 MB in float32) a layer."""


def grown_bytes(source: str, dtype: str) -> int:
    """Peak of a fresh process's memory while it loads `MEMORY_CONFIG`, over what it held before."""
    script = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parents[3] / "common")]!r}
import importlib.util
spec = importlib.util.spec_from_file_location("t", {__file__!r}); t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
def peak(): return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024
small = t.ModelFiles(name="x", kind="dummy", path=None, config=t.TINY)
t.load_model(small, {dtype!r})
before = peak()
model = t.build_model(t.MEMORY_CONFIG, {source}, getattr(torch, {dtype!r}))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_rule(tmp_path: Path) -> None:
    """One resident copy in compute form plus one layer (float32) in passing; a hoarder is caught by the same limit."""
    elements = sum(torch.Size(shape).numel() for shape in expected_shapes(MEMORY_CONFIG).values())
    layer = sum(torch.Size(s).numel() for n, s in expected_shapes(MEMORY_CONFIG).items() if n.startswith("layers.0."))
    margin = 10 * 2**20  # allocator slack and the pages of one open file
    limit = {"bfloat16": elements * 2 + layer * 4 + margin, "float32": elements * 4 + layer * 4 + margin}
    gguf_path, folder = tmp_path / "m.gguf", tmp_path / "hf"
    folder.mkdir()
    write_gguf(gguf_path, MEMORY_CONFIG)
    write_hf(folder, MEMORY_CONFIG)
    sources = {
        "gguf": f"t.GgufWeights(t.Path({str(gguf_path)!r}), t.MEMORY_CONFIG)",
        "hf": f"t.HfWeights(t.Path({str(folder)!r}), t.MEMORY_CONFIG)",
    }
    for name, source in sources.items():
        grown = grown_bytes(source, "bfloat16")
        assert elements * 2 * 0.9 <= grown <= limit["bfloat16"], (name, grown, limit)
    assert grown_bytes(sources["hf"], "float32") <= limit["float32"]
    assert grown_bytes("t.Hoarder(t.MEMORY_CONFIG)", "bfloat16") > limit["bfloat16"]


def test_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = write_hf(tmp_path / "a", TINY)
    twin = write_hf(tmp_path / "b", TINY)
    first = fingerprint(files, "bfloat16")
    assert first == fingerprint(twin, "bfloat16")
    assert first != fingerprint(files, "float32")
    other_rope = dataclasses.replace(files, config=dataclasses.replace(TINY, rope_theta=1e6))
    assert first != fingerprint(other_rope, "bfloat16")
    changed = write_hf(tmp_path / "b", TINY, **{"model.norm.weight": torch.ones(64)})
    assert first != fingerprint(changed, "bfloat16")
    dummy = ModelFiles(name="x", kind="dummy", path=None, config=TINY)
    assert fingerprint(dummy, "bfloat16") == fingerprint(dataclasses.replace(dummy, name="y"), "bfloat16")


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.cluster.engine import fingerprint as sampled

    monkeypatch.setattr(sampled, "_FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(sampled, "_SAMPLE_BYTES", 64)
    path = tmp_path / "m.gguf"
    files = ModelFiles(name="x", kind="gguf", path=path, config=TINY)
    data = bytearray(range(256)) * 64

    def digest() -> str:
        path.write_bytes(data)
        return fingerprint(files, "float32")

    first = digest()
    data[-1] ^= 1  # the last bytes are sampled
    assert digest() != first
    data[-1] ^= 1
    assert digest() == first
    data.append(0)
    assert digest() != first


def test_a_stamp_tells_apart_what_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    files = ModelFiles(name="x", kind="gguf", path=path, config=TINY)
    path.write_bytes(b"abc")
    os.utime(path, ns=(0, 5))
    first = weights_stamp(files)
    assert weights_stamp(files) == first
    path.write_bytes(b"abd")  # same size, another time
    assert weights_stamp(files) != first
    path.write_bytes(b"abcd")
    os.utime(path, ns=(0, 5))
    assert weights_stamp(files) != first
    folder = write_hf(tmp_path, TINY)
    assert weights_stamp(folder) not in (first, weights_stamp(files))
    dummy = ModelFiles(name="x", kind="dummy", path=None, config=TINY)
    assert weights_stamp(dummy) == weights_stamp(dummy)


def test_dummy_weights_do_not_depend_on_order() -> None:
    first, second = DummyWeights(TINY), DummyWeights(TINY)
    second.read("embed.weight")
    assert torch.equal(first.read("layers.1.q.weight"), second.read("layers.1.q.weight"))
    assert not torch.equal(first.read("layers.0.q.weight"), first.read("layers.1.q.weight"))
    assert not torch.equal(DummyWeights(TINY, seed=1).read("layers.0.q.weight"), first.read("layers.0.q.weight"))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("tiny") or n in ("opt-125m", "smollm2-135m")])
def test_expected_shapes_count_published_parameters(name: str) -> None:
    published = {"opt-125m": 125_239_296, "smollm2-135m": 134_515_008}
    elements = sum(torch.Size(shape).numel() for shape in expected_shapes(CONFIGS[name]).values())
    assert elements == published.get(name, elements)


def test_build_model_checks_before_it_reads() -> None:
    class Unreadable(DummyWeights):
        def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
            raise AssertionError("read before the shapes were checked")

    source = Unreadable(TINY)
    with pytest.raises(ModelError, match="no place"):
        build_model(dataclasses.replace(TINY, num_layers=1), source, torch.float32)
