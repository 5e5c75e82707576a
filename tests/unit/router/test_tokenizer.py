"""Tokenizers: SmolLM2's against `transformers` and published facts; every way to load one, and to fail at it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tandem.cluster.models.config import Architecture, ModelConfig
from tandem.cluster.models.errors import ModelError
from tandem.cluster.models.gguf import GgufTokenizer
from tandem.cluster.models.reference import ModelFiles, resolve_model
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.errors import InvalidRequest
from tandem.router.gguf_tokenizer import build_gguf_backend
from tandem.router.tokenizer import FastTokenizer, TokenCodec, load_tokenizer
from tandem.router.tokenizer_base import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

DATA = Path(__file__).parents[2] / "data" / "tokenizers"

CONFIG = ModelConfig(
    architecture=Architecture.LLAMA,
    vocab_size=512,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    max_model_len=64,
    eos_token_ids=(1,),
)

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "I'm sure they'll've  done it,\tWe'D not.",
    "def f(x):\n    return x**2 + 10_000\n\n\n\n# end\r\n",
    "Grüße aus Köln — naïve café, Ελλάδα, Привет, עברית, हिन्दी, ไทย",
    "世界你好，日本語のテキスト、한국어",
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200d\ufeff",
    "x   y    z\n \n  \n\tq   ",
    "3.14159, 2024-01-31 12:00, 1e-9",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_sta",
    'https://example.org/a?b=c&d=%20 {"k": [1, 2, null]}',
)
SPACED_NUMBERS = ("a  1", "\n\n 42", "x = 7\n    8\t9", "row:   12  13", "½ ² ٣ Ⅳ")


# -- SmolLM2, from its GGUF ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_files() -> ModelFiles:
    try:
        return resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"the demo model is not here: {error}")


@pytest.fixture(scope="module")
def smollm2(smollm2_files: ModelFiles) -> Tokenizer:
    return load_tokenizer(smollm2_files)


@pytest.fixture(scope="module")
def oracle(smollm2_files: ModelFiles) -> Backend:
    """What `AutoTokenizer.from_pretrained(…, gguf_file=…)` makes of the same file, by its own functions: it reads the
    whole file three times more."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    architecture, vocabulary, _ = mapping.get_gguf_tokenizer(str(smollm2_files.path))
    backend: Backend = mapping.convert_gguf_tokenizer(architecture, vocabulary)[0]
    return backend


@pytest.fixture(scope="module")
def digits(oracle: Backend) -> Backend:
    """`transformers` forgets that SmolLM2 splits digits when it reads a GGUF, which matters where spaces come before
    numbers; given the pre-tokenizer of the published tokenizer.json it agrees everywhere."""
    backend = Backend.from_str(oracle.to_str())
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return backend


def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.eos_token_ids) == (49152, (2,))
    assert (smollm2.bos_text, smollm2.eos_text) == ("<|im_start|>", "<|im_end|>")
    assert [smollm2.is_special(token_id) for token_id in (0, 2, 16, 17, 49151)] == [True, True, True, False, False]
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.token_bytes(198) == b"\n"
    assert smollm2.chat_template is not None


def test_smollm2_default_system_prompt(smollm2: Tokenizer) -> None:
    """The ids that the published HuggingFaceTB/SmolLM2-135M-Instruct tokenizer gives for it."""
    text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    ids = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    assert smollm2.encode(text, add_special=False) == [*ids, 2, 198]
    assert smollm2.encode(text, add_special=True) == [*ids, 2, 198]  # add_bos_token is false


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_transformers(smollm2: Tokenizer, oracle: Backend, text: str) -> None:
    ids = smollm2.encode(text, add_special=False)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert smollm2.decode(ids, skip_special=False) == text == oracle.decode(ids, skip_special_tokens=False)
    assert smollm2.decode(ids) == oracle.decode(ids)


@pytest.mark.parametrize("text", [*TEXTS, *SPACED_NUMBERS])
def test_smollm2_splits_digits_as_its_own_tokenizer_json_does(smollm2: Tokenizer, digits: Backend, text: str) -> None:
    assert smollm2.encode(text, add_special=False) == digits.encode(text, add_special_tokens=False).ids


# -- GGUF vocabularies in general ------------------------------------------------------------------------------------


def gguf(**changes: Any) -> GgufTokenizer:
    """Byte-level BPE with one merge, BOS and EOS, and a user-defined token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ("<s>", "</s>", "<tool>", *alphabet, "ab", "Ġ1")
    plain = GgufTokenizer(
        model="gpt2",
        pre="gpt-2",
        tokens=tokens,
        token_types=(3, 3, 4, *([1] * (len(alphabet) + 2))),
        merges=("a b", "Ġ 1"),
        bos_token_id=0,
        eos_token_id=1,
        add_bos=False,
        add_eos=False,
        chat_template=None,
    )
    return dataclasses.replace(plain, **changes)


def pieces(pre: str, text: str) -> list[str]:
    """How the text is split before merging, spaces shown as they are."""
    split = build_gguf_backend(gguf(pre=pre)).pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", "  ", " 12345", "!?", "\n\n ", " x", "'", "LL"]),
        ("smollm", ["It", "'s", "   ", "1", "2", "3", "4", "5", "!?", "\n\n ", " x", "'", "LL"]),
        ("llama-bpe", ["It", "'s", "  ", " ", "123", "45", "!?\n\n", " ", " x", "'LL"]),
        ("qwen2", ["It", "'s", "  ", " ", "1", "2", "3", "4", "5", "!?\n\n", " ", " x", "'LL"]),
        ("default", ["It", "'", "s", "  ", " ", "123", "45", "!?", "\n\n ", " x", "'", "LL"]),
    ],
)
def test_each_pre_tokenizer_splits_its_own_way(pre: str, expected: list[str]) -> None:
    assert pieces(pre, "It's   12345!?\n\n  x'LL") == expected


def test_gguf_splits_equal_those_of_transformers() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    text = "It'll  cost $1234567.89…\r\n\r\n\tαβγ  \n x=y//z 世界 ½ DON'T <tool> "
    for pre in ("qwen2", "llama-bpe", "llama3", "llama-v3", "deepseek-r1-qwen"):
        split = mapping.Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[pre])
        expected = pre_tokenizers.Split(split, behavior="isolated").pre_tokenize_str(text)
        assert pieces(pre, text) == [piece for piece, _ in expected]


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    tokenizer = FastTokenizer(build_gguf_backend(gguf()))
    assert tokenizer.encode("<s>ab<tool></s>", add_special=False) == [0, 3 + 256, 2, 1]
    assert tokenizer.decode([0, 259, 2, 1]) == "ab<tool>"
    assert tokenizer.decode([0, 259, 2, 1], skip_special=False) == "<s>ab<tool></s>"


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"),
    [(False, False, [259]), (True, False, [0, 259]), (False, True, [259, 1]), (True, True, [0, 259, 1])],
)
def test_bos_and_eos_are_added_where_the_file_says_so(add_bos: bool, add_eos: bool, expected: list[int]) -> None:
    tokenizer = FastTokenizer(build_gguf_backend(gguf(add_bos=add_bos, add_eos=add_eos)))
    assert tokenizer.encode("ab", add_special=True) == expected
    assert tokenizer.encode("ab", add_special=False) == [259]


def test_llama3_takes_whole_words_before_merging() -> None:
    tokens = (*gguf().tokens, "abc")
    for pre, expected in (("llama-bpe", ["abc"]), ("gpt-2", ["ab", "c"])):
        changed = gguf(tokens=tokens, token_types=(*gguf().token_types, 1), pre=pre)
        assert build_gguf_backend(changed).encode("abc").tokens == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre": "martian"}, r"tokenizer\.ggml\.pre is 'martian'; known are .*gpt-2.*llama-bpe.*qwen2, smollm"),
        ({"model": "llama"}, r"tokenizer\.ggml\.model is 'llama'; known is 'gpt2'"),
        ({"merges": ("a b", "ab")}, r"tokenizer\.ggml\.merges has 'ab'; a merge is two tokens"),
        ({"merges": ("a b c",)}, r"tokenizer\.ggml\.merges has 'a b c'"),
        ({"merges": ("a nowhere",)}, r"tokenizer\.ggml\.merges has 'a nowhere', but 'nowhere' is no token"),
        ({"merges": ("b a",)}, r"tokenizer\.ggml\.merges has 'b a', but 'ba' is no token"),
    ],
)
def test_unusable_gguf_vocabularies_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_gguf_backend(gguf(**changes))


# -- Hugging Face folders --------------------------------------------------------------------------------------------


def folder_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(ModelFiles(name="test", kind="hf", path=folder, config=CONFIG))


def write_folder(folder: Path, name: str = "byte_level", **config: Any) -> Path:
    shutil.copy(DATA / f"{name}.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_folder_with_tokenizer_json(tmp_path: Path) -> None:
    bos = {"content": "<|bos|>", "lstrip": False}
    tokenizer = folder_tokenizer(write_folder(tmp_path, bos_token=bos, eos_token="<|end|>", chat_template="x"))
    assert (tokenizer.bos_text, tokenizer.eos_text, tokenizer.chat_template) == ("<|bos|>", "<|end|>", "x")
    assert tokenizer.eos_token_ids == (1,)
    ids = tokenizer.encode("hello world, hello <tool call>", add_special=True)
    assert len(ids) > 4  # the file's truncation and padding are somebody's training settings
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "hello world, hello <tool call>"
    assert tokenizer.decode(ids, skip_special=False).startswith("<|bos|>hello")


def test_eos_text_comes_from_the_model_config_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    tokenizer = folder_tokenizer(write_folder(tmp_path))
    assert (tokenizer.bos_text, tokenizer.eos_text, tokenizer.chat_template) == ("", "<|end|>", None)


def test_sentencepiece_folder(tmp_path: Path) -> None:
    tokenizer = folder_tokenizer(write_folder(tmp_path, "metaspace"))
    ids = tokenizer.encode("hello world 😀", add_special=True)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "hello world 😀"
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert tokenizer.token_bytes(ids[1]) == b" hello"
    assert tokenizer.opening_bytes(ids[1]) == b"hello"


def test_named_chat_templates_and_the_file_that_goes_first(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_folder(tmp_path, chat_template=named)
    assert folder_tokenizer(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert folder_tokenizer(tmp_path).chat_template == "file"


def test_folder_with_gpt2_files(tmp_path: Path) -> None:
    """As OPT ships: vocab.json and merges.txt, `</s>` for both BOS and EOS, BOS before every prompt."""
    vocabulary = {"<pad>": 0, "</s>": 1, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 2)}}
    vocabulary["ab"] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "</s>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "pad_token": "<pad>"}))
    tokenizer = folder_tokenizer(tmp_path)
    assert tokenizer.encode("ab", add_special=True) == [1, vocabulary["ab"]]
    assert tokenizer.decode(tokenizer.encode("é ab</s>", add_special=True)) == "é ab"
    assert tokenizer.is_special(0)
    assert (tokenizer.bos_text, tokenizer.eos_text) == ("</s>", "</s>")


def test_unusable_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer: needed is tokenizer\.json, or vocab\.json"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        folder_tokenizer(tmp_path)


# -- bytes behind tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.Strip(" ", 1, 0)])])
def test_decoders_of_other_families_are_refused(decoder: Any) -> None:
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoder
    with pytest.raises(ValueError, match=r"decoder .* is not supported; known are ByteLevel, Metaspace"):
        FastTokenizer(backend)


def test_gemma_style_decoder_keeps_the_first_space() -> None:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend = Backend(models.BPE(vocab={"\u2581a": 0, "<0x4": 1, "<0xGG>": 2, "<0x41>": 3}, merges=[]))
    backend.decoder = decoders.Sequence(steps)
    tokenizer = FastTokenizer(backend)
    assert tokenizer.decode([0, 1, 2, 3]) == " a<0x4<0xGG>A" == backend.decode([0, 1, 2, 3])


def test_added_tokens_outside_the_byte_alphabet_are_their_own_text() -> None:
    backend = Backend.from_file(str(DATA / "byte_level.json"))
    backend.add_special_tokens([AddedToken("<｜x▁y｜>", normalized=False)])
    tokenizer = FastTokenizer(backend)
    assert tokenizer.token_bytes(backend.token_to_id("<｜x▁y｜>")) == "<｜x▁y｜>".encode()
    assert tokenizer.token_bytes(backend.token_to_id("<tool call>")) == b"<tool call>"


def test_ids_beyond_the_vocabulary_have_no_bytes() -> None:
    tokenizer = FastTokenizer(Backend.from_file(str(DATA / "byte_level.json")))
    assert [tokenizer.token_bytes(token_id) for token_id in (-1, tokenizer.vocab_size, 10**9)] == [b"", b"", b""]
    assert tokenizer.opening_bytes(10**9) == b""


def test_codec_is_read_from_nested_sequences() -> None:
    nested = {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}]}
    assert TokenCodec.from_decoder(nested) == TokenCodec(byte_level=True)


@pytest.mark.parametrize("name", ["fast", "bytes"])
def test_lone_surrogates_are_refused(name: str) -> None:
    fast = FastTokenizer(Backend.from_file(str(DATA / "byte_level.json")))
    tokenizer: Tokenizer = {"fast": fast, "bytes": ByteTokenizer(256)}[name]
    with pytest.raises(InvalidRequest, match=r"U\+D800 at character 1: a lone surrogate"):
        tokenizer.encode("a\ud800", add_special=False)


# -- dummy models ----------------------------------------------------------------------------------------------------


def test_dummy_models_speak_bytes() -> None:
    tokenizer = load_tokenizer(ModelFiles(name="dummy:x", kind="dummy", path=None, config=CONFIG))
    assert tokenizer.encode("hé", add_special=True) == [104, 0xC3, 0xA9]
    assert tokenizer.decode([104, 0xC3, 0xA9]) == "hé"
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (512, (1,))
    assert tokenizer.chat_template is not None


def test_words_of_a_byte_tokenizer_are_printable_and_differ() -> None:
    tokenizer = ByteTokenizer(40_000, eos_token_ids=(2, 300))
    words = [tokenizer.token_bytes(token_id).decode() for token_id in range(256, 40_000)]
    assert len(set(words)) == len(words)
    assert all(word.strip().isalpha() and word.startswith(" ") for word in words if word != "<|end|>")
    assert (tokenizer.is_special(300), tokenizer.is_special(2)) == (True, False)
    assert tokenizer.token_bytes(40_000) == b""


def test_byte_tokenizer_needs_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size is 64; a byte tokenizer needs at least 256"):
        ByteTokenizer(64)
