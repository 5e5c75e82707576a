"""Streams as servers really send them: several tokens in an event, empty deltas, no usage, other line ends."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.cluster.bench.sse import read_events, split_events
from tandem.cluster.workload.report import RequestRecord

DONE = (9.0, b"data: [DONE]")


def delta(when_s: float, finish: str | None = None, **parts: object) -> tuple[float, bytes]:
    choice = {"index": 0, "delta": parts, "finish_reason": finish}
    return when_s, b"data: " + json.dumps({"choices": [choice]}).encode()


def usage(prompt: int, output: int) -> tuple[float, bytes]:
    counts = {"prompt_tokens": prompt, "completion_tokens": output}
    return 8.0, b"data: " + json.dumps({"choices": [], "usage": counts}).encode()


def read(*events: tuple[float, bytes], prompt_tokens: int = 0) -> RequestRecord:
    record = read_events(200, events, "", due_s=0.0, sent_s=0.0, prompt_tokens=prompt_tokens)
    assert record.error == ""
    return record


def test_several_tokens_in_an_event_count_as_the_usage_says() -> None:
    record = read(delta(1.0, content="one two"), delta(3.0, content=" three four"), usage(5, 5), DONE)
    assert record.output_tokens == 5
    assert record.tpot_s == 0.5
    assert record.itls_s == (2.0,)


def test_empty_deltas_that_fill_a_silence_are_no_tokens() -> None:
    waiting = [delta(0.1 * place, content="") for place in range(1, 6)]
    record = read(*waiting, delta(2.0, content="a"), delta(3.0, content="b"), usage(5, 2), DONE)
    assert record.chunk_times_s == (2.0, 3.0)


def test_a_token_that_shows_no_text_is_one_where_the_usage_has_room_for_it() -> None:
    record = read(delta(1.0, content=""), delta(2.0, content="é"), delta(3.0, content="b"), usage(5, 3), DONE)
    assert record.chunk_times_s == (1.0, 2.0, 3.0)


def test_a_last_event_that_only_says_why_it_ended_is_no_token() -> None:
    record = read(delta(1.0, content="a"), delta(2.0, content="b"), delta(7.0, "stop"), usage(5, 2), DONE)
    assert record.last_token_s == 2.0
    only = read(delta(0.5, role="assistant", content=""), delta(7.0, "stop"), usage(5, 1), DONE)
    assert (only.first_token_s, only.output_tokens) == (7.0, 1)


def test_without_usage_pieces_and_the_known_prompt_are_counted() -> None:
    record = read(delta(1.0, content="a"), delta(2.0, content="b"), DONE, prompt_tokens=17)
    assert (record.prompt_tokens, record.output_tokens) == (17, 2)


def test_thinking_is_output_too() -> None:
    record = read(delta(1.0, reasoning_content="hm"), delta(2.0, content="ah"), DONE)
    assert (record.first_token_s, record.text) == (1.0, "hmah")


def test_a_usage_of_null_in_every_event_is_none() -> None:
    piece = b'data: {"choices": [{"text": "a", "finish_reason": null}], "usage": null}'
    assert read((1.0, piece), (2.0, piece), DONE).output_tokens == 2


def test_names_ids_and_comments_of_events_are_skipped() -> None:
    piece = b'event: delta\nid: 4\ndata: {"choices": [{"text": "a"}]}'
    assert read((0.5, b": ping"), (0.7, b"event: ping"), (1.0, piece), DONE).chunk_times_s == (1.0,)


BODY = b'data: {"a": 1}\n\n: ping\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(1, len(BODY)), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
def test_events_come_out_the_same_however_they_are_cut(cuts: list[int], end: bytes) -> None:
    body = BODY.replace(b"\n", end)
    edges = [0, *sorted(cuts), len(body)]
    pieces = [(float(place), body[start:stop]) for place, (start, stop) in enumerate(pairwise(edges))]
    events = split_events(pieces)
    assert [event for _, event in events if event.strip()] == BODY.strip().split(b"\n\n")
    for when_s, event in events:
        assert event.strip() in b"".join(piece for at_s, piece in pieces if at_s <= when_s).replace(b"\r\n", b"\n")


@pytest.mark.parametrize("last", [b"data: {}", b"data: {}\n"])
def test_an_end_without_an_empty_line_is_an_end(last: bytes) -> None:
    assert split_events([(1.0, b"data: 1\n\n"), (2.0, last)]) == [(1.0, b"data: 1"), (2.0, last)]
