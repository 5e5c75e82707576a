import gzip
import json
from pathlib import Path

import pytest
from tandem.cluster.workload.datasets import prompt_requests, random_requests, read_prompts, vocabulary_of
from tandem.cluster.workload.prompts import PROMPTS


def test_known_files_are_read(tmp_path: Path) -> None:
    rows = [
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "..."},
        {"question_id": 81, "turns": ["first", "second"]},
        {"question": "How many?", "answer": "72"},
        {"messages": [{"role": "user", "content": "hello"}]},
        "plain",
    ]
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(json.dumps(row) for row in rows).encode()))
    assert read_prompts(path) == ("def f():\n", "first", "How many?", "hello", "plain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{', r"p\.jsonl:2 is not JSON"),
        ('{"answer": "a"}', r"p\.jsonl:1 has no prompt"),
        ('{"turns": []}', r"p\.jsonl:1 has no prompt"),
        ("3", r"p\.jsonl:1 has no prompt"),
        ("\n", "has no prompts"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_missing_file() -> None:
    with pytest.raises(ValueError, match=r"'/nonexistent\.jsonl' cannot be read \(No such file or directory\)$"):
        read_prompts("/nonexistent.jsonl")


def test_prompts_repeat_where_there_are_too_few() -> None:
    requests = prompt_requests(2 * len(PROMPTS) + 1, 9, None, 3)
    assert len(requests) == 2 * len(PROMPTS) + 1
    assert {request.prompt for request in requests} == set(PROMPTS)
    assert {request.max_tokens for request in requests} == {9}
    assert requests == prompt_requests(2 * len(PROMPTS) + 1, 9, None, 3)
    assert requests != prompt_requests(2 * len(PROMPTS) + 1, 9, None, 4)


def test_random_prompts_have_the_length_asked_for() -> None:
    vocabulary = vocabulary_of(lambda text: [ord(letter) for letter in text])
    requests = random_requests(5, 33, 8, vocabulary, 0)
    assert [len(request.prompt) for request in requests] == [33] * 5
    assert all(set(request.prompt) <= set(vocabulary) for request in requests)
    assert all(request.ignore_eos and request.max_tokens == 8 for request in requests)
    with pytest.raises(ValueError, match="random_input_len"):
        random_requests(1, 0, 8, vocabulary, 0)


def test_a_dozen_different_prompts_ship() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) >= 12


def test_random_lengths_vary_within_their_range() -> None:
    requests = random_requests(300, 100, 10, range(50), 0, range_ratio=0.25)
    assert {len(request.prompt) for request in requests} >= {75, 100, 125}
    assert all(75 <= len(request.prompt) <= 125 for request in requests)
    assert {request.max_tokens for request in requests} == set(range(7, 14))
    assert all(len(request.prompt) == 1 for request in random_requests(50, 1, 1, range(9), 0))


def test_real_prompts_can_be_answered_to_the_end() -> None:
    for asked in (True, False):
        assert [request.ignore_eos for request in prompt_requests(3, 9, None, 3, ignore_eos=asked)] == [asked] * 3
