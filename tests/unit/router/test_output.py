"""`OutputStream`, case by case; tests/property/test_output_property.py covers the rest of the ground."""

from __future__ import annotations

import pytest
from tandem.cluster.types import FinishReason, SampledToken
from tandem.router.byte_tokenizer import ByteTokenizer
from tandem.router.output import OutputChunk, OutputGap, OutputStream, StopStrings

END = 300
TOKENIZER = ByteTokenizer(301, eos_token_ids=(END,))
NOTHING = OutputChunk()


def sampled(text: str) -> list[SampledToken]:
    return [SampledToken(byte) for byte in text.encode()]


def test_text_and_tokens_come_as_they_are_pushed() -> None:
    stream = OutputStream(TOKENIZER)
    assert stream.push(0, sampled("he"), None, None) == OutputChunk(text="he", tokens=tuple(sampled("he")))
    assert not stream.finished
    last = stream.push(2, sampled("y"), FinishReason.LENGTH, None)
    assert last == OutputChunk(text="y", tokens=tuple(sampled("y")), finish_reason=FinishReason.LENGTH)
    assert stream.finished
    assert (stream.output_tokens, stream.token_ids) == (3, tuple(b"hey"))


def test_logprobs_pass_through_untouched() -> None:
    token = SampledToken(104, -0.5, ((104, -0.5), (105, -1.0)))
    assert OutputStream(TOKENIZER).push(0, [token], None, None).tokens == (token,)


def test_half_a_character_waits_and_is_replaced_at_the_end() -> None:
    stream = OutputStream(TOKENIZER)
    first = stream.push(0, [SampledToken(0xE2)], None, None)
    assert (first.text, len(first.tokens)) == ("", 1)  # the token is reported though its text lags
    assert stream.push(1, [SampledToken(0x82), SampledToken(0xAC)], None, None).text == "€"
    assert stream.push(3, [SampledToken(0xE2)], FinishReason.LENGTH, None).text == "\ufffd"


def test_end_of_sequence_has_no_text_but_counts() -> None:
    stream = OutputStream(TOKENIZER, skip_special=False)
    chunk = stream.push(0, [*sampled("ok"), SampledToken(END)], FinishReason.STOP, None)
    assert (chunk.text, len(chunk.tokens)) == ("ok", 3)
    assert (chunk.finish_reason, chunk.stop_reason) == (FinishReason.STOP, None)
    assert stream.output_tokens == 3


def test_stop_token_has_no_text_and_is_the_reason() -> None:
    chunk = OutputStream(TOKENIZER).push(0, sampled("ab"), FinishReason.STOP, ord("b"))
    assert (chunk.text, chunk.finish_reason, chunk.stop_reason) == ("a", FinishReason.STOP, ord("b"))


def test_special_tokens_within_the_text_are_left_out_unless_wanted() -> None:
    tokens = [*sampled("a"), SampledToken(END), *sampled("b")]
    assert OutputStream(TOKENIZER).push(0, tokens, None, None).text == "ab"
    assert OutputStream(TOKENIZER, skip_special=False).push(0, tokens, None, None).text == "a<|end|>b"


def test_repeated_tokens_are_dropped_by_index() -> None:
    stream = OutputStream(TOKENIZER)
    stream.push(0, sampled("abc"), None, None)
    assert stream.push(0, sampled("a"), None, None) == NOTHING
    assert stream.push(1, sampled("bcd"), None, None).text == "d"
    assert stream.token_ids == tuple(b"abcd")


def test_finish_that_only_repeats_the_last_token_still_ends_the_choice() -> None:
    stream = OutputStream(TOKENIZER)
    stream.push(0, sampled("ab"), None, None)
    assert stream.push(1, sampled("b"), FinishReason.LENGTH, None) == OutputChunk(finish_reason=FinishReason.LENGTH)


def test_finish_of_an_old_event_is_dropped_with_it() -> None:
    stream = OutputStream(TOKENIZER)
    stream.push(0, sampled("abc"), None, None)
    assert stream.push(0, sampled("a"), FinishReason.LENGTH, None) == NOTHING
    assert not stream.finished


def test_missing_tokens_are_an_error() -> None:
    stream = OutputStream(TOKENIZER)
    stream.push(0, sampled("a"), None, None)
    with pytest.raises(OutputGap, match="index 3 came, 1 is next: 2 tokens are missing"):
        stream.push(3, sampled("d"), None, None)


def test_stop_string_across_pushes_is_never_shown() -> None:
    stream = OutputStream(TOKENIZER, stop=["\n\nUser:"])
    texts = [stream.push(i, [token], None, None).text for i, token in enumerate(sampled("Hi\n\nUse me\n\nUser"))]
    assert "".join(texts) == "Hi\n\nUse me"
    chunk = stream.push(16, sampled(": x"), None, None)
    assert chunk == OutputChunk(
        tokens=tuple(sampled(":")), finish_reason=FinishReason.STOP, stop_reason="\n\nUser:"
    )  # what followed the stop string never was
    assert stream.push(19, sampled("y"), None, None) == NOTHING
    assert stream.output_tokens == 17


def test_first_complete_stop_string_wins_and_the_longest_of_equals() -> None:
    stream = OutputStream(TOKENIZER, stop=["bcd", "c", "abc"])
    chunk = stream.push(0, sampled("xabcd"), None, None)
    assert (chunk.text, chunk.stop_reason, len(chunk.tokens)) == ("x", "abc", 4)


def test_held_back_text_is_released_at_the_end() -> None:
    stream = OutputStream(TOKENIZER, stop=["abc"])
    assert stream.push(0, sampled("xab"), None, None).text == "x"
    assert stream.push(3, [SampledToken(END)], FinishReason.STOP, None).text == "ab"


def test_stop_string_in_the_last_token_beats_length() -> None:
    chunk = OutputStream(TOKENIZER, stop=["b"]).push(0, sampled("ab"), FinishReason.LENGTH, None)
    assert (chunk.text, chunk.finish_reason, chunk.stop_reason) == ("a", FinishReason.STOP, "b")


def test_stop_strings_are_text_until_min_tokens() -> None:
    stream = OutputStream(TOKENIZER, stop=["ab"], min_tokens=5)
    chunk = stream.push(0, sampled("ab.ab.ab"), None, None)
    assert (chunk.text, chunk.stop_reason, len(chunk.tokens)) == ("ab.", "ab", 5)


def test_token_helpers_for_logprobs() -> None:
    stream = OutputStream(TOKENIZER)
    assert stream.token_bytes(0xE2) == b"\xe2"


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty string"):
        OutputStream(TOKENIZER, stop=["a", ""])


def test_stop_string_that_repeats_itself() -> None:
    stops = StopStrings(["aab"])
    assert stops.push("aaa", armed=True) == ("a", None)
    assert stops.push("a", armed=True) == ("a", None)
    assert stops.push("b", armed=True) == ("", "aab")
