"""`OutputStream` against a plain reading of what it promises, for any text, stop strings, cutting and repetition."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.cluster.types import FinishReason, SampledToken
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.detokenizer import Detokenizer
from tandem.router.output import OutputStream

TOKENIZER = ByteTokenizer(258, eos_token_ids=(257,))

# Few characters, so that stop strings, their borders and half characters meet often.
letters = "abé€"
stops = st.lists(st.text(letters, min_size=1, max_size=4), max_size=3)
tokens = st.lists(st.sampled_from([*b"aaabbb", *"é€".encode()]), max_size=25) | st.text(letters, max_size=12).map(
    lambda text: list(text.encode())
)


def held_back(text: str, stop: list[str]) -> int:
    """Length of the longest end of `text` that begins a stop string without being it."""
    return max((k for s in stop for k in range(1, len(s)) if text.endswith(s[:k])), default=0)


def expected(ids: list[int], stop: list[str], min_tokens: int) -> tuple[str, str | None, int, list[str]]:
    """(text, stop string, tokens used, what is shown after each token), looking at every character in turn."""
    detokenizer = Detokenizer(TOKENIZER)
    text, shown = "", []
    for count, token_id in enumerate([*ids, None], start=1):
        piece = detokenizer.flush() if token_id is None else detokenizer.push(token_id)
        count = min(count, len(ids))
        for char in piece:
            text += char
            found = max((s for s in stop if text.endswith(s)), key=len, default=None)
            if found is not None and count >= min_tokens:
                return text.removesuffix(found), found, count, shown
        shown.append(text[: len(text) - held_back(text, stop)])
    return text, None, len(ids), shown


# Each push: how many tokens it repeats, how many are new.
cuts = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), max_size=12)


@settings(max_examples=400, deadline=None)
@given(ids=tokens, stop=stops, min_tokens=st.integers(0, 12), cuts=cuts)
def test_text_tokens_and_stop_are_those_of_a_plain_reading(
    ids: list[int], stop: list[str], min_tokens: int, cuts: list[tuple[int, int]]
) -> None:
    text, found, used, _ = expected(ids, stop, min_tokens)
    stream = OutputStream(TOKENIZER, stop=stop, min_tokens=min_tokens)
    got_text, got_ids = "", []
    for repeated, new in [*cuts, (1, len(ids))]:
        if stream.finished:
            break
        start = max(0, stream.output_tokens - repeated)
        end = min(len(ids), stream.output_tokens + new)
        finish = FinishReason.LENGTH if end == len(ids) else None
        chunk = stream.push(start, [SampledToken(i) for i in ids[start:end]], finish, None)
        got_text += chunk.text
        got_ids += [token.token_id for token in chunk.tokens]
        assert (chunk.finish_reason is not None) == stream.finished
    assert (got_text, stream.stop_reason, got_ids) == (text, found, ids[:used])
    assert stream.finish_reason is (FinishReason.STOP if found is not None else FinishReason.LENGTH)
    assert stream.token_ids == tuple(ids[:used])


@settings(max_examples=300, deadline=None)
@given(ids=tokens, stop=stops, min_tokens=st.integers(0, 12))
def test_only_what_could_become_a_stop_string_is_held_back(ids: list[int], stop: list[str], min_tokens: int) -> None:
    _, _, used, shown = expected(ids, stop, min_tokens)
    stream = OutputStream(TOKENIZER, stop=stop, min_tokens=min_tokens)
    text = ""
    for index in range(used if len(shown) > used else used - 1):
        text += stream.push(index, [SampledToken(ids[index])], None, None).text
        assert text == shown[index]
