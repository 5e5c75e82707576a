"""Streams equal one-shot decoding, for every token sequence; one-shot decoding equals that of `tokenizers`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.detokenizer import Detokenizer
from tandem.router.tokenizer import FastTokenizer
from tandem.router.tokenizer_base import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
BYTE_LEVEL = Backend.from_file(str(DATA / "byte_level.json"))
METASPACE = Backend.from_file(str(DATA / "metaspace.json"))
FIRST_TOKEN_METASPACE = Backend.from_file(str(DATA / "metaspace.json"))
FIRST_TOKEN_METASPACE.decoder = decoders.Metaspace()

TOKENIZERS: dict[str, Tokenizer] = {
    "byte_level": FastTokenizer(BYTE_LEVEL),
    "metaspace": FastTokenizer(METASPACE),
    "first_token_metaspace": FastTokenizer(FIRST_TOKEN_METASPACE),
    "bytes": ByteTokenizer(400, eos_token_ids=(300,)),
}

# Ids a little beyond the vocabulary too: models pad theirs.
token_ids = st.lists(st.integers(0, 330), max_size=40)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = pytest.mark.parametrize("name", TOKENIZERS)


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True, continuation: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special, continuation=continuation)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return [*pieces, detokenizer.flush()]


@names
@settings(max_examples=150, deadline=None)
@given(ids=token_ids, skip_special=st.booleans(), continuation=st.booleans())
def test_stream_equals_one_shot_for_every_token_sequence(
    name: str, ids: list[int], skip_special: bool, continuation: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    whole = tokenizer.decode(ids, skip_special=skip_special, continuation=continuation)
    assert "".join(stream(tokenizer, ids, skip_special=skip_special, continuation=continuation)) == whole


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "bytes"])
@settings(max_examples=250, deadline=None)
@given(text=any_text | st.text("\u2581 hewo<0x41>é€😀", max_size=20))
def test_all_of_unicode_survives_and_streams_whole_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special=False)
    if name == "metaspace":
        text = text.replace("\u2581", " ")  # SentencePiece itself cannot tell them apart
    pieces = stream(tokenizer, ids, skip_special=False)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert pieces[-1] == ""


@pytest.mark.parametrize(
    ("name", "backend"), [("byte_level", BYTE_LEVEL), ("first_token_metaspace", FIRST_TOKEN_METASPACE)]
)
@settings(max_examples=300, deadline=None)
@given(ids=token_ids, skip_special=st.booleans())
def test_one_shot_equals_tokenizers_for_every_token_sequence(
    name: str, backend: Backend, ids: list[int], skip_special: bool
) -> None:
    ours = TOKENIZERS[name].decode(ids, skip_special=skip_special)
    assert ours == backend.decode(ids, skip_special_tokens=skip_special)


# `tokenizers` turns a whole run of byte tokens into U+FFFD if any of it is invalid, which no stream can follow; so the
# sequences here have byte tokens only where they are text.
byte_runs = any_text.map(lambda text: [byte + 3 for byte in text.encode("utf-8")])
sentencepiece_ids = st.lists(
    st.one_of(byte_runs, st.lists(st.integers(0, 330).filter(lambda i: not 3 + 128 <= i < 259), max_size=5)), max_size=6
).map(lambda parts: [token_id for part in parts for token_id in part])


@settings(max_examples=300, deadline=None)
@given(ids=sentencepiece_ids, skip_special=st.booleans())
def test_one_shot_equals_tokenizers_wherever_byte_runs_are_text(ids: list[int], skip_special: bool) -> None:
    ours = TOKENIZERS["metaspace"].decode(ids, skip_special=skip_special)
    assert ours == METASPACE.decode(ids, skip_special_tokens=skip_special)


@names
@settings(max_examples=100, deadline=None)
@given(ids=token_ids)
def test_no_piece_waits_longer_than_a_character(name: str, ids: list[int]) -> None:
    """What is held back is never a whole character: the pieces so far are the one-shot text less an unfinished end."""
    tokenizer = TOKENIZERS[name]
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.push(token_id)
        whole = tokenizer.decode(ids[:count])
        # CPython waits for the third byte of an encoded surrogate, which shows as up to three characters.
        assert whole.startswith(shown)
        assert whole[len(shown) :] in ("", "\ufffd", "\ufffd\ufffd")
