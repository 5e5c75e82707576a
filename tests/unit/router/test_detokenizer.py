"""`Detokenizer`, case by case; tests/property/test_detokenizer_property.py covers every sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.detokenizer import Detokenizer
from tandem.router.tokenizer import FastTokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

DATA = Path(__file__).parents[2] / "data" / "tokenizers"


@pytest.fixture(scope="module")
def metaspace() -> FastTokenizer:
    return FastTokenizer(Backend.from_file(str(DATA / "metaspace.json")))


def test_a_character_comes_with_its_last_byte() -> None:
    detokenizer = Detokenizer(ByteTokenizer(256))
    assert [detokenizer.push(byte) for byte in "a😀é".encode()] == ["a", "", "", "", "😀", "", "é"]
    assert detokenizer.flush() == ""


def test_broken_bytes_show_as_soon_as_they_are_known_to_be_broken() -> None:
    detokenizer = Detokenizer(ByteTokenizer(256))
    assert [detokenizer.push(byte) for byte in b"\xf0\x9fA\xff"] == ["", "", "\ufffdA", "\ufffd"]
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_character_may_span_a_special_token() -> None:
    detokenizer = Detokenizer(ByteTokenizer(300, eos_token_ids=(299,)))
    assert [detokenizer.push(token_id) for token_id in (0xC3, 299, 0xA9)] == ["", "", "é"]


def test_dummy_space_is_dropped_once_at_the_start(metaspace: FastTokenizer) -> None:
    hello, open_, space = (metaspace.encode(text, add_special=False) for text in ("hello", "hello hello", "  "))
    assert len(hello) == 1  # "▁hello"
    detokenizer = Detokenizer(metaspace)
    assert [detokenizer.push(token_id) for token_id in open_] == ["hello", " hello"]
    detokenizer = Detokenizer(metaspace)
    assert "".join(detokenizer.push(token_id) for token_id in [1, *space, *hello]) == "   hello"


def test_continuation_keeps_the_space(metaspace: FastTokenizer) -> None:
    (hello,) = metaspace.encode("hello", add_special=False)
    assert Detokenizer(metaspace, continuation=True).push(hello) == " hello"
    assert metaspace.decode([hello], continuation=True) == " hello"


def test_special_token_shown_at_the_start_keeps_the_space_after_it(metaspace: FastTokenizer) -> None:
    (hello,) = metaspace.encode("hello", add_special=False)
    assert Detokenizer(metaspace).push(1) == ""
    detokenizer = Detokenizer(metaspace, skip_special=False)
    assert detokenizer.push(1) + detokenizer.push(hello) == "<s> hello"


def test_an_id_without_bytes_does_not_open_the_text(metaspace: FastTokenizer) -> None:
    (hello,) = metaspace.encode("hello", add_special=False)
    ids = [metaspace.vocab_size, hello]  # models pad their vocabulary
    detokenizer = Detokenizer(metaspace)
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "hello"]
    assert metaspace.decode(ids) == "hello"


def test_metaspace_decoder_drops_every_space_of_the_first_token() -> None:
    backend = Backend.from_file(str(DATA / "metaspace.json"))
    backend.decoder = decoders.Metaspace()
    tokenizer = FastTokenizer(backend)
    ids = [backend.token_to_id("\u2581\u2581"), backend.token_to_id("\u2581hello")]
    assert tokenizer.decode(ids) == " hello" == backend.decode(ids)
