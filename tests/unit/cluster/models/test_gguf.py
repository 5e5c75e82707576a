"""GGUF: what the writer of the `gguf` library writes, we read; what is broken is refused with its reason."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem.cluster.models.config import Architecture, RopeScaling
from tandem.cluster.models.errors import ModelError
from tandem.cluster.models.gguf import open_gguf, read_gguf_tokenizer
from tandem.cluster.models.gguf_config import gguf_config, llama3_rope_factors

VOCAB, HIDDEN, HEADS, KV_HEADS, FFN = 32, 64, 4, 2, 96
TOKENS = [f"t{index}" for index in range(VOCAB)]
RNG = np.random.default_rng(7)


def write(
    path: Path,
    *,
    architecture: str = "llama",
    numbers: dict[str, Any] | None = None,
    tokenizer: bool = True,
    strings: dict[str, str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A one-layer model; `numbers` replace or add `<architecture>.<key>` values (None leaves one out)."""
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, Any] = {
        "block_count": 1,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.freq_base": 5000.0,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    for key, value in (values | (numbers or {})).items():
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    for key, text in (strings or {}).items():
        writer.add_string(key, text)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * VOCAB)
        writer.add_token_merges(["t 0", "t 1"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(3)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", RNG.standard_normal((VOCAB, HIDDEN), dtype=np.float32))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_config_of_a_small_llama(tmp_path: Path) -> None:
    config = gguf_config(open_gguf(write(tmp_path / "m.gguf")))
    assert config.architecture is Architecture.LLAMA
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (VOCAB, HIDDEN, 1)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HIDDEN // HEADS)
    assert (config.intermediate_size, config.max_model_len, config.rope_theta) == (FFN, 256, 5000.0)
    assert config.norm_eps == pytest.approx(1e-6)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 3))


@pytest.mark.parametrize(
    ("architecture", "tensor", "field"),
    [
        ("qwen2", "blk.0.attn_q.bias", "qkv_bias"),
        ("qwen3", "blk.0.attn_q_norm.weight", "qk_norm"),
        ("llama", "blk.0.attn_output.bias", "attention_out_bias"),
        ("llama", "blk.0.ffn_down.bias", "mlp_bias"),
    ],
)
def test_what_the_tensors_tell(tmp_path: Path, architecture: str, tensor: str, field: str) -> None:
    plain = gguf_config(open_gguf(write(tmp_path / "plain.gguf", architecture=architecture)))
    extra = {tensor: np.zeros(HIDDEN, np.float32), "output.weight": np.zeros((VOCAB, HIDDEN), np.float32)}
    config = gguf_config(open_gguf(write(tmp_path / "extra.gguf", architecture=architecture, tensors=extra)))
    assert not getattr(plain, field)
    assert getattr(config, field)
    assert not config.tie_word_embeddings


def test_head_dim_and_window_of_their_own(tmp_path: Path) -> None:
    sizes = {"attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 128}
    config = gguf_config(open_gguf(write(tmp_path / "m.gguf", architecture="qwen3", numbers=sizes)))
    assert config.head_dim == 32
    assert config.sliding_window == 128
    whole = {"attention.sliding_window": 256}
    assert gguf_config(open_gguf(write(tmp_path / "n.gguf", numbers=whole))).sliding_window is None


def test_rope_scaling(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = gguf_config(open_gguf(write(tmp_path / "linear.gguf", numbers=linear)))
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    expected = RopeScaling(kind="llama3", factor=8.0)
    factors = llama3_rope_factors(5000.0, HIDDEN // HEADS, expected).astype(np.float32)
    path = write(tmp_path / "llama3.gguf", tensors={"rope_freqs.weight": factors})
    assert gguf_config(open_gguf(path)).rope_scaling == expected
    path = write(tmp_path / "odd.gguf", tensors={"rope_freqs.weight": factors * 2 + 3})
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        gguf_config(open_gguf(path))


@pytest.mark.parametrize(
    ("architecture", "numbers", "message"),
    [
        ("mamba", {}, r"general\.architecture is 'mamba', allowed: llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, r"llama\.expert_count is 8"),
        ("llama", {"attention.head_count_kv": 3}, r"head_count_kv is 3, allowed: a divisor of 4"),
        ("llama", {"block_count": None}, r"llama\.block_count is missing"),
        ("llama", {"block_count": 0}, r"llama\.block_count is 0, allowed: 1 to 4096"),
        ("llama", {"attention.head_count": [4, 2]}, r"head_count is 'a list of 2', allowed: one int"),
        ("llama", {"rope.dimension_count": 8}, r"rope\.dimension_count is 8"),
        ("llama", {"rope.scaling.type": "yarn"}, r"rope\.scaling\.type is 'yarn', allowed: none, linear"),
    ],
)
def test_unsupported_models_are_refused(
    tmp_path: Path, architecture: str, numbers: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "m.gguf", architecture=architecture, numbers=numbers)
    with pytest.raises(ModelError, match=message):
        gguf_config(open_gguf(path))


def test_tokenizer(tmp_path: Path) -> None:
    tokenizer = read_gguf_tokenizer(write(tmp_path / "m.gguf"))
    assert (tokenizer.model, tokenizer.pre) == ("gpt2", "smollm")
    assert list(tokenizer.tokens) == TOKENS
    assert tokenizer.token_types == (1,) * VOCAB
    assert tokenizer.merges == ("t 0", "t 1")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.add_bos
    assert not tokenizer.add_eos
    assert tokenizer.chat_template == "{{ messages }}"
    with pytest.raises(ModelError, match="no tokenizer"):
        read_gguf_tokenizer(write(tmp_path / "bare.gguf", tokenizer=False))


@pytest.mark.parametrize(
    ("tokens", "types", "eos", "message"),
    [
        (TOKENS, [1] * 3, 2, "token_type has 3 entries for 32 tokens"),
        (TOKENS, [1] * VOCAB, 99, "eos_token_id is 99, allowed: below 32"),
    ],
)
def test_tokenizers_that_contradict_themselves(
    tmp_path: Path, tokens: list[str], types: list[int], eos: int, message: str
) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=message):
        read_gguf_tokenizer(path)


@pytest.mark.parametrize(
    ("model", "pre", "add_bos"), [("gpt2", "smollm", False), ("gpt2", "llama-bpe", True), ("llama", "default", True)]
)
def test_what_llama_cpp_assumes_where_the_file_is_silent(tmp_path: Path, model: str, pre: str, add_bos: bool) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_gguf_tokenizer(path).add_bos == add_bos


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_tensors_come_back(tmp_path: Path, kind: str) -> None:
    values = RNG.standard_normal((6, 64), dtype=np.float32)
    tensor_type = gguf.GGMLQuantizationType[kind]
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    stored = gguf.quants.quantize(values, tensor_type)
    writer.add_tensor("w", stored, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.tensors["w"].shape == (6, 64)
    assert file.tensors["w"].type is tensor_type
    np.testing.assert_array_equal(file.load("w"), gguf.quants.dequantize(stored, tensor_type))
    with pytest.raises(ModelError, match="'missing' is missing"):
        file.load("missing")


def test_agrees_with_the_librarys_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", strings={"general.name": "größe"}, tensors={"x": np.ones((3, 5, 2), np.float16)})
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents(), name
    assert len(ours.metadata) == sum(not name.startswith("GGUF.") for name in theirs.fields)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.offset_bytes, mine.size_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_broken_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    cases = [
        (b"", "empty"),
        (b"PK\x03\x04" + whole[4:], "begins with"),
        (whole[:4] + (9).to_bytes(4, "little") + whole[8:], "version 9"),
        (whole[:4] + (3).to_bytes(4, "big") + whole[8:], "big-endian"),
        (whole[:300], "truncated"),
        (whole[:-1], "truncated: tensor 'token_embd.weight'"),
        (whole[:8] + (2**60).to_bytes(8, "little") + whole[16:], "truncated|comes twice|dimensions|unknown"),
        (whole[:16] + (2**60).to_bytes(8, "little") + whole[24:], "truncated|comes twice|unknown|UTF-8"),
    ]
    for content, message in cases:
        broken.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            open_gguf(broken)
    with pytest.raises(ModelError, match="cannot be read"):
        open_gguf(tmp_path / "absent.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            open_gguf(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 1500), value=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused(tmp_path: Path, position: int, value: int) -> None:
    path = tmp_path / "m.gguf"
    if not path.exists():
        write(path)
    content = bytearray(path.read_bytes())
    content[position] = value
    flipped = tmp_path / "flipped.gguf"
    flipped.write_bytes(content)
    with contextlib.suppress(ModelError):
        gguf_config(open_gguf(flipped))
